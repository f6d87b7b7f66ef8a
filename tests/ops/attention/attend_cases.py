"""Attention problems with a float64 answer, for the reference, the interpreter and the GPU alike.

Everything that no query may see is NaN: the dump page, freed pages, keys behind the window, the tail of the last
page, pages of nobody. The answer over an FP8 cache is that over what the cache stands for.
"""

from dataclasses import dataclass, replace

import torch

from gemcutter.batch import StepBatch
from gemcutter.ops.attention.kv_fp8 import kv_bytes, kv_from_fp8, kv_to_fp8


@dataclass
class Case:
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    batch: StepBatch
    pages: torch.Tensor
    window: int | None
    k: list[torch.Tensor]  # of each sequence, [kv_len, num_kv_heads, D] in the cache's dtype
    v: list[torch.Tensor]
    scale: float
    kv_scales: torch.Tensor | None = None  # of an FP8 cache

    @property
    def args(self) -> tuple:
        return (
            self.q, self.k_cache, self.v_cache, self.batch, self.pages, self.window, self.scale, self.kv_scales,
        )  # fmt: skip


def make_case(
    lengths: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    window: int | None,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    spare_pages: int = 3,
    scale: float = 1.0,
    fp8: bool = False,
) -> Case:
    """lengths: (query tokens, keys held) of each sequence, single queries first. Scaled scores have deviation 3.

    fp8: the cache is one, each of its heads with scales of its own; q is of dtype all the same.
    """
    rng = torch.Generator().manual_seed(seed)
    num_tokens = sum(query for query, _ in lengths)
    num_decodes = next((i for i, (query, _) in enumerate(lengths) if query > 1), len(lengths))

    def draw(*shape: int, deviation: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=rng) * deviation).to(dtype).to(device)

    q = draw(num_tokens, heads, head_dim, deviation=3 / head_dim**0.5 / scale)
    needed = [-(-held // page_size) for _, held in lengths]
    num_pages = 1 + sum(needed) + spare_pages
    ids = (1 + torch.randperm(num_pages - 1, generator=rng)).tolist()  # page 0 is the dump
    shape = (num_pages, kv_heads, page_size, head_dim)
    stored = torch.float8_e4m3fn if fp8 else dtype
    k_cache = torch.full(shape, float("nan"), dtype=stored, device=device)
    v_cache = torch.full(shape, float("nan"), dtype=stored, device=device)
    kv_scales = 2.0 ** torch.randint(-8, 3, (2, kv_heads), generator=rng).to(device) if fp8 else None
    pages = torch.zeros(len(lengths), max(needed) + spare_pages, dtype=torch.int32)
    all_k, all_v = [], []
    for i, (query, held) in enumerate(lengths):
        k, v = draw(held, kv_heads, head_dim), draw(held, kv_heads, head_dim)
        oldest = 0 if window is None else max(0, held - query - window + 1)
        mine = [ids.pop() for _ in range(needed[i])]
        for j in range(oldest // page_size, needed[i]):
            pages[i, j] = mine[j]
        at = torch.arange(oldest, held)
        page, offset = torch.tensor(mine, dtype=torch.long)[at // page_size], at % page_size
        for cache, x, all_x, part in ((k_cache, k, all_k, 0), (v_cache, v, all_v, 1)):
            if fp8:
                x = kv_to_fp8(x, kv_scales[part])
                all_x.append(kv_from_fp8(x.transpose(0, 1), kv_scales[part], dtype).transpose(0, 1))
            else:
                all_x.append(x)
            cache, x = kv_bytes(cache, x)
            cache[page.to(device), :, offset.to(device)] = x[oldest:]
    starts = torch.tensor([0] + [query for query, _ in lengths]).cumsum(0)
    batch = StepBatch(
        token_ids=None,
        positions=None,
        query_start=starts.int().to(device),
        kv_len=torch.tensor([held for _, held in lengths], dtype=torch.int32, device=device),
        logit_rows=None,
        kinds={},
        num_decodes=num_decodes,
        max_query_len=max((query for query, _ in lengths[num_decodes:]), default=0),
        max_kv_len=max(held for _, held in lengths),
    )
    return Case(q, k_cache, v_cache, batch, pages.to(device), window, all_k, all_v, scale, kv_scales)


def alone(case: Case, i: int) -> tuple[tuple, slice]:
    """Arguments of `attend` for sequence i by itself, with a page table just wide enough, and its rows."""
    starts, held = case.batch.query_start.tolist(), int(case.batch.kv_len[i])
    rows = slice(starts[i], starts[i + 1])
    query = rows.stop - rows.start
    decodes = int(i < case.batch.num_decodes)
    batch = replace(
        case.batch,
        query_start=torch.tensor([0, query], dtype=torch.int32, device=case.q.device),
        kv_len=case.batch.kv_len[i : i + 1].clone(),
        num_decodes=decodes,
        max_query_len=0 if decodes else query,
        max_kv_len=held,
    )
    width = -(-held // case.k_cache.shape[2])
    pages = case.pages[i : i + 1, :width].clone()
    return replace(case, q=case.q[rows].clone(), batch=batch, pages=pages).args, rows


def as_it_stands_for(case: Case) -> Case:
    """The same over a cache of q's dtype that holds what the FP8 cache stands for."""
    k_cache, v_cache = (
        torch.stack([kv_from_fp8(page, scale, case.q.dtype) for page in cache])
        for cache, scale in zip((case.k_cache, case.v_cache), case.kv_scales, strict=True)
    )
    return replace(case, k_cache=k_cache, v_cache=v_cache, kv_scales=None)


def visible(query: int, held: int, window: int | None) -> torch.Tensor:
    """[query, held]: what each of the last `query` positions sees, by the definition."""
    pos, key = torch.arange(held - query, held)[:, None], torch.arange(held)[None, :]
    return (key <= pos) & (pos - key < (window or held + 1))


def exact(case: Case) -> torch.Tensor:
    """The answer in float64."""
    out = []
    starts = case.batch.query_start.tolist()
    for i, (k, v) in enumerate(zip(case.k, case.v, strict=True)):
        q = case.q[starts[i] : starts[i + 1]].double()
        group = q.shape[1] // k.shape[1]
        k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("thd,nhd->htn", q, k) * case.scale
        seen = visible(len(q), len(k), case.window).to(q.device)
        out.append(torch.einsum("htn,nhd->thd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(out)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative error norm of the worst row; NaN counts as infinite."""
    worst = ((got.double() - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)).max().item()
    return worst if worst == worst else float("inf")
