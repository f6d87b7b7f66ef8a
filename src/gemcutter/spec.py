"""What a model is, as data: widths, layers and their attention, in the checkpoint's own order.

Everything that differs between the models of a family is a field here, so that its model file, the cache and the
loader hold one code path each. No torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Family(StrEnum):
    """Whose mathematics a model has: the name of its file in model/."""

    GEMMA4 = "gemma4"
    GLM4_MOE = "glm4_moe"


class Kind(StrEnum):
    """A layer's attention kind, which is also the kind of its KV pages."""

    SLIDING = "sliding"  # a query sees itself and the window - 1 tokens before it
    FULL = "full"  # a query sees every token up to itself


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding of one layer.

    Gemma: dim i pairs with dim i + head_dim/2. The first `angles` pairs turn by position * theta^(-2i/head_dim),
    the rest stay. Proportional RoPE (full layers) keeps head_dim as the denominator and rotates fewer pairs.
    GLM: the first 2 * angles dims turn as if they were a head, dim i with dim i + angles, the rest stay.
    """

    theta: float
    angles: int


@dataclass(frozen=True)
class ExpertSpec:
    """The mixture of experts that stands beside a layer's dense MLP, which GLM calls its shared expert."""

    num_experts: int
    top_k: int
    width: int
    renormalise: bool = True  # the chosen ones' weights are divided by their sum
    scale: float = 1.0  # of the weights


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer."""

    index: int
    kind: Kind
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None  # tokens visible to a query, itself included; None on full layers
    rope: RopeSpec
    kv_owner: int  # the layer whose K/V this layer reads: itself, or an earlier one of its kind
    k_eq_v: bool  # V is the weightless norm of K's projection; there is no v_proj
    mlp_width: int
    experts: ExpertSpec | None
    qkv_bias: bool = False
    qk_norm: bool = True

    @property
    def owns_kv(self) -> bool:
        return self.kv_owner == self.index

    @property
    def q_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        """Rows of the merged projection: q | k | v, q | k where K = V, q alone where K/V are another layer's."""
        if not self.owns_kv:
            return self.q_width
        return self.q_width + self.kv_width * (1 if self.k_eq_v else 2)


@dataclass(frozen=True)
class ModelSpec:
    """A text model. What a family does not have is None or 0."""

    hidden: int
    vocab: int
    layers: tuple[LayerSpec, ...]
    eps: float
    softcap: float | None  # logits = tanh(logits / softcap) * softcap
    context_length: int  # max_position_embeddings
    ple_width: int  # per-layer embedding dim; 0: none
    ple_vocab: int
    tied_head: bool
    dtype: str  # of the checkpoint: "bfloat16", "float16" or "float32"
    quantized: frozenset[str] = (
        frozenset()
    )  # weights held in FP8: "layers.3.qkv", and so on (checkpoint/linears.py)
    family: Family = Family.GEMMA4

    @property
    def window(self) -> int | None:
        """The sliding window, the same in every sliding layer; None for a model without any."""
        return next((layer.window for layer in self.layers if layer.kind is Kind.SLIDING), None)

    @property
    def last_kv_owner(self) -> int:
        """The last layer that writes K/V. From its attention on, tokens that draw nothing are of no use."""
        return max(layer.kv_owner for layer in self.layers)

    def kv_owners(self, kind: Kind) -> Iterator[LayerSpec]:
        """Layers of this kind that write K/V, in order. Shared layers own nothing and cost no cache."""
        return (layer for layer in self.layers if layer.owns_kv and layer.kind is kind)

    def kv_bytes_per_token(self, kind: Kind, element_bytes: int) -> int:
        return sum(2 * layer.kv_width * element_bytes for layer in self.kv_owners(kind))
