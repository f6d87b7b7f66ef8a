"""Cases of the ops that GLM alone has."""

import torch

from gemcutter.ops.activations.swiglu import swiglu_launch, swiglu_reference
from gemcutter.ops.attention.rope_store import rope_store_launch, rope_store_reference
from gemcutter.ops.moe.sigmoid_topk import sigmoid_topk_launch, sigmoid_topk_reference
from gemcutter.ops.norms.t5_norm import t5_norm_launch, t5_norm_reference
from gemcutter.ops.seams.add_norm import add_norm_launch, add_norm_reference
from gemcutter.verify import cuda_arithmetic
from gemcutter.verify.case import Case
from gemcutter.verify.compare import POISON
from gemcutter.verify.inputs import Draw
from gemcutter.verify.shapes import GLM, Attention, Model

EPS = 1e-5
CONTEXT = 4096  # rows of the rope tables
PAGE = 16


def glm_cases() -> list[Case]:
    cases = [_norm(f"{GLM.name} hidden {GLM.hidden}", GLM.hidden)]
    for slots in (0, GLM.experts.top_k):
        cases += [_add_norm(GLM, slots, plain, fp8) for plain, fp8 in ((True, False), (False, True), (True, True))]
    cases += [_entry(GLM, layer, normed) for layer in GLM.attention for normed in (True, False)]
    cases.append(_choice(GLM))
    cases += [_swiglu(f"{GLM.name} width {width}", width) for width in (*GLM.mlp, GLM.experts.width)]
    return cases


def _norm(shape: str, width: int) -> Case:
    return Case(
        "t5_norm", shape, lambda draw: (draw.rows(width), draw.weight(width), EPS),
        t5_norm_launch, t5_norm_reference, lambda rows: (2 * rows + 1) * width * 2,
    )  # fmt: skip


def _add_norm(model: Model, slots: int, plain: bool, fp8: bool) -> Case:
    width, count = model.hidden, model.experts.count

    def arguments(draw: Draw) -> tuple:
        args = draw.rows(width), draw.rows(width), draw.weight(width), EPS
        if not slots:
            return *args, None, None, None, plain, fp8
        ids = draw.rows(count).float().nan_to_num().topk(slots, -1).indices
        return *args, draw.rows(slots, width), ids, draw.weight(draw.count, slots).float(), plain, fp8

    form = f" {slots} experts" * bool(slots) + " plain" * plain + " fp8" * fp8
    row = (3 + slots + plain) * width * 2 + slots * (8 + 4) + fp8 * (width + 4)
    return Case(
        "add_norm", f"{model.name} hidden {width}{form}", arguments, add_norm_launch, add_norm_reference,
        lambda rows: rows * row + width * 2,
    )  # fmt: skip


def _entry(model: Model, layer: Attention, normed: bool) -> Case:
    dim, heads = layer.head_dim, layer.heads + 2 * layer.kv_heads

    def arguments(draw: Draw) -> tuple:
        angle = 3.0 * draw.weight(CONTEXT, layer.angles).float()
        pages = draw.count // PAGE + 2
        slots = draw.permutation(pages * PAGE)[: draw.count]
        cache = torch.full((2, pages, layer.kv_heads, PAGE, dim), POISON, dtype=draw.dtype, device=draw.device)
        norms = (draw.weight(dim), draw.weight(dim)) if normed else (None, None)
        tables = angle.cos().to(draw.dtype), angle.sin().to(draw.dtype)
        return draw.rows(heads * dim), *norms, *tables, draw.token_ids(CONTEXT), EPS, *cache, slots

    moved = 2 * heads * dim * 2 + 2 * layer.angles * 2 + 16
    return Case(
        "rope_store", f"{model.name} {layer.heads}/{layer.kv_heads} x {dim}{' normed' * normed}", arguments,
        rope_store_launch, rope_store_reference, lambda rows: rows * moved, writes=(7, 8),
    )  # fmt: skip


def _choice(model: Model) -> Case:
    count, top_k, _ = model.experts

    def arguments(draw: Draw) -> tuple:
        return draw.rows(count).float(), draw.weight(count).float(), top_k, True, 2.5

    return Case(
        "sigmoid_topk", f"{model.name} {top_k} of {count}", arguments,
        sigmoid_topk_launch, sigmoid_topk_reference, lambda rows: rows * (count * 4 + top_k * (8 + 4)) + count * 4,
        stand_in=cuda_arithmetic.sigmoid_topk,
    )  # fmt: skip


def _swiglu(shape: str, width: int) -> Case:
    return Case(
        "swiglu", shape, lambda draw: (draw.rows(2 * width),), swiglu_launch, swiglu_reference,
        lambda rows: 3 * rows * width * 2, stand_in=cuda_arithmetic.swiglu,
    )  # fmt: skip
