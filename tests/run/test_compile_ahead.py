"""Kernels compiled before they are launched, for a card that is not there."""

import os
import time

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from gemcutter.run.ahead import compile_ahead


@triton.jit
def _scaled(x_ptr, y_ptr, count, SIZE: tl.constexpr, FACTOR: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < count) * FACTOR, mask=at < count)


@triton.jit
def _broken(x_ptr, SIZE: tl.constexpr):
    tl.static_assert(SIZE == 1, "only one")


@pytest.fixture
def kernels(hopper):
    """Gives the kernels that there are by now."""
    for kernel in (_scaled, _broken):
        kernel.device_caches.pop(hopper, None)
    return lambda: {
        kernel.__name__: list(kernel.device_caches[hopper][0].values()) for kernel in (_scaled, _broken)
    }


def test_compiles_every_variant_once_and_launches_none(kernels):
    x, y = torch.ones(64), torch.zeros(64)
    done = []

    def work(size: int):
        for factor in (2, 3):
            for _ in range(3):
                _scaled[(1,)](x, y, 50, size, factor)
        done.append(size)

    run = JITFunction.run
    compile_ahead([lambda size=size: work(size) for size in (16, 32, 64)])
    assert done == [16, 64, 32] and not y.any() and JITFunction.run is run
    scaled = kernels()["_scaled"]
    assert len(scaled) == 6 and all("scaled" in kernel.asm["ptx"] for kernel in scaled)


def test_one_thread_at_a_time_parses(kernels, monkeypatch):
    x, parsing, most, parse = torch.ones(64), 0, 0, JITFunction.parse

    def slowly(self):
        nonlocal parsing, most
        parsing += 1
        most = max(most, parsing)
        time.sleep(0.05)
        parsing -= 1
        return parse(self)

    monkeypatch.setattr(JITFunction, "parse", slowly)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    compile_ahead([lambda factor=factor: _scaled[(1,)](x, x, 50, 16, factor) for factor in (2, 3, 4, 5)])
    assert len(kernels()["_scaled"]) == 4 and most == 1 and JITFunction.parse is slowly


def test_what_is_on_disk_is_walked_through_no_further(kernels, hopper):
    x, y = torch.ones(64), torch.zeros(64)
    works, done = [], []
    for size in (16, 32, 64):
        works.append(lambda size=size: (done.append(size), _scaled[(1,)](x, y, 50, size, 2)))
    compile_ahead(works)
    _scaled.device_caches.pop(hopper)  # as in another process
    done.clear()
    compile_ahead(works)
    assert done == [16, 64] and len(kernels()["_scaled"]) == 2


def test_a_kernel_that_does_not_compile_says_so_when_it_is_launched(kernels):
    x = torch.ones(4)
    compile_ahead([lambda: _broken[(1,)](x, 2), lambda: _scaled[(1,)](x, x, 4, 4, 5)])
    assert len(kernels()["_scaled"]) == 1
    with pytest.raises(triton.CompilationError, match="only one"):
        _broken[(1,)](x, 2)


def test_a_work_that_fails_stops_nothing(kernels):
    x = torch.ones(4)
    run, works = JITFunction.run, [lambda: _scaled[(1,)](x, x, 4, 4, 7), lambda: 1 / 0]
    with pytest.warns(UserWarning, match="ZeroDivisionError"):
        compile_ahead(works)
    assert JITFunction.run is run and len(kernels()["_scaled"]) == 1
    with pytest.raises(ZeroDivisionError):
        works[1]()
