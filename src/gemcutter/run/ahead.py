"""Compile ahead: what some work would launch, on all cores at once, where launching finds kernels one by one.

Triton takes 0.2 to 1 s of one core for a kernel, nine tenths of it outside Python's lock: its passes, LLVM, ptxas.
"""

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import triton
from triton import knobs
from triton.runtime.jit import JITFunction

MOST = 16  # threads; more would wait for the lock


def compile_ahead(works: Sequence[Callable[[], object]]) -> None:
    """Have the kernels of all works, unless those of the first and the last are on disk: then the others' are too,
    and walking through them all would take longer than it saves.
    """
    if compile_all([works[0], works[-1]]):
        compile_all(works[1:-1])


def compile_all(works: Sequence[Callable[[], object]]) -> int:
    """How many kernels were not on disk.

    A work is done without launching a Triton kernel. What PyTorch launches runs, on memory that nobody wrote. A
    kernel that does not compile says so when it is launched. Where a work cannot be done so, the others are left
    and none is counted, for launching compiles as well.
    """
    new = []

    def listen(*, cache_hit: bool, **_) -> None:
        if not cache_hit:
            new.append(1)

    before, knobs.compilation.listener = knobs.compilation.listener, listen
    try:
        with (
            _compile_only(),  # until all are compiled
            ThreadPoolExecutor(min(MOST, os.cpu_count() or 1)) as pool,
            _Mode(pool, ignore_errors=True),
        ):
            for work in works:
                work()
    except Exception as error:
        warnings.warn(
            f"kernels are compiled one by one, since walking through them failed: {error!r}", stacklevel=2
        )
        return 0
    finally:
        knobs.compilation.listener = before
    return len(new)


class _Mode(triton.AsyncCompileMode):
    """Notes a kernel as soon as it is asked for, not when it is compiled: telling that one is known takes 20 µs,
    finding out which it is 100 times that.
    """

    def submit(self, key, compile_fn, finalize_fn, *further):
        kernel = super().submit(key, compile_fn, finalize_fn, *further)
        finalize_fn(kernel)
        return kernel


@contextlib.contextmanager
def _compile_only() -> Iterator[None]:
    """No kernel is launched, and one thread at a time parses: of two at once CPython before 3.11.8 and 3.12.2 may
    end one with "SystemError: AST constructor recursion depth mismatch".
    """
    run, parse, alone = JITFunction.run, JITFunction.parse, threading.Lock()

    def compile_only(self, *args, grid, warmup, **options):
        return run(self, *args, grid=grid, warmup=True, **options)

    def parse_alone(self):
        with alone:
            return parse(self)

    JITFunction.run, JITFunction.parse = compile_only, parse_alone
    try:
        yield
    finally:
        JITFunction.run, JITFunction.parse = run, parse
