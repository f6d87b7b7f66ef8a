"""Inputs for qkv_rope_store and the comparison of kernel and reference; run by itself, in Triton's interpreter."""

import torch

from gemcutter.ops.attention.qkv_rope_store import (
    KV_PARTS,
    QkvMode,
    qkv_rope_store_launch,
    qkv_rope_store_reference,
)
from gemcutter.ops.attention.rope import rope_table
from gemcutter.spec import RopeSpec
from gemcutter.verify.compare import POISON, count_differing
from gemcutter.verify.inputs import Draw, Kind


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
    kind: Kind = Kind.NORMAL,
    fp8: bool = False,
) -> dict:
    """Arguments by name. Every head is of that kind; `pad` NaNs stand between rows, POISON in the caches.

    fp8: the caches are; every head has scales of its own, with some of which values overflow, or vanish.
    """
    all_heads = heads + KV_PARTS[mode] * kv_heads
    drawn = Draw(num_tokens * all_heads, kind, dtype, device).rows(head_dim).view(num_tokens, all_heads * head_dim)
    qkv = torch.full((num_tokens, all_heads * head_dim + pad), float("nan"), dtype=dtype, device=device)
    qkv = qkv[:, : all_heads * head_dim].copy_(drawn)
    draw = Draw(num_tokens, Kind.NORMAL, dtype, device)
    stores = mode is not QkvMode.Q_ONLY
    context, num_pages = 4000, num_tokens // page_size + 4
    slots = page_size + draw.permutation((num_pages - 1) * page_size)[:num_tokens]
    shape, stored = (num_pages, kv_heads, page_size, head_dim), torch.float8_e4m3fn if fp8 else dtype
    k_cache, v_cache = (torch.full(shape, POISON, dtype=stored, device=device) for _ in range(2))
    powers = torch.randint(-15, 8, (2, kv_heads), generator=torch.Generator().manual_seed(num_tokens))
    cos, sin = rope_table(RopeSpec(1e4, angles), head_dim, context, dtype, device)
    return dict(
        qkv=qkv,
        q_norm=draw.weight(head_dim),
        k_norm=draw.weight(head_dim) if stores else None,
        cos=cos,
        sin=sin,
        positions=draw.token_ids(context),
        eps=1e-6,
        num_heads=heads,
        num_kv_heads=kv_heads,
        k_cache=k_cache if stores else None,
        v_cache=v_cache if stores else None,
        slots=slots if stores else None,
        mode=mode,
        kv_scales=2.0 ** powers.to(device) if fp8 and stores else None,
    )


def compare(kernel, reference, args: dict) -> None:
    """The same bits in q and everywhere in both caches, 0.0 and -0.0 apart; a NaN equals a NaN."""
    mine, theirs = args.copy(), args.copy()
    for name in ("k_cache", "v_cache"):
        if args[name] is not None:
            mine[name], theirs[name] = args[name].clone(), args[name].clone()
    pairs = [("q", kernel(**mine), reference(**theirs))]
    pairs += [(name, mine[name], theirs[name]) for name in ("k_cache", "v_cache") if args[name] is not None]
    for name, got, want in pairs:
        wrong = count_differing(got, want)
        assert wrong == 0, f"{args['mode'].name} {name}: {wrong} of {want.numel()} differ"


def main() -> None:
    empty = torch.empty
    torch.empty = lambda *args, **kwargs: empty(*args, **kwargs).fill_(POISON)  # q, if the kernel leaves some out
    shapes = [
        (4, 2, 32, 16, QkvMode.QKV),
        (6, 1, 64, 8, QkvMode.QKV),
        (3, 1, 256, 128, QkvMode.QKV),
        (2, 1, 512, 64, QkvMode.Q_KEQV),
        (2, 1, 512, 64, QkvMode.Q_ONLY),
    ]
    for shape in shapes:
        for kind, dtype in [(kind, torch.bfloat16) for kind in Kind] + [
            (Kind.INF, torch.float32), (Kind.HEAVY, torch.float32), (Kind.HEAVY, torch.float16)
        ]:  # fmt: skip
            args = make_store(*shape, 3, 16, dtype, pad=8, kind=kind)
            compare(qkv_rope_store_launch, qkv_rope_store_reference, args)
    for shape in shapes:
        for kind, dtype in [(kind, torch.bfloat16) for kind in Kind] + [(Kind.HEAVY, torch.float32)]:
            args = make_store(*shape, 3, 16, dtype, pad=8, kind=kind, fp8=True)
            compare(qkv_rope_store_launch, qkv_rope_store_reference, args)
    for shape, num_tokens in ((shapes[0], 515), (shapes[3], 703)):  # up to 2^20 dims and over, last tiles not full
        args = make_store(*shape, num_tokens, 16, torch.bfloat16, kind=Kind.HEAVY)
        compare(qkv_rope_store_launch, qkv_rope_store_reference, args)
    nothing = make_store(*shapes[0], 0, 16, torch.float32)
    assert qkv_rope_store_launch(**nothing).shape == (0, 4, 32) and (nothing["k_cache"] == POISON).all()
    odd = make_store(2, 1, 80, 20, QkvMode.QKV, 3, 16, torch.bfloat16, pad=8)  # no tile of that width: unfused
    compare(qkv_rope_store_launch, qkv_rope_store_reference, odd)
    odd = make_store(2, 1, 80, 20, QkvMode.QKV, 3, 16, torch.bfloat16, pad=8, fp8=True)
    compare(qkv_rope_store_launch, qkv_rope_store_reference, odd)


if __name__ == "__main__":
    main()
