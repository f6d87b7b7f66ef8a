"""A model with weights in FP8: against plain.py, and the same bits wherever its rows are quantised."""

import sys

import pytest
import tiny_models
import torch
from forward import PAGE, build, logits_of_all, step_batch
from fp8_weights import LINEARS, quantized
from test_ops_swapped import Case, differing

from gemcutter.cache.layout import CacheLayout
from gemcutter.cache.pool import KVPool
from gemcutter.checkpoint.config import read_spec
from gemcutter.checkpoint.load import load
from gemcutter.model import glm4_moe_plain, plain
from gemcutter.model.models import MODELS
from gemcutter.spec import Family

# What asks how its rows will be read.
PAIRING = "seams.attention_seam", "seams.seam_gate_up", "seams.seam_linear", "linears.gate_up"


@pytest.fixture(scope="module", params=tiny_models.KINDS)
def kind(request, tmp_path_factory):
    """(spec, weights in a dtype) of one kind."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_models.make(request.param).save_pretrained(folder)
    spec = read_spec(folder)
    return spec, lambda dtype: load(spec, folder, torch.device("cpu"), dtype, "auto", 0)


def logits(spec, weights, ids: torch.Tensor) -> torch.Tensor:
    """Of a prompt in one step, all its rows."""
    layout = CacheLayout.of(spec, PAGE, weights.embed.dtype.itemsize)
    pages = layout.num_pages(len(ids))
    pool = KVPool(spec, layout, dict.fromkeys(layout.kinds, pages + 1), weights.embed.dtype, torch.device("cpu"))
    tables = {kind: 1 + torch.arange(pages, dtype=torch.int32)[None].numpy() for kind in layout.kinds}
    batch = step_batch(ids, [(0, len(ids))], tables)
    return logits_of_all(MODELS[spec.family](spec, weights, 512), batch, pool)


def ids_of(spec, length: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, spec.vocab, (length,), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def test_is_plain_in_float32(kind):
    """Both quantise the same rows, but for the last bits of the norms: now and then one turns an e4m3 value.

    So most of many short prompts must agree, where FP8 itself makes a difference in all. Experts stay float32.
    """
    spec, weights = kind[0], kind[1](torch.float32)
    oracle = plain if spec.family is Family.GEMMA4 else glm4_moe_plain
    in_fp8 = quantized(weights, experts=False)
    agreeing = 0
    for seed in range(20):
        ids = ids_of(spec, 3, seed)
        theirs = oracle.forward(spec, in_fp8, ids)
        assert (theirs - oracle.forward(spec, weights, ids)).abs().max() > 0.1
        agreeing += bool((logits(spec, in_fp8, ids) - theirs).abs().max() < 1e-4)
    assert agreeing >= 15


@pytest.mark.parametrize("linears", [LINEARS, ("qkv", "gate_up"), ("o", "down"), ("down",)], ids="-".join)
@pytest.mark.parametrize("layers", [None, (1, 2)], ids=["all", "some layers"])
@torch.inference_mode()
def test_same_bits_wherever_rows_are_quantised(kind, linears, layers, monkeypatch):
    """By the op that makes them, or by their reader; with parts and layers of the model in bfloat16."""
    spec, weights, ids = kind[0], kind[1](torch.bfloat16), ids_of(kind[0], 40)
    in_fp8 = quantized(weights, linears=linears, experts=linears == LINEARS, layers=layers)
    fused = logits(spec, in_fp8, ids)
    for op in (*PAIRING, "seams.add_norm"):
        # By name among modules: in the package's namespace the function of that name hides its module.
        monkeypatch.setattr(sys.modules[f"gemcutter.ops.{op}"], "read_as_pair", lambda reader, dtype: False)
    assert torch.equal(logits(spec, in_fp8, ids), fused)
    assert not torch.equal(logits(spec, weights, ids), fused)


@pytest.mark.gpu
@pytest.mark.parametrize("kind_name", ["26b", "31b"])
@torch.inference_mode()
def test_gpu_same_bits_wherever_rows_are_quantised(kind_name, tmp_path, monkeypatch):
    """Released widths: prompts side by side, then a token of each, then both; and one prompt."""
    spec, weights = build(kind_name, tmp_path)
    weights = quantized(weights, experts=True)
    for lengths in ([1, 9, 200], [200]):
        case = Case(spec, weights, lengths)
        fused = case.run()
        with monkeypatch.context() as patched:
            for op in PAIRING:
                patched.setattr(sys.modules[f"gemcutter.ops.{op}"], "read_as_pair", lambda reader, dtype: False)
            for op, name in (("seam_gate_up", "streams_seam_gate_up"), ("seam_linear", "streams_behind_seam")):
                patched.setattr(sys.modules[f"gemcutter.ops.seams.{op}"], name, lambda *given, **more: False)
            assert not differing(case.run(), fused, spec)
        assert all(step.isfinite().all() for step in fused[0])
