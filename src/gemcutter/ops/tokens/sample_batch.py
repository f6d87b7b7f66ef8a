"""SampleBatch: what the rows of one step ask of the sampler, gathered on the host, as tensors on the device.

The common batch, all greedy and without penalties, makes no tensor at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from gemcutter.params import SamplingParams

# Rows with 0 < top_k <= SHORTLIST draw from their SHORTLIST largest logits, found without sorting the row.
# 64 is the checkpoints' own top_k. It also holds every alternative that logprobs may ask for.
SHORTLIST = 64

# Rows drawn at once from the whole vocabulary: some 10 temporaries of 2 MiB a row, at V = 262144.
WIDE_ROWS = 16

_MASK = 2**64 - 1


def uniform_of(seed: int, index: int) -> float:
    """The random number of output token `index` of a request: in [0, 1), 53 bits, from (seed, index) alone.

    Output `index` of a SplitMix64 stream (Steele, Lea, Flood 2014) that starts at the mixed seed, so that
    neighbouring seeds give unrelated streams and nothing depends on what else runs.
    """
    state = _mix(seed & _MASK) + (index + 1) * 0x9E3779B97F4A7C15
    return (_mix(state & _MASK) >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class SampleRow(NamedTuple):
    """One row of logits and whose it is. `params` is resolved: temperature and the like are numbers."""

    params: SamplingParams
    seed: int
    output_index: int  # of the token to draw: 0 for the first after the prompt
    prompt_ids: Sequence[int]  # read only under a repetition penalty
    output_ids: Sequence[int]  # read only under a penalty


@dataclass
class Draw:
    """Rows that are drawn the same way. All [n], float64 but rows."""

    rows: torch.Tensor  # int64
    temperature: torch.Tensor  # > 0
    top_k: torch.Tensor  # inf keeps all
    top_p: torch.Tensor
    min_p: torch.Tensor
    uniform: torch.Tensor  # in [0, 1)


@dataclass
class Edits:
    """Changes of single logits, each at most once; `at` is row * vocab + token, int64."""

    at: torch.Tensor
    value: torch.Tensor  # float32


@dataclass
class SampleBatch:
    """Written by `build`, read by `ops.sample.sample`. None or an empty list: no row needs it."""

    num_rows: int
    any_greedy: bool
    shortlist: Draw | None  # 0 < top_k <= SHORTLIST
    sort: list[Draw]  # top_k over SHORTLIST, or top_p; at most WIDE_ROWS rows each
    whole: list[Draw]  # temperature and min_p alone; at most WIDE_ROWS rows each
    repetition: Edits | None  # positive logits are divided by the value, others multiplied
    addition: Edits | None  # frequency and presence penalties, logit_bias, suppressed tokens: added
    logprobs: list[int | None]  # alternatives wanted by each row; None: not even the chosen token's
    logprob_rows: torch.Tensor | None  # [m] int64: rows whose logprobs is not None

    @classmethod
    def build(
        cls,
        rows: Sequence[SampleRow | tuple],
        vocab: int,
        device: torch.device | str,
        suppress: Sequence[int] = (),
    ) -> "SampleBatch":
        """Gather the rows, in the order of the logits.

        Args:
            rows: SampleRows, or tuples of their fields.
            suppress: tokens that no row may emit (generation_config's suppress_tokens).

        Cost: about 1 us a greedy row; penalised rows walk their prompt and output at each step.
        """
        rows = [SampleRow(*row) for row in rows]
        repetition: dict[int, float] = {}
        addition: dict[int, float] = {}
        shortlist: list[tuple] = []
        sort: list[tuple] = []
        whole: list[tuple] = []
        for number, row in enumerate(rows):
            p, base = row.params, number * vocab
            if not p.greedy:
                # By the row's own parameters alone, so that company never changes its text.
                top_k = p.top_k if p.top_k > 0 else np.inf
                cuts = top_k < np.inf or p.top_p < 1.0
                path = shortlist if top_k <= SHORTLIST else sort if cuts else whole
                uniform = uniform_of(row.seed, row.output_index)
                path.append((number, p.temperature, top_k, p.top_p, p.min_p, uniform))
            if p.repetition_penalty != 1.0:
                seen = set(row.prompt_ids).union(row.output_ids)
                repetition.update((base + token, p.repetition_penalty) for token in seen)
            if p.frequency_penalty or p.presence_penalty:
                for token in row.output_ids:
                    penalty = addition.get(base + token, -p.presence_penalty) - p.frequency_penalty
                    addition[base + token] = penalty
            for token, bias in (p.logit_bias or {}).items():
                assert 0 <= token < vocab, f"logit_bias of token {token} of {vocab}; check at admission"
                addition[base + token] = addition.get(base + token, 0.0) + bias
            for token in suppress:
                addition[base + token] = -np.inf
        logprobs = [row.params.logprobs for row in rows]
        wanted = [number for number, n in enumerate(logprobs) if n is not None]
        return cls(
            num_rows=len(rows),
            any_greedy=len(shortlist) + len(sort) + len(whole) < len(rows),
            shortlist=_draw(shortlist, device) if shortlist else None,
            sort=[_draw(sort[i : i + WIDE_ROWS], device) for i in range(0, len(sort), WIDE_ROWS)],
            whole=[_draw(whole[i : i + WIDE_ROWS], device) for i in range(0, len(whole), WIDE_ROWS)],
            repetition=_edits(repetition, device),
            addition=_edits(addition, device),
            logprobs=logprobs,
            logprob_rows=_sent(np.array(wanted), device) if wanted else None,
        )


def _draw(entries: list[tuple], device: torch.device | str) -> Draw:
    table = _sent(np.array(entries, dtype=np.float64).T.copy(), device)  # one transfer
    return Draw(table[0].long(), *table[1:])


def _sent(values: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """On the device, in its turn: a copy of pageable memory would make the host wait for all that runs there."""
    host = torch.from_numpy(values)
    if torch.device(device).type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def _edits(entries: dict[int, float], device: torch.device | str) -> Edits | None:
    if not entries:
        return None
    at = np.fromiter(entries.keys(), np.int64, len(entries))
    value = np.fromiter(entries.values(), np.float32, len(entries))
    return Edits(_sent(at, device), _sent(value, device))
