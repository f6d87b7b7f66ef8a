"""Sampling: from logits to token ids, each row on its own, the same on every run and in any company.

In this order, as HF: repetition penalty, frequency and presence penalties, logit_bias, temperature, top_k, top_p,
min_p, then the inverse CDF at the row's own random number. A greedy row takes the largest logit. Equal logits,
frequent after a bf16 soft cap, rank by ascending token id, everywhere.

No float is ever summed across tokens: probabilities become integers, 2^40 for the likeliest token, whose sums
are exact in any order. So a token cannot depend on how a device splits a reduction, which varies with the number
of rows. Tokens less than 2^-41 times as likely as the likeliest are never drawn.

A row that holds NaN yields some token id in range, the same each time, and harms no other row. +inf is drawn
for certain, -inf never unless there is nothing else. Plain PyTorch on both devices.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gemcutter.ops.tokens.sample_batch import SHORTLIST, WIDE_ROWS, Draw, SampleBatch

_ONE = 2.0**40  # times up to 2^22 tokens stays below 2^63


@dataclass
class SampleResult:
    token_ids: Tensor  # [R] int64
    batch: SampleBatch
    chosen_logprobs: Tensor | None  # [m] float32: of the token drawn, for batch.logprob_rows
    top_logprobs: Tensor | None  # [m, n] float32, descending; n the most that any row wants
    top_ids: Tensor | None  # [m, n] int64

    def to_host(self) -> "SampleResult":
        """The same in host memory. Its copies run in their turn; who reads it first waits for them."""
        fields = (self.token_ids, self.chosen_logprobs, self.top_logprobs, self.top_ids)
        token_ids, *logprobs = (x if x is None else x.to("cpu", non_blocking=True) for x in fields)
        return SampleResult(token_ids, self.batch, *logprobs)

    def logprobs(self) -> list[dict[int, float] | None]:
        """By row: natural log of the chosen token, then of the alternatives; None where not asked. Waits."""
        found: list[dict[int, float] | None] = [None] * self.batch.num_rows
        if self.chosen_logprobs is None:
            return found
        tokens, chosen = self.token_ids.tolist(), self.chosen_logprobs.tolist()
        values, ids = self.top_logprobs.tolist(), self.top_ids.tolist()
        wanted = [row for row, n in enumerate(self.batch.logprobs) if n is not None]
        for i, row in enumerate(wanted):
            n = self.batch.logprobs[row]
            found[row] = {tokens[row]: chosen[i], **dict(zip(ids[i][:n], values[i][:n], strict=True))}
        return found


def sample(logits: Tensor, batch: SampleBatch) -> SampleResult:
    """Draw one token a row.

    Args:
        logits: [R, V], any float dtype; not changed.

    Returns:
        Token ids, and logprobs where asked: log_softmax of the logits as they came, as vLLM does by default: before
        penalties, bias and temperature.
    """
    assert logits.shape[1] <= 2**22, f"vocabulary of {logits.shape[1]}: sums of weights would overflow"
    assert len(logits) == batch.num_rows, f"{len(logits)} rows of logits for a batch of {batch.num_rows}"
    scores = edited(logits, batch)
    # torch.argmax promises the first of equal maxima.
    tokens = scores.argmax(-1) if batch.any_greedy else logits.new_zeros(len(logits), dtype=torch.int64)
    if (draw := batch.shortlist) is not None:
        best, ids = largest(scores[draw.rows], SHORTLIST)
        tokens[draw.rows] = ids.gather(1, _draw(best, draw)).squeeze(1)
    for draw in batch.sort:
        ordered, ids = scores[draw.rows].sort(dim=-1, descending=True, stable=True)
        tokens[draw.rows] = ids.gather(1, _draw(ordered, draw)).squeeze(1)
    for draw in batch.whole:
        tokens[draw.rows] = _draw(scores[draw.rows], draw).squeeze(1)
    return SampleResult(tokens, batch, *_logprobs(logits, tokens, batch))


def argmax_into(out: Tensor, logits: Tensor, suppressed: Tensor | None) -> None:
    """What `sample` draws where all rows are greedy and want nothing else.

    Args:
        out: [R] int64.
        logits: [R, V]; not changed.
        suppressed: [n] int64, tokens that no row may emit.
    """
    if suppressed is not None:
        logits = logits.clone()
        logits[:, suppressed] += float("-inf")
    torch.argmax(logits, -1, out=out)


def edited(logits: Tensor, batch: SampleBatch) -> Tensor:
    """The logits after penalties and bias, in float; the logits themselves where there are none."""
    if batch.repetition is None and batch.addition is None:
        return logits
    scores = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    flat = scores.view(-1)
    if (edit := batch.repetition) is not None:
        old = flat[edit.at]
        flat[edit.at] = torch.where(old > 0, old / edit.value, old * edit.value)
    if (edit := batch.addition) is not None:
        flat[edit.at] += edit.value
    return scores


def largest(scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest of each row [R, V], descending, equal ones by ascending id: values and int64 ids, [R, n].

    Where fewer than n exist, the rest is -inf at id 0.

    The n largest lie in the n chunks of largest maximum, so two short sorts do for one of the whole row: at
    V = 262144 and n = 64 both have 4096 entries, which PyTorch sorts in one block a row on a GPU.
    """
    num_rows, vocab = scores.shape
    chunk = 64
    padded = max(n, -(-vocab // chunk)) * chunk
    if padded > vocab:
        scores = F.pad(scores, (0, padded - vocab), value=float("-inf"))
    chunks = scores.view(num_rows, -1, chunk)
    ranked = chunks.amax(-1).sort(dim=-1, descending=True, stable=True).indices[:, :n]
    ranked = ranked.sort(-1).values  # ascending ids again, for the stable sort to rank ties by
    offsets = torch.arange(chunk, device=scores.device)
    ids = (ranked[:, :, None] * chunk + offsets).view(num_rows, -1)
    values, order = scores.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, order[:, :n])
    return values[:, :n], torch.where(ids < vocab, ids, 0)


def _draw(scores: Tensor, draw: Draw) -> Tensor:
    """Column [n, 1] drawn from scores [n, C]; rows descend wherever top_k or top_p cut anything off."""
    scores = scores.double()
    ratio = _ratio(scores, scores.amax(-1, keepdim=True), draw.temperature[:, None])
    weight = _weight(ratio)
    rank = torch.arange(scores.shape[1], device=scores.device)
    keep = rank < draw.top_k[:, None]
    weight = torch.where(keep, weight, 0)
    after = weight.cumsum(-1)
    # The smallest set that reaches top_p: a token stays while those before it have not.
    top_p = draw.top_p[:, None]
    keep = (top_p >= 1.0) | ((after - weight).double() < top_p * after[:, -1:].double())
    keep &= ratio >= draw.min_p[:, None]
    after = torch.where(keep, weight, 0).cumsum(-1)
    total = after[:, -1:]
    target = torch.minimum((draw.uniform[:, None] * total.double()).long(), total - 1)
    column = torch.searchsorted(after, target, right=True)
    return torch.where(total > 0, column, 0)


def _ratio(scores: Tensor, peak: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """Probabilities over the likeliest one; 1 at the peak without a subtraction, so that +inf is as good as any."""
    return torch.where(scores == peak, 1.0, ((scores - peak) / temperature).exp())


def _weight(ratio: Tensor) -> Tensor:
    return (ratio.nan_to_num(0.0) * _ONE).round().long()


def _log_sum_exp(scores: Tensor) -> Tensor:
    """[n, 1] float64, the sum one of integers: PyTorch splits a sum of floats by the number of rows on a GPU."""
    scores = scores.double()
    peak = scores.amax(-1, keepdim=True)
    return peak + (_weight(_ratio(scores, peak)).sum(-1, keepdim=True).double() / _ONE).log()


def _logprobs(
    logits: Tensor, tokens: Tensor, batch: SampleBatch
) -> tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]:
    """Of the chosen tokens [m], and the best [m, n] with their ids."""
    rows = batch.logprob_rows
    if rows is None:
        return None, None, None
    norm = torch.cat([_log_sum_exp(logits[some]) for some in rows.split(WIDE_ROWS)])
    scores = logits[rows].float()
    chosen = (scores.gather(1, tokens[rows, None]) - norm).float().squeeze(1)
    n = min(max(count or 0 for count in batch.logprobs), scores.shape[1])
    best, ids = largest(scores, n)
    return chosen, (best - norm).float(), ids
