"""Run a case over numbers of rows and kinds of inputs, and count the elements that differ."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from gemcutter.verify.case import Case
from gemcutter.verify.compare import Poisoned, count_differing
from gemcutter.verify.inputs import Kind

# Times the bytes that must move: arguments, their float32 draws, two sets of results, and what a reference holds.
FOOTPRINT = 10


@dataclass
class Result:
    case: Case
    compared: int = 0
    different: int = 0
    failures: list[dict] = field(default_factory=list)  # rows, kind, and what differed or was raised
    left_out: list[int] = field(default_factory=list)  # rows that do not fit the device's memory

    @property
    def passed(self) -> bool:
        return not self.failures


def check(
    case: Case,
    rows: Iterable[int],
    device: torch.device,
    advance: Callable[[], None] = lambda: None,
) -> Result:
    """Every kind at every number of rows. advance: called after each."""
    result = Result(case)
    for count in rows:
        if device.type == "cuda" and FOOTPRINT * case.bytes_moved(count) > torch.cuda.mem_get_info(device)[0]:
            torch.cuda.empty_cache()
            if FOOTPRINT * case.bytes_moved(count) > torch.cuda.mem_get_info(device)[0]:
                result.left_out.append(count)
                continue
        for kind in Kind:
            _check_one(result, count, kind, device)
            advance()
    return result


def _check_one(result: Result, rows: int, kind: Kind, device: torch.device) -> None:
    case = result.case
    reference = case.reference if device.type == "cuda" else case.stand_in or case.reference
    want = case.run(reference, case.make(rows, kind, device))
    args = case.make(rows, kind, device)
    result.compared += sum(x.numel() for x in want)
    try:
        with Poisoned():
            got = case.run(case.launch, args)
    except Exception as error:  # whatever a launch raises here is a finding, and the other cases go on
        result.different += sum(x.numel() for x in want)
        result.failures.append(dict(rows=rows, kind=kind.value, raised=f"{type(error).__name__}: {error}"))
        return
    assert len(got) == len(want), f"{case.op} gives {len(got)} tensors, its reference {len(want)}"
    different = [count_differing(g, w) for g, w in zip(got, want, strict=True)]
    if any(different):
        result.different += sum(different)
        result.failures.append(dict(rows=rows, kind=kind.value, different=different))
