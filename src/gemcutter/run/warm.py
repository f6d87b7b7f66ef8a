"""Warm-up: compile every kernel variant at start, not under the first request (which waited 0.5 s for it)."""

import functools

import torch
from rich.progress import track

from gemcutter.batch import KindBatch, StepBatch
from gemcutter.cache.pool import KVPool
from gemcutter.model.models import Model
from gemcutter.run.ahead import compile_ahead

PROMPTS = 128  # at most, and half as many as tokens: layers that see last tokens only get as many rows


@torch.inference_mode()
def warm_up(model: Model, pool: KVPool, max_tokens: int, page_size: int, progress: bool) -> None:
    """Prefill made-up prompts of 2, 4, 8 … tokens up to `max_tokens`; kernels choose their tiles by such buckets.

    The prompts live in page 0, which belongs to nobody.
    """

    def prefill(size: int) -> None:
        model.forward(_prompts(model, min(size // 2, PROMPTS), size, page_size), pool)

    sizes = [2**i for i in range(1, max_tokens.bit_length())]
    compile_ahead([functools.partial(prefill, size) for size in reversed(sizes)])
    for size in track(sizes, "Compiling kernels", disable=not progress, transient=True):
        prefill(size)
    torch.cuda.synchronize(model.weights.embed.device)


def _prompts(model: Model, count: int, size: int, page_size: int) -> StepBatch:
    """So many prompts, powers of two, of `size` tokens together."""
    device, each = model.weights.embed.device, size // count
    zeros = torch.zeros(size, dtype=torch.int64, device=device)
    pages = torch.zeros(count, -(-each // page_size), dtype=torch.int32, device=device)
    where = KindBatch(pages=pages, slots=zeros)
    return StepBatch(
        token_ids=zeros,
        positions=torch.arange(each, device=device).repeat(count),
        query_start=torch.arange(0, size + 1, each, dtype=torch.int32, device=device),
        kv_len=torch.full((count,), each, dtype=torch.int32, device=device),
        logit_rows=zeros[:1],
        kinds={layer.kind: where for layer in model.spec.layers},
        num_decodes=0,
        max_query_len=each,
        max_kv_len=each,
    )
