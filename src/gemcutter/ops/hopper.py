"""What the kernels for Hopper share: loads by TMA, the barriers that wait for them, and the size of the card."""

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

PROCESSORS = 132  # SMs of an H100 or H200
# Triton 3.6 to 3.8 have them under the longer names, 3.9 only under the shorter.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
barrier = getattr(gl, "thread_barrier", None) or gl.barrier
_KINDS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float8_e4m3fn: gl.float8e4nv}


@gluon.jit
def stage_barriers(STAGES: gl.constexpr):
    """One for each stage of a ring, that waits for what TMA brings there; TMA's unit sees them from now on."""
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
    fence_async_shared()
    return ready


def loads_by_tma(*matrices: torch.Tensor) -> bool:
    """Whether kernels written for Hopper take these: there, of a kind above, rows at multiples of 16 bytes."""
    first = matrices[0]
    if first.dtype not in _KINDS or not first.is_cuda or torch.version.hip is not None:
        return False
    aligned = all(
        matrix.stride(-2) * matrix.itemsize % 16 == 0 and matrix.data_ptr() % 16 == 0 for matrix in matrices
    )
    return aligned and torch.cuda.get_device_capability(first.device) == (9, 0)


def descriptor(matrix: torch.Tensor, block: list[int]) -> TensorDescriptor:
    """For loads of [rows, columns] blocks by TMA; what lies outside the matrix reads as zeros."""
    return TensorDescriptor.from_tensor(matrix, block, _stage_layout(tuple(block), matrix.dtype))


@functools.cache
def _stage_layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), _KINDS[dtype])
