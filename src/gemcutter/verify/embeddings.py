"""Cases of the token embeddings and of the per-layer ones."""

from gemcutter.ops.tokens.embed import embed_launch, embed_reference
from gemcutter.ops.tokens.per_layer_inputs import per_layer_inputs_launch, per_layer_inputs_reference
from gemcutter.verify.case import Case
from gemcutter.verify.inputs import Draw
from gemcutter.verify.shapes import EPS, GEMMA, PER_LAYER, Model


def embedding_cases() -> list[Case]:
    cases = [_embed(model) for model in GEMMA]
    return cases + [_per_layer(model) for model in GEMMA if model.per_layer]


def _vocabulary(draw: Draw) -> int:
    """Rows of the table: not the 262144 of the models, of which a step reads few, but more than a cache holds."""
    return 16_384 if draw.device.type == "cuda" else 64


def _embed(model: Model) -> Case:
    width = model.hidden

    def arguments(draw: Draw) -> tuple:
        vocabulary = _vocabulary(draw)
        return draw.token_ids(vocabulary), draw.values(vocabulary, width), width**0.5

    return Case(
        "embed", f"{model.name} hidden {width}", arguments, embed_launch, embed_reference,
        lambda rows: rows * (2 * width * 2 + 8),
    )  # fmt: skip


def _per_layer(model: Model) -> Case:
    width = model.layers * PER_LAYER

    def arguments(draw: Draw) -> tuple:
        vocabulary = _vocabulary(draw)
        ids, table = draw.token_ids(vocabulary), draw.values(vocabulary, width)
        return draw.rows(width), ids, table, draw.weight(PER_LAYER), model.hidden**-0.5, EPS

    return Case(
        "per_layer_inputs", f"{model.name} {model.layers} x {PER_LAYER}", arguments,
        per_layer_inputs_launch, per_layer_inputs_reference,
        lambda rows: rows * (3 * width * 2 + 8) + PER_LAYER * 2,
    )  # fmt: skip
