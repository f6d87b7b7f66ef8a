"""From bytes to pages: how a memory budget is shared between full and sliding pages."""

from bisect import bisect_right
from dataclasses import dataclass

from gemcutter.cache.layout import CacheLayout
from gemcutter.spec import Kind

PREFIX_SHARE = 4  # sliding pages get 1/4 more than running requests can hold, for reusable prefixes


@dataclass(frozen=True)
class CacheSize:
    """Pages of each kind, the dump page 0 included, and the longest request they are sure to hold."""

    pages: dict[Kind, int]
    context_length: int  # tokens of prompt and answer


def size_cache(
    layout: CacheLayout,
    budget: int,
    *,
    model_context: int,
    context_length: int | None,
    max_running_requests: int,
    chunked_prefill_size: int,
    max_prefill_tokens: int,
    max_total_tokens: int | None = None,
) -> CacheSize:
    """Share `budget` bytes between the kinds.

    Sliding pages come first: a window for each of max_running_requests and the prompt tokens that one step
    prefills, which is all that the planner can ask for at once, and a part of that for reusable prefixes. They
    take at most half of the bytes where there are full layers, unless one request alone needs more. Full pages
    get the rest, up to what max_running_requests of context_length use, and up to max_total_tokens.

    Both kinds hold at least one request of context_length. The planner's preemption rests on this: the oldest
    request can always go on once all others are put back.

    Args:
        budget: bytes for K and V of all layers.
        model_context: positions the model knows.
        context_length: tokens wanted; None takes what the model knows and the cache holds.
        max_total_tokens: most tokens in full pages; None leaves it to the budget.

    Raises:
        ValueError: one request of context_length does not fit.
    """
    chunk = min(chunked_prefill_size, max_prefill_tokens)
    most_full = layout.num_pages(model_context)
    if max_total_tokens is not None:
        most_full = max_total_tokens // layout.page_size
    budget = max(0, budget - sum(layout.page_bytes.values()))  # the dumps

    def sliding_pages(context: int) -> int:
        alone = layout.one_request(context, chunk)[Kind.SLIDING]
        windows = max_running_requests * min(layout.num_pages(context), layout.num_pages(layout.window) + 2)
        prompts = min(max_running_requests * chunk, max_prefill_tokens) // layout.page_size
        wanted = (windows + prompts) + (windows + prompts) // PREFIX_SHARE
        room = budget // 2 if Kind.FULL in layout.kinds else budget
        return max(alone, min(wanted, room // layout.page_bytes[Kind.SLIDING]))

    def cost(context: int) -> int:
        """Bytes of the smallest cache that holds one request."""
        pages = layout.one_request(context, chunk)
        return sum(count * layout.page_bytes[kind] for kind, count in pages.items())

    def longest() -> int:
        """Tokens of the longest request that the budget holds."""
        limit = layout.num_pages(model_context)
        if Kind.FULL in layout.kinds:
            limit = min(limit, most_full)
        pages = bisect_right(range(1, limit + 1), budget, key=lambda count: cost(count * layout.page_size))
        return min(model_context, pages * layout.page_size)

    fits = longest()
    if context_length is None:
        context = fits
        if Kind.FULL in layout.kinds and Kind.SLIDING in layout.kinds:
            left = budget - sliding_pages(fits) * layout.page_bytes[Kind.SLIDING]
            usual = left // layout.page_bytes[Kind.FULL] * layout.page_size
            context = min(fits, usual) if usual > 0 else fits
    else:
        context = context_length
    if context_length is not None and context_length > model_context:
        raise ValueError(
            f"context_length {context_length} is more than the {model_context} positions of the model; "
            f"lower it to {model_context} or leave it out"
        )
    if context > fits or context < 2:
        raise ValueError(
            f"the KV cache holds one request of at most {fits} tokens, context_length asks for "
            f"{context_length or 'at least 2'}: {budget} bytes of cache, chunked_prefill_size {chunk}, "
            f"max_total_tokens {max_total_tokens}; lower context_length or chunked_prefill_size, or raise "
            "max_total_tokens or the memory left for the cache (mem_fraction_static)"
        )

    least = layout.one_request(context, chunk)
    pages = {}
    if Kind.SLIDING in layout.kinds:
        kept = least.get(Kind.FULL, 0) * layout.page_bytes.get(Kind.FULL, 0)
        most = (budget - kept) // layout.page_bytes[Kind.SLIDING]
        pages[Kind.SLIDING] = min(sliding_pages(context), most)
    if Kind.FULL in layout.kinds:
        left = budget - sum(count * layout.page_bytes[kind] for kind, count in pages.items())
        usable = max_running_requests * layout.num_pages(context)
        pages[Kind.FULL] = min(left // layout.page_bytes[Kind.FULL], usable)
        if max_total_tokens is not None:
            pages[Kind.FULL] = min(pages[Kind.FULL], most_full)
    for kind, count in least.items():
        assert pages[kind] >= count, f"{pages[kind]} {kind.value} pages, one request needs {count}"
    return CacheSize({kind: pages[kind] + 1 for kind in layout.kinds}, context)
