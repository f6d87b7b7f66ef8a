"""Cases of the activations, and of those ops that quantise what they make."""

from collections.abc import Callable

from gemcutter.ops.activations.geglu import geglu_launch, geglu_reference, gelu_mul_launch, gelu_mul_reference
from gemcutter.ops.activations.geglu_fp8 import geglu_fp8_launch, geglu_fp8_reference
from gemcutter.ops.norms.rms_norm_fp8 import rms_norm_fp8_launch, rms_norm_fp8_reference
from gemcutter.ops.quantize_fp8 import quantize_fp8_launch, quantize_fp8_reference
from gemcutter.ops.tokens.logits import softcap_launch_, softcap_reference_
from gemcutter.verify import cuda_arithmetic
from gemcutter.verify.case import Case
from gemcutter.verify.inputs import Draw
from gemcutter.verify.shapes import EPS, GEMMA, MODELS, PER_LAYER, VOCABULARY, Model


def activation_cases() -> list[Case]:
    cases = []
    for model in GEMMA:
        for width in model.mlp:
            cases.append(_geglu(f"{model.name} width {width}", width))
        if model.experts:
            cases.append(_geglu(f"{model.name} expert width {model.experts.width}", model.experts.width))
        if model.per_layer:
            cases.append(_gate(model))
    cases.append(
        Case(
            "softcap_",
            f"vocabulary {VOCABULARY}",
            lambda draw: (draw.rows(VOCABULARY), 30.0),
            softcap_launch_,
            softcap_reference_,
            lambda rows: 2 * rows * VOCABULARY * 2,
            writes=(0,),
            stand_in=cuda_arithmetic.softcap_,
        )  # fmt: skip
    )
    return cases


def fp8_cases() -> list[Case]:
    cases = []
    for model in MODELS:
        shape, width = f"{model.name} hidden {model.hidden}", model.hidden
        cases.append(_quantize(shape, width))
        if model not in GEMMA:
            continue
        cases += [_norm_fp8(shape, width, added) for added in (False, True)]
        for width in model.mlp:
            cases.append(_geglu(f"{model.name} width {width}", width, fp8=True))
    return cases


def _geglu(shape: str, width: int, fp8: bool = False) -> Case:
    functions: tuple[str, Callable, Callable, Callable] = (
        ("geglu_fp8", geglu_fp8_launch, geglu_fp8_reference, cuda_arithmetic.geglu_fp8) if fp8
        else ("geglu", geglu_launch, geglu_reference, cuda_arithmetic.geglu)
    )  # fmt: skip
    op, launch, reference, stand_in = functions
    written = width + 4 if fp8 else width * 2
    return Case(
        op, shape, lambda draw: (draw.rows(2 * width),), launch, reference,
        lambda rows: rows * (2 * width * 2 + written), stand_in=stand_in,
    )  # fmt: skip


def _gate(model: Model) -> Case:
    """Of a layer's own input, which is a slice of all layers'."""
    return Case(
        "gelu_mul", f"{model.name} per-layer {PER_LAYER}",
        lambda draw: (draw.rows(PER_LAYER), draw.rows(model.layers, PER_LAYER)[:, 1]),
        gelu_mul_launch, gelu_mul_reference, lambda rows: 3 * rows * PER_LAYER * 2,
        stand_in=cuda_arithmetic.gelu_mul,
    )  # fmt: skip


def _quantize(shape: str, width: int) -> Case:
    return Case(
        "quantize_fp8", shape, lambda draw: (draw.rows(width),), quantize_fp8_launch, quantize_fp8_reference,
        lambda rows: rows * (width * 3 + 4),
    )  # fmt: skip


def _norm_fp8(shape: str, width: int, added: bool) -> Case:
    def arguments(draw: Draw) -> tuple:
        return draw.rows(width), draw.weight(width), EPS, draw.rows(width) if added else None

    return Case(
        "rms_norm_fp8", f"{shape}{' residual' * added}", arguments, rms_norm_fp8_launch, rms_norm_fp8_reference,
        lambda rows: rows * (width * (7 if added else 3) + 4) + width * 2,
    )  # fmt: skip
