"""From the last layer that writes K/V on, a step computes each sequence's last token alone: the bits are the same.

The oracle runs every token through every layer, and takes the last tokens' logits at the end.
"""

import pytest
import tiny_models
import torch
from forward import CUTS
from test_ops_swapped import Case, differing, real

from gemcutter.checkpoint.config import read_spec
from gemcutter.checkpoint.load import load
from gemcutter.ops.embed import embed
from gemcutter.ops.logits import logits
from gemcutter.ops.rms_norm import rms_norm


def with_every_token(model, batch, pool) -> torch.Tensor:
    spec, w = model.spec, model.weights
    hidden = embed(batch.token_ids, w.embed, spec.hidden**0.5)
    per_layer = model._per_layer_inputs(batch, hidden) if w.per_layer is not None else None
    normed = rms_norm(hidden, w.layers[0].input_norm, spec.eps)
    next_norms = [*(following.input_norm for following in w.layers[1:]), w.norm]
    for layer, layer_weights, next_norm in zip(spec.layers, w.layers, next_norms, strict=True):
        own = per_layer[:, layer.index] if per_layer is not None else None
        hidden, normed = model.decoder_layer(layer, layer_weights, next_norm, hidden, normed, own, batch, pool)
    return logits(normed[batch.query_start[1:].long() - 1][batch.logit_rows], w.head, spec.softcap)


def check(case: Case, monkeypatch) -> None:
    """Also that so many rows, and no more, went through which layer."""
    model, spec = case.model, case.spec
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", lambda batch, pool: with_every_token(model, batch, pool))
        want = case.run()
    rows: dict[int, list[int]] = {layer.index: [] for layer in spec.layers}
    whole = model.decoder_layer

    def counted(layer, w, next_norm, hidden, *others):
        rows[layer.index].append(len(hidden))
        return whole(layer, w, next_norm, hidden, *others)

    monkeypatch.setattr(model, "decoder_layer", counted)
    got = case.run()
    assert not differing(got, want, spec)
    assert all(out.isfinite().all() for out in got[0])
    tokens = [sum(stop - start for start, stop in chunks) for chunks in case.steps]
    assert [len(out) for out in got[0]] == [len(chunks) for chunks in case.steps]
    last = max(layer.index for layer in spec.layers if layer.owns_kv)
    for index, seen in rows.items():
        assert seen == (tokens if index < last else [len(chunks) for chunks in case.steps]), index


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", tiny_models.KINDS)
@torch.inference_mode()
def test_same_bits_as_with_every_token(kind, dtype, tmp_path, monkeypatch):
    tiny_models.make(kind).save_pretrained(tmp_path)
    spec = read_spec(tmp_path)
    weights = load(spec, tmp_path, torch.device("cpu"), dtype, "auto", 0)
    check(Case(spec, weights, [1, 9, 40, 2, 17]), monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["carat", "carat-edge", *CUTS])
@torch.inference_mode()
def test_gpu_same_bits_as_with_every_token(name, tmp_path, monkeypatch):
    check(Case(*real(name, tmp_path), [1, 3, 50, 17, 1100]), monkeypatch)
