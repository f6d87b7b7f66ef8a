"""Compile the products' kernels in several processes at once; Triton leaves them on disk for the one that times."""

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from gemcutter.ops.expert_slots import expert_slots
from gemcutter.ops.experts_table import Plan, Shape
from gemcutter.ops.quantize_fp8 import Quantized

MOST = 16  # processes: each holds a CUDA context


def compile_ahead(shape: Shape, dtype: torch.dtype, plans: Sequence[Plan], advance: Callable[[], None]) -> None:
    """advance: called after each plan."""
    workers = max(1, min(MOST, (os.cpu_count() or 1) - 2))
    # Not forked: CUDA does not survive that.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for done in as_completed(pool.submit(_compile, shape, dtype, plan) for plan in plans):
            done.result()
            advance()


def _compile(shape: Shape, dtype: torch.dtype, plan: Plan) -> None:
    """Run it on one token, whose experts are all the first. What it raises is found again, and told, when timed."""
    e, k, h, n = shape
    x, gate_up, down = (_zeros(dtype, *dims) for dims in ((1, h), (e, 2 * n, h), (e, h, n)))
    ids = torch.zeros(1, k, dtype=torch.int64, device="cuda")
    with contextlib.suppress(Exception):
        expert_slots(plan, x, ids, gate_up, down, settled=True)
    torch.cuda.synchronize()


def _zeros(dtype: torch.dtype, *dims: int) -> torch.Tensor | Quantized:
    """One matrix for all experts, so that as many processes as there are find room."""
    zeros = torch.zeros(dims[-2:], dtype=dtype, device="cuda").expand(dims)
    if dtype != torch.float8_e4m3fn:
        return zeros
    return Quantized(zeros, torch.ones(*dims[:-1], 1, device="cuda"))
