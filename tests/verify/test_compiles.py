"""Kernels compiled for cards that are not there."""

import json
import os
import subprocess
import sys

import pytest

from gemcutter.verify.compiles import TARGETS, compile_op, count_variants, launched_kernels, launches, targets_of

SHARED_LIMIT = 227 * 1024  # of one program on sm_90


@pytest.mark.parametrize("target", TARGETS)
def test_binaries(target):
    binary = "hsaco" if target.startswith("gfx") else "cubin"
    kernels = compile_op("k_eq_v_norm", target)
    assert list(kernels) == ["k_eq_v_norm._k_eq_v_norm_kernel"]
    assert all(len(kernel.asm[binary]) > 1000 for kernel in kernels["k_eq_v_norm._k_eq_v_norm_kernel"])


def test_tells_what_the_compiler_says(monkeypatch):
    monkeypatch.setitem(launches.__globals__, "launches", lambda: {"embed": [lambda: 1 / 0]})
    assert count_variants("embed", "sm_90") == "ZeroDivisionError: division by zero"


def test_divides_and_keeps_denormals_as_pytorch():
    for kernel in compile_op("select_experts", "sm_90")["select_experts._select_kernel"]:
        ptx = kernel.asm["ptx"]
        assert "div.rn.f32" in ptx and "div.full" not in ptx
        assert "mul.ftz" not in ptx and "add.ftz" not in ptx and "div.rn.ftz" not in ptx


def test_finds_the_kernels_that_are_launched():
    found = launched_kernels()
    assert {"rms_norm._rms_norm_kernel", "attend_prefill._prefill_kernel", "experts_tiled._up_kernel"} <= found
    assert not any("mean_square" in name for name in found)  # helpers of kernels


def test_chains_kernels_where_cards_can():
    [kernel] = compile_op("linear", "sm_90")["linear._linear_kernel"][:1]
    assert "griddepcontrol.wait" in kernel.asm["ptx"]
    for kernel in compile_op("linear_hopper", "sm_90")["linear_hopper._stream_kernel"]:
        assert "wgmma" in kernel.asm["ptx"] and kernel.metadata.shared <= SHARED_LIMIT


def test_gate_up_fits_hopper():
    kernels = compile_op("gate_up_hopper", "sm_90")["gate_up_hopper._gate_up_kernel"]
    assert len(kernels) == 4
    for kernel in kernels:
        assert "wgmma" in kernel.asm["ptx"] and kernel.metadata.shared <= SHARED_LIMIT


def test_products_in_fp8_fit_hopper():
    for op, count in (("linear_fp8_hopper", 2), ("gate_up_fp8_hopper", 4), ("linear_hopper", 12)):
        [kernels] = compile_op(op, "sm_90").values()
        assert len(kernels) == count
        for kernel in kernels:
            assert kernel.metadata.shared <= SHARED_LIMIT
            assert "wgmma" in kernel.asm["ptx"] and (op == "linear_hopper" or "e4m3.e4m3" in kernel.asm["ptx"])
    for kernel in compile_op("linear_fp8", "sm_90")["linear_fp8._linear_fp8_kernel"]:
        assert "wgmma" in kernel.asm["ptx"] and "e4m3.e4m3" in kernel.asm["ptx"]


def test_prefill_by_tma_fits_hopper():
    kernels = compile_op("attend_prefill_hopper", "sm_90")["attend_prefill_hopper._prefill_hopper_kernel"]
    assert len(kernels) == 2, "of either head dim"
    for kernel in kernels:
        assert "m64n256k16" in kernel.asm["ptx"] and kernel.metadata.shared <= SHARED_LIMIT


@pytest.mark.slow
def test_attention_fits_hopper():
    kernels = compile_op("attend", "sm_90")
    half = [kernel for kernel in kernels["attend_prefill._prefill_kernel"] if "wgmma" in kernel.asm["ptx"]]
    assert len(half) == 4, "bfloat16 prefill does not run on the tensor cores"
    partial = [kernel for kernel in kernels["attend_decode._partial_kernel"] if "mma.sync" in kernel.asm["ptx"]]
    assert len(partial) == 4, "bfloat16 decode does not run on the tensor cores"
    assert all(kernel.metadata.shared <= SHARED_LIMIT for kernel in kernels["attend_prefill._prefill_kernel"])
    for kernel in kernels["attend_decode._partial_kernel"]:
        assert kernel.metadata.shared <= SHARED_LIMIT
    assert all("cp.async" in kernel.asm["ptx"] for kernel in (*half, *partial)), "loads are not pipelined"


@pytest.mark.slow
def test_every_launched_kernel_compiles_for_every_target():
    command = [sys.executable, "-m", "gemcutter", "verify", "--compile"]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=900)
    found = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and not found["errors"], found["errors"]
    assert set(found["variants"]) >= launched_kernels()
    for kernel, made in found["variants"].items():
        assert set(made) == set(targets_of(kernel)) and min(made.values()) > 0
