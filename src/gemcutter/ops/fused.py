"""Where one launch norms all heads, and where the unfused ops run instead: decided here alone."""


def heads_fuse(head_dim: int, weight_offset: float = 0.0, v_scaled: bool = False) -> bool:
    """Whether qkv_rope_store, qkv_norm_ and k_eq_v_norm have a kernel for such heads.

    Those ops ask by themselves with the head dim, the only thing they see, and fall back to rms_norm and PyTorch
    with the same bits. Who holds the modules, as a patch of a model does, also says what only these know before
    calling an op, and on False calls the modules as they are.

    Args:
        head_dim: fused if a power of two, since a tile's side is one and a padded head would waste its lanes, from
            32 (two 16-byte loads of bfloat16 a half) to 512 (the widest released head: one warp holds it).
        weight_offset: of the norms' weights. Fused if 0: the kernels multiply by w. Norms by 1 + w, as before
            Gemma 4, add in float, and a 1 + w rounded to w's dtype beforehand has other bits.
        v_scaled: whether V's norm has a weight. Fused if not: the kernels read none.
    """
    return not weight_offset and not v_scaled and 32 <= head_dim <= 512 and head_dim & (head_dim - 1) == 0
