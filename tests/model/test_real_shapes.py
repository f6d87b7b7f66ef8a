"""The engine's layers against `model/plain.py` at the released models' widths, bf16, random weights, on a GPU.

Every layer gets the plain model's own input, so the error is that layer's alone. The sequence is longer than the
window, computed as two prefill chunks and one decoded token, through scattered pages.
"""

import dataclasses
import json

import numpy as np
import pytest
import released
import torch

from gemcutter.batch import KindBatch, StepBatch
from gemcutter.cache.layout import CacheLayout
from gemcutter.cache.pool import KVPool
from gemcutter.checkpoint.config import read_spec
from gemcutter.checkpoint.dummy import dummy_weights
from gemcutter.model import plain
from gemcutter.model.gemma4 import Gemma4

S, F = "sliding_attention", "full_attention"
PAGE = 16
CUTS = {
    "e4b": dict(num_hidden_layers=6, layer_types=[S, F, S, F, S, F], num_kv_shared_layers=2),
    "26b": dict(num_hidden_layers=3, layer_types=[S, S, F]),
    "31b": dict(num_hidden_layers=2, layer_types=[S, F]),
}
CHUNKS = [(0, 1100), (1100, 1400), (1400, 1401)]


def build(name: str, folder):
    """(spec, weights) of the first layers of a released model, with a small vocabulary."""
    config = released.config(name)
    small = {"vocab_size": 4096, "vocab_size_per_layer_input": 4096, "max_position_embeddings": 2048}
    config["text_config"].update(CUTS[name] | small)
    (folder / "config.json").write_text(json.dumps(config))
    spec = read_spec(folder)
    weights = dummy_weights(spec, torch.device("cuda"), torch.bfloat16, seed=3)
    generator = torch.Generator("cuda").manual_seed(4)
    for w in weights.layers:  # norms of 1 hide a swapped or forgotten norm weight
        for field in dataclasses.fields(w):
            value = getattr(w, field.name)
            if isinstance(value, torch.Tensor) and value.dim() == 1:
                value.copy_(0.8 + 0.4 * torch.rand(value.shape, generator=generator, device="cuda"))
    return spec, weights


def chunk_batch(spec, start: int, stop: int, tables: dict) -> StepBatch:
    positions = torch.arange(start, stop, device="cuda")
    one = stop - start == 1
    kinds = {}
    for kind, table in tables.items():
        pages = torch.from_numpy(table).cuda()
        kinds[kind] = KindBatch(pages[None], pages.long()[positions // PAGE] * PAGE + positions % PAGE)
    return StepBatch(
        token_ids=positions,
        positions=positions,
        query_start=torch.tensor([0, stop - start], dtype=torch.int32, device="cuda"),
        kv_len=torch.tensor([stop], dtype=torch.int32, device="cuda"),
        logit_rows=torch.tensor([stop - start - 1], device="cuda"),
        kinds=kinds,
        num_decodes=int(one),
        max_query_len=0 if one else stop - start,
        max_kv_len=stop,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", CUTS)
@torch.inference_mode()
def test_layers_stay_close_to_plain(name, tmp_path):
    spec, weights = build(name, tmp_path)
    total = CHUNKS[-1][1]
    generator = torch.Generator("cuda").manual_seed(5)
    ids = torch.randint(0, spec.vocab, (total,), generator=generator, device="cuda")
    stream = list(plain.residual_stream(spec, weights, ids))
    per_layer = plain.per_layer_inputs(spec, weights, ids, stream[0]) if weights.per_layer else None

    layout = CacheLayout.of(spec, PAGE, 2)
    count = layout.num_pages(total)
    rng = np.random.default_rng(6)
    tables = {kind: (1 + rng.permutation(count)).astype(np.int32) for kind in layout.kinds}
    pool = KVPool(spec, layout, dict.fromkeys(layout.kinds, count + 1), torch.bfloat16, torch.device("cuda"))
    model = Gemma4(spec, weights, 2048)
    for layer, w in zip(spec.layers, weights.layers, strict=True):
        parts = []
        for start, stop in CHUNKS:
            own = per_layer[start:stop, layer.index] if per_layer is not None else None
            batch = chunk_batch(spec, start, stop, tables)
            parts.append(model.decoder_layer(layer, w, stream[layer.index][start:stop], own, batch, pool))
        ours, theirs = torch.cat(parts).float(), stream[layer.index + 1].float()
        error = (ours - theirs).norm() / theirs.norm()
        worst = ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max()
        print(f"{name} layer {layer.index} ({layer.kind.value}): {error:.2e}, worst token {worst:.2e}")
        assert error <= 1e-2, f"layer {layer.index}: relative error {error:.3g}"


@pytest.mark.gpu
@pytest.mark.parametrize("name", CUTS)
@torch.inference_mode()
def test_embedding_and_head(name, tmp_path):
    """Per-layer inputs and logits, the stages outside the layers."""
    spec, weights = build(name, tmp_path)
    ids = torch.randint(0, spec.vocab, (50,), device="cuda")
    model = Gemma4(spec, weights, 2048)
    layout = CacheLayout.of(spec, PAGE, 2)
    tables = {kind: np.arange(1, 5, dtype=np.int32) for kind in layout.kinds}
    pool = KVPool(spec, layout, dict.fromkeys(layout.kinds, 5), torch.bfloat16, torch.device("cuda"))
    batch = chunk_batch(spec, 0, 50, tables)
    batch.token_ids = ids
    ours, theirs = model.forward(batch, pool)[0].float(), plain.forward(spec, weights, ids)[-1].float()
    assert (ours - theirs).norm() / theirs.norm() <= 3e-2  # six layers deep, soft-capped
