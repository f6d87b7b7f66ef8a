"""Inputs for qkv_rope_store and the comparison of kernel and reference; run by itself, in Triton's interpreter."""

import torch

from gemcutter.ops.qkv_rope_store import QkvMode, launch, qkv_rope_store_reference
from gemcutter.ops.rope import rope_table
from gemcutter.spec import RopeSpec


def poisoned(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def make_store(
    heads: int,
    kv_heads: int,
    head_dim: int,
    angles: int,
    mode: QkvMode,
    num_tokens: int,
    page_size: int,
    dtype: torch.dtype,
    device: str = "cpu",
    pad: int = 0,
) -> dict:
    """Arguments by name. Rows differ in size by powers of ten; `pad` NaNs stand between rows."""
    rng = torch.Generator().manual_seed(num_tokens)
    kv_parts = {QkvMode.QKV: 2, QkvMode.Q_KEQV: 1, QkvMode.Q_ONLY: 0}[mode]
    width = (heads + kv_parts * kv_heads) * head_dim
    rows = torch.randn(num_tokens, width, generator=rng)
    rows = rows * 10 ** torch.empty(num_tokens, 1).uniform_(-2, 1, generator=rng)
    qkv = poisoned(num_tokens, width + pad, dtype=dtype, device=device)[:, :width]
    qkv.copy_(rows)
    context = 4000
    num_pages = num_tokens // page_size + 4
    slots = page_size + torch.randperm((num_pages - 1) * page_size, generator=rng)[:num_tokens]
    stores = mode is not QkvMode.Q_ONLY
    weights = [(1 + torch.randn(head_dim, generator=rng) / 2).to(dtype).to(device) for _ in range(2)]
    shape = (num_pages, kv_heads, page_size, head_dim)
    cos, sin = rope_table(RopeSpec(1e4, angles), head_dim, context, dtype, device)
    return dict(
        qkv=qkv,
        q_norm=weights[0],
        k_norm=weights[1] if stores else None,
        cos=cos,
        sin=sin,
        positions=torch.randint(0, context, (num_tokens,), generator=rng).to(device),
        eps=1e-6,
        num_heads=heads,
        num_kv_heads=kv_heads,
        k_cache=poisoned(*shape, dtype=dtype, device=device) if stores else None,
        v_cache=poisoned(*shape, dtype=dtype, device=device) if stores else None,
        slots=slots.to(device) if stores else None,
        mode=mode,
    )


def compare(kernel, reference, args: dict) -> None:
    """The same bits in q and in both caches. Two NaNs, untouched slots, are equal."""
    mine, theirs = args.copy(), args.copy()
    for name in ("k_cache", "v_cache"):
        if args[name] is not None:
            mine[name], theirs[name] = args[name].clone(), args[name].clone()
    pairs = [("q", kernel(**mine), reference(**theirs))]
    pairs += [(name, mine[name], theirs[name]) for name in ("k_cache", "v_cache") if args[name] is not None]
    for name, got, want in pairs:
        assert torch.equal(got.isnan(), want.isnan()), f"{name}: other slots were written"
        wrong = (got != want) & ~want.isnan()
        assert not wrong.any(), f"{args['mode'].name} {name}: {wrong.sum()} of {wrong.numel()} differ"


if __name__ == "__main__":
    for shape in (
        (4, 2, 32, 16, QkvMode.QKV),
        (6, 1, 64, 8, QkvMode.QKV),
        (9, 5, 256, 128, QkvMode.QKV),
        (8, 2, 512, 64, QkvMode.Q_KEQV),
        (8, 2, 512, 64, QkvMode.Q_ONLY),
    ):
        for dtype in (torch.float32, torch.float16):
            compare(launch, qkv_rope_store_reference, make_store(*shape, 7, 16, dtype, pad=8))
    nothing = make_store(4, 2, 32, 16, QkvMode.QKV, 0, 16, torch.float32)
    assert launch(**nothing).shape == (0, 4, 32) and nothing["k_cache"].isnan().all()
