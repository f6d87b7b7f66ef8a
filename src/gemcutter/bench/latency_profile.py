"""What the profiler saw of some steps: kernels on a GPU, the outermost ops on a CPU."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gemcutter.bench.kernels import parts_of
from gemcutter.model.cost import Part


class Ran(NamedTuple):
    """One kernel or op."""

    name: str
    start: float  # s
    seconds: float


class Steps:
    """Filled when the block of `watch` ends."""

    def __init__(self) -> None:
        self.ran: list[Ran] = []

    def seconds(self) -> dict[Part, float]:
        """Time of each part, over all steps; kernels that overlap count in full."""
        total: Counter[Part] = Counter()
        for part, one in zip(parts_of([one.name for one in self.ran]), self.ran, strict=True):
            total[part] += one.seconds
        return dict(total)

    def launches(self) -> dict[Part, int]:
        return dict(Counter(parts_of([one.name for one in self.ran])))


@contextlib.contextmanager
def watch(device: torch.device) -> Iterator[Steps]:
    """Profile what the block launches. On a GPU only its own side is recorded: the host is not slowed down."""
    steps = Steps()
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.synchronize(device)  # what was launched before is not the block's
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        yield steps
        if gpu:
            torch.cuda.synchronize(device)
    for event in profiler.events():
        if gpu and (event.device_type != DeviceType.CUDA or event.is_user_annotation):
            continue
        if not gpu and event.cpu_parent is not None:
            continue
        span = event.time_range
        steps.ran.append(Ran(event.name, 1e-6 * span.start, 1e-6 * (span.end - span.start)))
    if not steps.ran:
        raise RuntimeError("the profiler saw nothing run; does this machine let a user count kernels (CUPTI)?")
    steps.ran.sort(key=lambda one: one.start)
