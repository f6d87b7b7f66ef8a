"""Compile, in several processes at once, what timing would otherwise wait for, one kernel after the other.

Triton, and nvcc for SGLang's CUDA sources, leave their results on disk, where the process that times finds them.
"""

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from gemcutter.bench.peers import PEERS, why_absent
from gemcutter.verify.case import Case
from gemcutter.verify.cases import all_cases
from gemcutter.verify.inputs import Kind

FEWEST = 16  # cases: a process first imports PyTorch and opens the GPU, which takes longer than a few kernels
MOST = 8  # processes: each holds a CUDA context


def compile_ahead(cases: Sequence[Case], counts: Sequence[int], advance: Callable[[], None]) -> None:
    """advance: called after each case."""
    workers = min(MOST, (os.cpu_count() or 1) // 2)
    if len(cases) >= FEWEST and workers > 1:
        # Not forked: CUDA does not survive that.
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            for done in as_completed(pool.submit(_compile, case.op, case.shape, counts) for case in cases):
                done.result()
                advance()
    else:
        for _ in cases:
            advance()


def _compile(op: str, shape: str, counts: Sequence[int]) -> None:
    """Run the bfloat16 case of this name, and its peers. What they raise is found again, and told, later."""
    case = next(c for c in all_cases() if (c.op, c.shape, c.dtype) == (op, shape, torch.bfloat16))
    for count in counts:
        args = case.make(count, Kind.NORMAL, "cuda")
        with contextlib.suppress(Exception):
            case.launch(*args)
        for peer in PEERS.get(op, ()):
            if not any(why_absent(package) for package in peer.needs):
                with contextlib.suppress(Exception):
                    if call := peer.prepare(*args):
                        call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
