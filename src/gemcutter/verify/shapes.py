"""The released widths that ops are held to, as data: the five Gemma 4, and GLM-4.7."""

from typing import NamedTuple

from gemcutter.ops.attention.qkv_rope_store import QkvMode

EPS = 1e-6
VOCABULARY = 262_144
PER_LAYER = 256  # width of a layer's own input in E2B and E4B


class Attention(NamedTuple):
    """One kind of attention layer."""

    kind: str
    heads: int
    kv_heads: int
    head_dim: int
    angles: int  # pairs that turn
    mode: QkvMode


class Experts(NamedTuple):
    count: int
    top_k: int
    width: int


class Model(NamedTuple):
    name: str
    hidden: int
    layers: int
    mlp: tuple[int, ...]
    attention: tuple[Attention, ...]
    experts: Experts | None = None
    per_layer: bool = False


def _gemma_attention(heads: int, sliding: int, full: int, mode: QkvMode) -> tuple[Attention, ...]:
    """mode: of the full layers."""
    return (
        Attention("sliding", heads, sliding, 256, 128, QkvMode.QKV),
        Attention("full", heads, full, 512, 64, mode),
    )


def _readers_of_shared(heads: int) -> tuple[Attention, ...]:
    """Layers that read the K/V of an earlier one."""
    return (
        Attention("sliding shared", heads, 1, 256, 128, QkvMode.Q_ONLY),
        Attention("full shared", heads, 1, 512, 64, QkvMode.Q_ONLY),
    )


GEMMA = (
    Model(
        "E2B", 1536, 35, (6144, 12_288),
        _gemma_attention(8, 1, 1, QkvMode.QKV) + _readers_of_shared(8), per_layer=True,
    ),
    Model(
        "E4B", 2560, 42, (10_240,),
        _gemma_attention(8, 2, 2, QkvMode.QKV) + _readers_of_shared(8), per_layer=True,
    ),
    Model("12B", 3840, 48, (15_360,), _gemma_attention(16, 8, 1, QkvMode.Q_KEQV)),
    Model(
        "26B-A4B", 2816, 30, (2112,), _gemma_attention(16, 8, 2, QkvMode.Q_KEQV), experts=Experts(128, 8, 704)
    ),
    Model("31B", 5376, 60, (21_504,), _gemma_attention(32, 16, 4, QkvMode.Q_KEQV)),
)  # fmt: skip
GLM = Model(
    "GLM-4.7", 5120, 92, (12_288,), (Attention("full", 96, 8, 128, 32, QkvMode.QKV),), experts=Experts(160, 8, 1536)
)  # fmt: skip
MODELS = (*GEMMA, GLM)
