"""The attention kernels compiled for Hopper, no card needed: they fit an SM and use its tensor cores."""

import pytest
import torch
from triton import compile as triton_compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gemcutter.ops.attend_decode import ROWS, SPLIT, _partial_kernel, decode_tile
from gemcutter.ops.attend_prefill import _prefill_kernel, prefill_tile

SHARED_LIMIT = 227 * 1024  # of one program on sm_90
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def compiled(kernel, tile: dict, dtype: torch.dtype, constants: dict):
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    constants = constants | tile | dict(PAGE=16, PRECISION="ieee" if dtype == torch.float32 else "tf32")
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("q_ptr", "k_ptr", "v_ptr", "out_ptr"):
            signature[name] = "*" + NAMES[dtype]
        elif name in ("part_ptr", "top_ptr", "total_ptr"):
            signature[name] = "*fp32"
        else:
            signature[name] = "*i32" if name.endswith("_ptr") else "i32"
        if name.endswith("_ptr") or name == "page_stride":
            attributes[(i,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    return triton_compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("group, kv_heads, head_dim, window", [(2, 8, 256, 1024), (8, 2, 512, 0), (4, 1, 64, 0)])
def test_kernels_fit_hopper(group, kv_heads, head_dim, window, dtype):
    shape = dict(GROUP=group, KV_HEADS=kv_heads, D=head_dim, WINDOW=window)
    prefill = compiled(_prefill_kernel, prefill_tile(dtype, head_dim), dtype, shape)
    decode = compiled(_partial_kernel, decode_tile(dtype, head_dim), dtype, shape | dict(SPLIT=SPLIT, ROWS=ROWS))
    assert prefill.metadata.shared <= SHARED_LIMIT
    assert decode.metadata.shared <= SHARED_LIMIT / 2, "two programs should share an SM"
    if dtype != torch.float32:
        assert "wgmma.mma_async" in prefill.asm["ptx"]
        assert "mma.sync" in decode.asm["ptx"]
        assert all("cp.async" in kernel.asm["ptx"] for kernel in (prefill, decode)), "loads are not pipelined"
