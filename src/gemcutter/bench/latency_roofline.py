"""Floors beside what was measured, part by part."""

from dataclasses import dataclass

from gemcutter.bench.latency import PROFILED_STEPS, Latency
from gemcutter.bench.latency_profile import Steps
from gemcutter.bench.roof import Roof
from gemcutter.model import cost
from gemcutter.model.cost import Part, Work
from gemcutter.spec import ModelSpec


@dataclass(frozen=True)
class Row:
    """One part of a step."""

    part: Part
    launches: float  # in one step
    bytes: float | None  # that must move; None where cost.step_work has no floor
    flops: float | None
    floor: float | None  # s
    measured: float  # s
    share: float  # of the measured times of all parts


@dataclass(frozen=True)
class Roofline:
    """A decode step, or the prefill of a batch."""

    rows: list[Row]
    floor: float  # s, of the whole: bytes that must move, activations left out, or FLOPs, whichever takes longer
    wall: float  # s, as the engine's caller saw it when nothing was profiled

    @property
    def measured(self) -> float:
        """Of all parts together; more than `wall` where kernels overlap, less where the device waits."""
        return sum(row.measured for row in self.rows)


def decode_roofline(
    spec: ModelSpec, latency: Latency, batch: int, element: int, kv_element: int, roof: Roof
) -> Roofline:
    """Of one step. Bytes of a weight, and of a value in the cache."""
    work = cost.step_work(spec, batch, 1, latency.context, element, kv_element)
    moved = cost.decode_bytes(spec, batch, latency.context, element, kv_element)
    flops = sum(part.flops for part in work.values())
    rows = _rows(work, latency.decode, PROFILED_STEPS, roof)
    return Roofline(rows, Work(moved, flops).seconds(*roof), latency.tpot)


def prefill_roofline(
    spec: ModelSpec, latency: Latency, batch: int, input_len: int, element: int, kv_element: int, roof: Roof
) -> Roofline:
    """Of all steps until every request has a token."""
    work = cost.step_work(spec, batch, input_len, input_len, element, kv_element)
    moved = cost.prefill_bytes(spec, batch, input_len, element)
    flops = sum(part.flops for part in work.values())
    return Roofline(_rows(work, latency.prefill, 1, roof), Work(moved, flops).seconds(*roof), latency.ttft)


def _rows(work: dict[Part, Work], steps: Steps, count: int, roof: Roof) -> list[Row]:
    """In the order of Part; parts that neither ran nor must are left out."""
    seconds, launches = steps.seconds(), steps.launches()
    whole = sum(seconds.values())
    rows = []
    for part in Part:
        needed = work.get(part)
        if part not in seconds and (needed is None or not any(needed)):
            continue
        measured = seconds.get(part, 0.0)
        rows.append(
            Row(
                part,
                launches.get(part, 0) / count,
                needed and needed.bytes,
                needed and needed.flops,
                needed and needed.seconds(*roof),
                measured / count,
                measured / whole if whole else 0.0,
            )
        )
    return rows
