"""What this device reaches in this run: a copy, and a product of large matrices."""

import functools
import time
from typing import NamedTuple

import torch

from gemcutter.bench import timing

GPU_SIDE = 8192  # of the square matrices
CPU_SIDE = 1024
CPU_COPY = 1 << 28  # bytes, past any cache


class Roof(NamedTuple):
    """The two sides of a roofline."""

    bandwidth: float  # bytes/s, read and written together
    flops: float  # FLOP/s


def measure_roof(device: torch.device, dtype: torch.dtype) -> Roof:
    """Medians of several tries; a GPU's in CUDA graphs."""
    side = GPU_SIDE if device.type == "cuda" else CPU_SIDE
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    if device.type == "cuda":
        with torch.cuda.device(device):
            product = functools.partial(_fp8_product if dtype == torch.float8_e4m3fn else torch.matmul, left, right)
            [seconds] = timing.time_graphs([timing.Graph([product] * 4)])
            return Roof(timing.measure_ceiling().bandwidth, 2 * side**3 / seconds)
    source = torch.ones(CPU_COPY, dtype=torch.uint8)
    target = torch.empty_like(source)
    copied, multiplied = _best(lambda: target.copy_(source)), _best(lambda: left @ right)
    return Roof(2 * CPU_COPY / copied, 2 * side**3 / multiplied)


def _fp8_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """With the accumulation that our products have."""
    one = torch.ones((), device=left.device)
    return torch._scaled_mm(left, right.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


def _best(call, tries: int = 5) -> float:
    """Seconds of the fastest try: whatever else runs on a CPU only slows it down."""
    times = []
    for _ in range(1 + tries):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times[1:])
