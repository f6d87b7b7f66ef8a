"""Dummy weights: their distribution, their seeds, and that nothing but the config is needed."""

import json
import time
from dataclasses import replace

import pytest
import tiny_models
import torch
from fp8_checkpoints import quantization_config
from test_checkpoint_config import COMMON, RELEASED, write

from gemcutter.checkpoint.config import read_spec
from gemcutter.checkpoint.dummy import dummy_weights
from gemcutter.checkpoint.files import CheckpointError
from gemcutter.checkpoint.linears import TEXT_ONLY
from gemcutter.checkpoint.load import load
from gemcutter.checkpoint.table import pieces
from gemcutter.ops.quantize_fp8 import Quantized, quantize_fp8

CPU = torch.device("cpu")


def tensors(spec, weights):
    return pieces(spec, weights, TEXT_ONLY)


@pytest.fixture(params=["moe", "ple_double_wide"])
def spec(request, tmp_path):
    return read_spec(write(tmp_path, COMMON | tiny_models.GEMMA[request.param]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_are_normal_and_vectors_one(spec, dtype, monkeypatch):
    monkeypatch.setattr("gemcutter.checkpoint.dummy.CHUNK", 1000)
    weights = dummy_weights(spec, CPU, dtype, seed=3)
    samples = []
    for name, view in tensors(spec, weights).items():
        assert view.dtype == dtype
        if view.dim() == 1:
            assert view.eq(1.0).all(), name
            continue
        sample = view.double().flatten()
        n = sample.numel()
        assert abs(sample.mean()) < 5 * 0.02 / n**0.5, name
        assert abs(sample.std() - 0.02) < 5 * 0.02 / (2 * n) ** 0.5 + 1e-5, name
        assert sample.unique().numel() > n // (2 if dtype == torch.float32 else 100), name
        samples.append(sample[:64])
    distinct = {tuple(sample.tolist()) for sample in samples}
    assert len(distinct) == len(samples), "two tensors were drawn from one seed"


def test_same_seed_same_weights(spec):
    first, again, other = (tensors(spec, dummy_weights(spec, CPU, torch.float32, seed)) for seed in (0, 0, 10**6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if first[name].dim() > 1)
    dummy_weights(spec, CPU, torch.float32, seed=-(2**63)), dummy_weights(spec, CPU, torch.float32, seed=2**64)


@pytest.mark.parametrize("chunk", [1000, 2**27])
@pytest.mark.parametrize("kind", ["moe", "ple_double_wide"])
def test_what_is_in_fp8_is_drawn_alike_and_quantised(kind, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr("gemcutter.checkpoint.dummy.CHUNK", chunk)
    config = COMMON | tiny_models.GEMMA[kind] | {"quantization_config": quantization_config()}
    spec = read_spec(write(tmp_path, config))
    plain, mixed = (
        tensors(each, dummy_weights(each, CPU, torch.bfloat16, 3))
        for each in (replace(spec, quantized=frozenset()), spec)
    )
    in_fp8 = {name for name, view in mixed.items() if isinstance(view, Quantized)}
    assert len(in_fp8) == {"moe": 4 * 8 + 3, "ple_double_wide": 7 * 5 + 6 + 7 * 2 + 1}[kind]
    for name in plain.keys() - in_fp8:
        assert torch.equal(plain[name], mixed[name]), name
    for name in in_fp8:
        q, scale = quantize_fp8(plain[name].flatten(0, -2))
        assert torch.equal(mixed[name].q.flatten(0, -2).view(torch.uint8), q.view(torch.uint8)), name
        assert torch.equal(mixed[name].scale.flatten(0, -2), scale), name


def test_dummy_needs_only_the_config(tmp_path):
    folder = write(tmp_path, COMMON | tiny_models.GEMMA["dense"])
    spec = read_spec(folder)
    weights = load(spec, folder, CPU, torch.bfloat16, "dummy", 0)
    assert weights.head is weights.embed and weights.embed.dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="no .safetensors file"):
        load(spec, folder, CPU, torch.bfloat16, "auto", 0)


@pytest.mark.parametrize("memory", [40 * 2**30, 60 * 2**30], ids=["known at once", "found out"])
def test_out_of_memory_says_how_much_is_needed(memory, tmp_path, monkeypatch):
    def fail(*args):
        assert memory > 47 * 2**30, "tried what cannot fit"
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("gemcutter.checkpoint.load._memory", lambda device: memory)
    monkeypatch.setattr("gemcutter.checkpoint.load.dummy_weights", fail)
    spec = read_spec(write(tmp_path, RELEASED["26b"]))
    with pytest.raises(CheckpointError, match=r"need 47.0 GiB in torch.bfloat16, more than cpu has free"):
        load(spec, tmp_path, CPU, torch.bfloat16, "dummy", 0)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_model_beyond_any_memory_is_refused(load_format, tmp_path):
    huge = {"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 1}
    spec = read_spec(write(tmp_path, COMMON | tiny_models.GEMMA["dense"] | huge))
    with pytest.raises(CheckpointError, match="more than cpu has free"):
        load(spec, tmp_path, CPU, torch.float32, load_format, 0)


@pytest.mark.gpu
def test_dummy_26b_is_quick_on_a_gpu(tmp_path):
    spec = read_spec(write(tmp_path, RELEASED["26b"]))
    device = torch.device("cuda")
    torch.zeros(1, device=device)
    started = time.perf_counter()
    weights = dummy_weights(spec, device, torch.bfloat16, seed=0)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    assert seconds < 10
    assert torch.cuda.max_memory_allocated() < 1.02 * 2 * 25.24e9, "a second copy was made"
    assert weights.layers[29].experts.gate_up.float().std().item() == pytest.approx(0.02, rel=0.01)
    print(json.dumps({"dummy_26b_seconds": seconds}))


@pytest.mark.gpu
def test_load_to_a_gpu_equals_load_to_the_cpu(tmp_path):
    tiny_models.make("moe", dtype=torch.bfloat16).save_pretrained(tmp_path, max_shard_size="100KB")
    spec = read_spec(tmp_path)
    for dtype in (torch.bfloat16, torch.float32):
        there, here = (
            tensors(spec, load(spec, tmp_path, torch.device(name), dtype, "auto", 0)) for name in ("cuda", "cpu")
        )
        assert all(torch.equal(there[name].cpu(), here[name]) for name in here)


@pytest.mark.gpu
def test_dummy_26b_in_fp8_takes_a_gib_more_than_its_weights(tmp_path):
    spec = read_spec(write(tmp_path, RELEASED["26b"] | {"quantization_config": quantization_config()}))
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    weights = dummy_weights(spec, device, torch.bfloat16, seed=0)
    peak = torch.cuda.max_memory_allocated() - before
    assert 26.0e9 < peak < 26.1e9 + 2**30
    experts = weights.layers[29].experts
    sample = experts.gate_up.q[127].float() * experts.gate_up.scale[127]
    assert sample.std().item() == pytest.approx(0.02, rel=0.01)
