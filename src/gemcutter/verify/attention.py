"""Cases of the attention entry, and of its parts alone."""

import torch

from gemcutter.ops.attention.k_eq_v_norm import k_eq_v_norm_launch, k_eq_v_norm_reference
from gemcutter.ops.attention.qkv_norm import qkv_norm_launch, qkv_norm_reference
from gemcutter.ops.attention.qkv_rope_store import (
    KV_PARTS,
    QkvMode,
    qkv_rope_store_launch,
    qkv_rope_store_reference,
)
from gemcutter.verify.case import Case
from gemcutter.verify.compare import POISON
from gemcutter.verify.inputs import Draw
from gemcutter.verify.shapes import EPS, GEMMA, Attention

CONTEXT = 4096  # rows of the rope tables
PAGE = 16


def attention_cases() -> list[Case]:
    cases = []
    for model in GEMMA:
        for layer in model.attention:
            shape = f"{model.name} {layer.kind} {layer.heads}/{layer.kv_heads} x {layer.head_dim}"
            cases.append(_entry(shape, layer))
            if layer.mode is QkvMode.Q_KEQV:
                cases.append(_pair(shape, layer))
            cases.append(_norms(shape, layer))
    return cases


def _heads(layer: Attention) -> int:
    """Of a row of the projection."""
    return layer.heads + KV_PARTS[layer.mode] * layer.kv_heads


def _entry(shape: str, layer: Attention) -> Case:
    stores = layer.mode is not QkvMode.Q_ONLY
    dim = layer.head_dim

    def arguments(draw: Draw) -> tuple:
        angle = 3.0 * draw.weight(CONTEXT, layer.angles).float()
        pages = draw.count // PAGE + 2
        slots = draw.permutation(pages * PAGE)[: draw.count]
        cache = torch.full((2, pages, layer.kv_heads, PAGE, dim), POISON, dtype=draw.dtype, device=draw.device)
        return (
            draw.rows(_heads(layer) * dim), draw.weight(dim), draw.weight(dim) if stores else None,
            angle.cos().to(draw.dtype), angle.sin().to(draw.dtype), draw.token_ids(CONTEXT), EPS,
            layer.heads, layer.kv_heads, *(cache if stores else (None, None)), slots if stores else None,
            layer.mode.value, None,
        )  # fmt: skip

    written = layer.heads + (2 * layer.kv_heads if stores else 0)
    moved = (_heads(layer) + written) * dim * 2 + 2 * layer.angles * 2 + (16 if stores else 8)
    return Case(
        "qkv_rope_store", f"{shape} {layer.mode.value}", arguments,
        qkv_rope_store_launch, qkv_rope_store_reference, lambda rows: rows * moved,
        writes=(9, 10),
    )  # fmt: skip


def _norms(shape: str, layer: Attention) -> Case:
    """q, k and v, or q alone, in place: slices of one buffer."""
    kv_heads = layer.kv_heads if layer.mode is QkvMode.QKV else 0
    dim = layer.head_dim

    def arguments(draw: Draw) -> tuple:
        buffer = draw.rows(layer.heads + 2 * kv_heads, dim)
        if not kv_heads:
            return buffer, None, None, draw.weight(dim), None, EPS
        q, k, v = buffer.split([layer.heads, kv_heads, kv_heads], 1)
        return q, k, v, draw.weight(dim), draw.weight(dim), EPS

    return Case(
        "qkv_norm_", shape if kv_heads else f"{shape} q alone", arguments,
        qkv_norm_launch, qkv_norm_reference,
        lambda rows: 2 * rows * (layer.heads + 2 * kv_heads) * dim * 2,
        writes=(0, 1, 2),
    )  # fmt: skip


def _pair(shape: str, layer: Attention) -> Case:
    heads, kv_heads, dim = layer.heads, layer.kv_heads, layer.head_dim

    def arguments(draw: Draw) -> tuple:
        return draw.rows(heads + kv_heads, dim)[:, heads:], draw.weight(dim), EPS

    return Case(
        "k_eq_v_norm", shape, arguments, k_eq_v_norm_launch, k_eq_v_norm_reference,
        lambda rows: 3 * rows * kv_heads * dim * 2,
    )  # fmt: skip
