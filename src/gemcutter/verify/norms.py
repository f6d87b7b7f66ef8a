"""Cases of the norm and of both seams."""

import functools

from gemcutter.ops.norms.rms_norm import rms_norm_launch, rms_norm_reference
from gemcutter.ops.seams.attention_seam import attention_seam_launch, attention_seam_reference
from gemcutter.ops.seams.layer_seam import layer_seam_launch, layer_seam_reference
from gemcutter.verify.case import Case
from gemcutter.verify.inputs import Draw
from gemcutter.verify.shapes import EPS, GEMMA, PER_LAYER, Model


def norm_cases() -> list[Case]:
    cases = [_norm(f"{model.name} hidden {model.hidden}", model.hidden) for model in GEMMA]
    cases += [_norm(f"head {head_dim}", 8, head_dim) for head_dim in (512, 256, 128)]
    cases.append(_norm("head 256 no weight", 8, 256, weighted=False))
    cases.append(_norm(f"E4B per-layer {PER_LAYER}", 42, PER_LAYER))
    for model in GEMMA:
        cases += [_attention_seam(model, fp8) for fp8 in (False, True)]
        if model.per_layer:  # before and after the per-layer input
            cases.append(_layer_seam(model, last=False))
        cases += [_layer_seam(model, last=True, fp8=fp8) for fp8 in (False, True)]
        if model.experts:  # as `hf/` has it: HF's experts add up their outputs
            cases.append(_layer_seam(model, last=False, added=True))
    return cases


def _norm(shape: str, *dims: int, weighted: bool = True) -> Case:
    size = 2
    for dim in dims:
        size *= dim
    return Case(
        "rms_norm", shape,
        lambda draw: (draw.rows(*dims), draw.weight(dims[-1]) if weighted else None, EPS),
        rms_norm_launch, rms_norm_reference,
        lambda rows: 2 * rows * size + weighted * 2 * dims[-1],
    )  # fmt: skip


def _attention_seam(model: Model, fp8: bool) -> Case:
    """fp8: for the MLP and the experts; the router's input stays as it is."""
    width, routed = model.hidden, model.experts is not None

    def arguments(draw):
        more = (draw.weight(width), draw.weight(width)) if routed else (None, None)
        return (
            draw.rows(width),
            draw.rows(width),
            draw.weight(width),
            draw.weight(width),
            EPS,
            *more,
            *[True] * (2 * fp8),
        )

    saved = (1 + routed) * fp8  # of bytes an element, but for a scale each
    return Case(
        f"attention_seam{'_fp8' * fp8}", f"{model.name} hidden {width}{' experts' * routed}", arguments,
        attention_seam_launch, attention_seam_reference,
        lambda rows: ((6 if routed else 4) * rows + (4 if routed else 2)) * width * 2 - rows * saved * (width - 4),
    )  # fmt: skip


def _layer_seam(model: Model, last: bool, added: bool = False, fp8: bool = False) -> Case:
    """added: the experts' outputs come as their sum."""
    width, routed = model.hidden, model.experts is not None
    count, top_k, _ = model.experts or (0, 0, 0)
    slots = 0 if added else top_k

    def arguments(draw: Draw) -> tuple:
        args = [draw.rows(width), draw.rows(width), draw.weight(width), EPS]
        args += [draw.weight(1), draw.weight(width)] if last else [None, None]
        if not routed:
            return *args, *[None] * 5
        args += [draw.rows(slots, width) if slots else draw.rows(width), draw.weight(width), draw.weight(width)]
        if not slots:
            return *args, None, None
        scores = draw.rows(count).float().nan_to_num()
        return *args, scores.topk(slots, -1).indices, draw.weight(draw.count, slots).float()

    form = f" {top_k} experts" * routed + " added" * added
    form += " to the next layer" if last else " before the per-layer input" * (not routed)
    read = 2 + (slots or routed)
    return Case(
        f"layer_seam{'_fp8' * fp8}", f"{model.name} hidden {width}{form}", arguments,
        functools.partial(layer_seam_launch, fp8=fp8), functools.partial(layer_seam_reference, fp8=fp8),
        lambda rows: ((read + 1 + last) * rows + 1 + last + 2 * routed) * width * 2 + rows * slots * (8 + 4)
        - rows * fp8 * (width - 4),
    )  # fmt: skip
