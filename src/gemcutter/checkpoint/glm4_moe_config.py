"""config.json of a GLM-4 MoE model (4.5 to 4.7), read raw. Defaults are those of HF's Glm4MoeConfig."""

from gemcutter.checkpoint.fields import HEAD_DIMS, MAX_EXPERTS, MAX_LAYERS, Fields
from gemcutter.checkpoint.files import CheckpointError
from gemcutter.spec import ExpertSpec, Family, Kind, LayerSpec, ModelSpec, RopeSpec

GLM4_MOE = "glm4_moe"  # the model_type


def glm4_moe_spec(config: Fields, tied_head: bool, dtype: str) -> ModelSpec:
    """The model, nothing of it held in FP8.

    Raises:
        CheckpointError: a field is wrong, or it asks for what we do not do.
    """
    if config.get("hidden_act", "silu") != "silu":
        config.fail("hidden_act", "must be silu, the only activation supported")
    for name in ("n_group", "topk_group"):
        if config.size(name, 1) != 1:
            config.fail(name, "must be 1: experts in groups are not supported")
    return ModelSpec(
        hidden=config.size("hidden_size", 4096),
        vocab=config.size("vocab_size", 151_552),
        layers=_layers(config),
        eps=config.number("rms_norm_eps", 1e-5),
        softcap=None,
        context_length=config.size("max_position_embeddings", 131_072),
        ple_width=0,
        ple_vocab=0,
        tied_head=tied_head,
        dtype=dtype,
        family=Family.GLM4_MOE,
    )


def _layers(config: Fields) -> tuple[LayerSpec, ...]:
    count = config.size("num_hidden_layers", 46, high=MAX_LAYERS)
    heads, kv_heads = config.size("num_attention_heads", 96), config.size("num_key_value_heads", 8)
    if heads % kv_heads:
        config.fail("num_attention_heads", f"must be a multiple of the {kv_heads} kv heads")
    head_dim = config.size("head_dim", config.size("hidden_size", 4096) // heads)
    if head_dim not in HEAD_DIMS:
        dims = ", ".join(map(str, HEAD_DIMS))
        raise CheckpointError(f"{config.where}: head_dim must be one of {dims}; got {head_dim}")
    dense = config.size("first_k_dense_replace", 1, low=0)
    routed = _experts(config)
    shared = config.size("n_shared_experts", 1) * routed.width
    same = dict(
        kind=Kind.FULL,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        window=None,
        rope=_rope(config, head_dim),
        k_eq_v=False,
        qkv_bias=config.flag("attention_bias", False),
        qk_norm=config.flag("use_qk_norm", False),
    )
    width = config.size("intermediate_size", 10_944)
    return tuple(
        LayerSpec(
            index=index,
            kv_owner=index,
            mlp_width=width if index < dense else shared,
            experts=None if index < dense else routed,
            **same,
        )
        for index in range(count)
    )


def _experts(config: Fields) -> ExpertSpec:
    experts = config.size("n_routed_experts", 128, high=MAX_EXPERTS)
    return ExpertSpec(
        experts,
        config.size("num_experts_per_tok", 8, high=experts),
        config.size("moe_intermediate_size", 1408),
        renormalise=config.flag("norm_topk_prob", True),
        scale=config.number("routed_scaling_factor", 1.0),
    )


def _rope(config: Fields, head_dim: int) -> RopeSpec:
    """transformers 5 writes rope_parameters; before, its fields lay open, beside rope_scaling."""
    rope = config
    if config.get("rope_parameters") is not None:
        rope = config.object("rope_parameters")
    scaling = config.object("rope_scaling") if config.get("rope_scaling") is not None else Fields({}, "")
    for fields in (rope, scaling):
        kind = fields.get("rope_type", fields.get("type", "default"))
        if kind != "default":
            raise CheckpointError(f"{fields.where}: rope_type must be default, got {kind!r:.80}")
    partial = rope.number("partial_rotary_factor", config.number("partial_rotary_factor", 0.5, high=1.0), high=1.0)
    turns = int(head_dim * partial)
    if turns < 2 or turns % 2:
        config.fail("partial_rotary_factor", f"turns {turns} of {head_dim} dims: pairs of them are needed")
    return RopeSpec(theta=rope.number("rope_theta", config.number("rope_theta", 10_000.0)), angles=turns // 2)
