"""From the last layer that writes K/V on, a step computes each sequence's last token alone: the bits are the same.

The oracle runs every token through every layer, and takes the last tokens' logits at the end.
"""

import pytest
import tiny_models
import torch
from forward import CUTS, logits_of_all
from fp8_weights import quantized
from test_ops_swapped import Case, differing, real

from gemcutter.checkpoint.config import read_spec
from gemcutter.checkpoint.load import load
from gemcutter.spec import Family


def last_of_all(model, batch, pool) -> torch.Tensor:
    return logits_of_all(model, batch, pool)[batch.query_start[1:].long() - 1][batch.logit_rows]


def check(case: Case, monkeypatch) -> None:
    """Also that so many rows, and no more, went through which layer."""
    model, spec = case.model, case.spec
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", lambda batch, pool: last_of_all(model, batch, pool))
        want = case.run()
    rows: dict[int, list[int]] = {layer.index: [] for layer in spec.layers}
    whole = model.decoder_layer

    place = 3 if spec.family is Family.GEMMA4 else 4  # of the residual among decoder_layer's arguments

    def counted(layer, *others):
        rows[layer.index].append(len(others[place - 1]))
        return whole(layer, *others)

    monkeypatch.setattr(model, "decoder_layer", counted)
    got = case.run()
    assert not differing(got, want, spec)
    assert all(out.isfinite().all() for out in got[0])
    tokens = [sum(stop - start for start, stop in chunks) for chunks in case.steps]
    assert [len(out) for out in got[0]] == [len(chunks) for chunks in case.steps]
    last = max(layer.index for layer in spec.layers if layer.owns_kv)
    for index, seen in rows.items():
        assert seen == (tokens if index < last else [len(chunks) for chunks in case.steps]), index


@pytest.mark.parametrize("numbers", ["float32", "bfloat16", "fp8"])
@pytest.mark.parametrize("kind", tiny_models.KINDS)
@torch.inference_mode()
def test_same_bits_as_with_every_token(kind, numbers, tmp_path, monkeypatch):
    tiny_models.make(kind).save_pretrained(tmp_path)
    spec = read_spec(tmp_path)
    dtype = torch.float32 if numbers == "float32" else torch.bfloat16
    weights = load(spec, tmp_path, torch.device("cpu"), dtype, "auto", 0)
    if numbers == "fp8":
        weights = quantized(weights, experts=True)
    check(Case(spec, weights, [1, 9, 40, 2, 17]), monkeypatch)


@pytest.mark.parametrize("kind", ["dense", "ple_shared", "glm"])
@torch.inference_mode()
def test_in_the_middle_of_prompts_all_ends_with_the_last_kv(kind, tmp_path, monkeypatch):
    """The tokens decoded after it see the same K/V, and the layers from there on nothing."""
    tiny_models.make(kind).save_pretrained(tmp_path)
    spec = read_spec(tmp_path)
    case = Case(spec, load(spec, tmp_path, torch.device("cpu"), torch.float32, "auto", 0), [9, 40])
    case.steps = case.steps[:2]
    (_, want), want_pool = case.run()
    forward, layer_of, layers = case.model.forward, case.model.decoder_layer, []

    def noted(layer, *others):
        layers.append(layer.index)
        return layer_of(layer, *others)

    def undrawn(batch, pool):
        if batch.has_prompts:
            batch.logit_rows = batch.logit_rows[:0]
        return forward(batch, pool)

    monkeypatch.setattr(case.model, "decoder_layer", noted)
    monkeypatch.setattr(case.model, "forward", undrawn)
    (nothing, got), pool = case.run()
    assert nothing.shape == (0, spec.vocab) and nothing.dtype == got.dtype
    assert not differing(([got], pool), ([want], want_pool), spec)
    assert layers == [*range(spec.last_kv_owner), *range(len(spec.layers))]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["carat", "carat-edge", *CUTS])
@torch.inference_mode()
def test_gpu_same_bits_as_with_every_token(name, tmp_path, monkeypatch):
    check(Case(*real(name, tmp_path), [1, 3, 50, 17, 1100]), monkeypatch)
