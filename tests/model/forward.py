"""Layers of released shapes with random weights, and batches to run through them."""

import dataclasses
import json

import numpy as np
import released
import torch

from gemcutter.batch import KindBatch, StepBatch
from gemcutter.cache.pool import KVPool
from gemcutter.checkpoint.config import read_spec
from gemcutter.checkpoint.dummy import dummy_weights
from gemcutter.model.models import Model
from gemcutter.ops.linears.linear import linear
from gemcutter.ops.norms.rms_norm import rms_norm
from gemcutter.ops.norms.t5_norm import t5_norm
from gemcutter.ops.tokens.embed import embed
from gemcutter.ops.tokens.logits import logits
from gemcutter.spec import Family

S, F = "sliding_attention", "full_attention"
PAGE = 16
CUTS = {
    "e4b": dict(num_hidden_layers=6, layer_types=[S, F, S, F, S, F], num_kv_shared_layers=2),
    "26b": dict(num_hidden_layers=3, layer_types=[S, S, F]),
    "31b": dict(num_hidden_layers=2, layer_types=[S, F]),
}


def write_config(name: str, folder) -> None:
    """config.json of the first layers of a released model, with a small vocabulary."""
    config = released.config(name)
    small = {"vocab_size": 4096, "vocab_size_per_layer_input": 4096, "max_position_embeddings": 2048}
    config["text_config"].update(CUTS[name] | small)
    (folder / "config.json").write_text(json.dumps(config))


def build(name: str, folder):
    """(spec, weights) of that model."""
    write_config(name, folder)
    spec = read_spec(folder)
    weights = dummy_weights(spec, torch.device("cuda"), torch.bfloat16, seed=3)
    generator = torch.Generator("cuda").manual_seed(4)
    for w in weights.layers:  # norms of 1 hide a swapped or forgotten norm weight
        for field in dataclasses.fields(w):
            value = getattr(w, field.name)
            if isinstance(value, torch.Tensor) and value.dim() == 1:
                value.copy_(0.8 + 0.4 * torch.rand(value.shape, generator=generator, device="cuda"))
        w.q_norm.mul_(w.q_norm.numel() ** -0.5)
    return spec, weights


def step_batch(token_ids: torch.Tensor, chunks: list[tuple[int, int]], tables: dict) -> StepBatch:
    """Tokens [start, stop) of one sequence after the other, those of one token first.

    Args:
        token_ids: of all chunks, flat.
        tables: [sequences, pages] int32 of each kind.
    """
    device = token_ids.device
    lengths = [stop - start for start, stop in chunks]
    assert lengths == sorted(lengths, key=lambda length: length > 1), f"chunks of {lengths}: single tokens first"
    ends = np.cumsum([0, *lengths])
    positions = torch.cat([torch.arange(start, stop) for start, stop in chunks])
    sequence = torch.repeat_interleave(torch.arange(len(chunks)), torch.tensor(lengths))
    kinds = {}
    for kind, table in tables.items():
        pages = torch.from_numpy(np.ascontiguousarray(table))
        slots = pages.long()[sequence, positions // PAGE] * PAGE + positions % PAGE
        kinds[kind] = KindBatch(pages.to(device), slots.to(device))
    return StepBatch(
        token_ids=token_ids,
        positions=positions.to(device),
        query_start=torch.tensor(ends, dtype=torch.int32, device=device),
        kv_len=torch.tensor([stop for _, stop in chunks], dtype=torch.int32, device=device),
        logit_rows=torch.arange(len(chunks), device=device),
        kinds=kinds,
        num_decodes=lengths.count(1),
        max_query_len=max((length for length in lengths if length > 1), default=0),
        max_kv_len=max(stop for _, stop in chunks),
    )


def logits_of_all(model: Model, batch: StepBatch, pool: KVPool) -> torch.Tensor:
    """[T, V], of every token: each goes through every layer."""
    spec, w = model.spec, model.weights
    if spec.family is not Family.GEMMA4:
        hidden = embed(batch.token_ids, w.embed, 1.0)
        normed = t5_norm(hidden, w.layers[0].input_norm, spec.eps)
        readers = [*((after.input_norm, after.qkv) for after in w.layers[1:]), (w.norm, w.head)]
        for layer, layer_weights, reader in zip(spec.layers, w.layers, readers, strict=True):
            hidden, normed = model.decoder_layer(layer, layer_weights, *reader, hidden, normed, batch, pool)
        return logits(normed, w.head, spec.softcap)
    hidden = embed(batch.token_ids, w.embed, spec.hidden**0.5)
    per_layer = model._per_layer_inputs(batch, hidden) if spec.ple_width else None
    projected = linear(rms_norm(hidden, w.layers[0].input_norm, spec.eps), w.layers[0].qkv)
    for layer, layer_weights, following in zip(spec.layers, w.layers, [*w.layers[1:], None], strict=True):
        own = per_layer[:, layer.index] if per_layer is not None else None
        hidden, projected = model.decoder_layer(
            layer, layer_weights, following, hidden, projected, own, batch, pool
        )
    return logits(projected, w.head, spec.softcap)
