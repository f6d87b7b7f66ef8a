"""`seam_linear` of one token in one launch on Hopper, in Gluon: each program makes x for itself.

The experts' slots are summed by each program, too, while its first weights come. One H200, one token, a layer in a
chain: 26B-A4B 70.2 µs for 72.1 with the ops one by one; E4B, whose layers have two of these, and the seam in
`seam_gate_up_hopper.py`, 66.4 for 72.5.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gemcutter.ops.hopper import stage_barriers
from gemcutter.ops.linears.gate_up_hopper import activate
from gemcutter.ops.linears.row_hopper import PART, chunks, load_row, put_row, ring, store_row
from gemcutter.ops.linears.row_stream_hopper import (
    COLUMNS,
    ROWS,
    ask,
    barrier,
    boxes_of,
    early_of,
    stages_of,
    together,
    walk,
    x_bytes,
)
from gemcutter.ops.row import added, norm_factor, norm_factors, normed
from gemcutter.ops.seams.slot_sum import slots_in_order, with_slot

# Rows of the weight a program, where 64 would make fewer programs than so many; all are asked for before the join.
# E4B's 256 columns take 3.3 µs, 5.0 with a load for each chunk and half of them asked for behind the join.
FEW_ROWS, FEW_PROGRAMS = 16, 16
FEW_BYTES = 512  # of a row a step: four chunks, which a window of three more needs


@gluon.jit
def _places(first, N: gl.constexpr, ROWS: gl.constexpr, dtype: gl.constexpr):
    """The columns of out that a product gives, and which of its results these are."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 256 // dtype.primitive_bitwidth])
    row = gl.arange(0, 64, gl.SliceLayout(1, layout))[:, None]
    col = gl.arange(0, 8, gl.SliceLayout(0, layout))[None, :]
    at = first + row + col * 0
    return at, (col == 0) & (row < ROWS) & (at < N)


@gluon.jit(do_not_specialize=["count"])
def _seam_linear_kernel(
    desc, weight_scale_ptr, branch_ptr, residual_ptr, post_ptr, scalar_ptr, next_norm_ptr, slots_ptr,
    dense_post_ptr, expert_post_ptr, ids_ptr, weights_ptr, factor_ptr, hidden_ptr, out_ptr, eps, count,
    N: gl.constexpr, H: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
    EARLY: gl.constexpr, TOP_K: gl.constexpr, SETTLED: gl.constexpr, LAST: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Program: ROWS columns of out. count: of tokens, 1. weight_scale_ptr: of weights in FP8, else None.

    TOP_K: slots, or 0 without experts. LAST: the seam scales, and norms for this product. GATED: out =
    gelu(product) * factor. SETTLED: ids and weights of slots, and factor, are.
    """
    first = gl.program_id(0) * ROWS
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    BYTES: gl.constexpr = desc.dtype.primitive_bitwidth // 8
    x_chunks = chunks(desc.dtype, (H + PART - 1) // PART * (PART * BYTES // 128), 8)
    CHUNKS: gl.constexpr = COLUMNS * BYTES // 128
    tiles = ring(desc.dtype, STAGES * CHUNKS, ROWS)
    ready = stage_barriers(STAGES)
    for stage in gl.static_range(EARLY):
        ask(desc, tiles, ready, stage, first, CHUNKS)
    post = load_row(post_ptr, H)
    if TOP_K > 0:
        dense_post, expert_post = load_row(dense_post_ptr, H), load_row(expert_post_ptr, H)
    if LAST:
        next_norm = load_row(next_norm_ptr, H)
        scalar = gl.load(scalar_ptr).to(gl.float32)
    if (TOP_K > 0) and SETTLED:
        places, shares = slots_in_order(ids_ptr, weights_ptr, 0, TOP_K)
    if GATED and SETTLED:
        at, held = _places(first, N, ROWS, desc.dtype)
        by = gl.load(factor_ptr + at, mask=held, other=0.0)
    gdc_wait()
    gdc_launch_dependents()
    if (TOP_K > 0) and (not SETTLED):
        places, shares = slots_in_order(ids_ptr, weights_ptr, 0, TOP_K)
    rows = (load_row(branch_ptr, H), load_row(residual_ptr, H))
    for i in gl.static_range(TOP_K):
        rows += (load_row(slots_ptr + places[i] * H, H),)
    rows = together(rows, count)
    x, residual = rows[0], rows[1]
    for stage in gl.static_range(EARLY, STAGES):
        ask(desc, tiles, ready, stage, first, CHUNKS)
    if TOP_K > 0:
        routed = ()
        for part in gl.static_range(len(x)):
            routed += (gl.zeros_like(x[part]),)
        for i in gl.static_range(TOP_K):
            routed = with_slot(routed, rows[2 + i], shares[i])
        factor, routed_factor = norm_factors(x, routed, eps, H)
        x = added(normed(x, factor, dense_post), normed(routed, routed_factor, expert_post))
    hidden = added(residual, normed(x, norm_factor(x, eps, H), post))
    if LAST:
        hidden = normed(hidden, scalar, None)
        scale = put_row(x_chunks, normed(hidden, norm_factor(hidden, eps, H), next_norm), H)
    else:
        scale = put_row(x_chunks, hidden, H)
    fence_async_shared()
    barrier()
    if first == 0:
        store_row(hidden_ptr, hidden, H)

    acc = walk(desc, tiles, x_chunks, ready, first, H, CHUNKS)
    at, held = _places(first, N, ROWS, desc.dtype)
    if scale is not None:
        acc *= gl.load(weight_scale_ptr + at, mask=held, other=0.0)
        acc *= scale
    y = acc.to(dtype)
    if GATED:
        if not SETTLED:
            by = gl.load(factor_ptr + at, mask=held, other=0.0)
        y = (activate(y.to(gl.float32)).to(dtype).to(gl.float32) * by.to(gl.float32)).to(dtype)
    gl.store(out_ptr + at, y, mask=held)


def stream_seam_linear(
    out, residual, post, eps, weight, weight_scale, scalar, next_norm, slots, dense_post, expert_post, ids, weights,
    factor, settled, hidden, product,
) -> None:  # fmt: skip
    """One row."""
    (columns, depth), size = weight.shape, weight.itemsize
    rows, step = ROWS, COLUMNS
    if triton.cdiv(columns, ROWS) < FEW_PROGRAMS and depth % (FEW_BYTES // size) == 0:
        rows, step = FEW_ROWS, FEW_BYTES // size
    programs = triton.cdiv(columns, rows)
    stages = depth // step if rows < ROWS else stages_of(depth, size, x_bytes(depth, size), programs)
    _seam_linear_kernel[(programs,)](
        boxes_of(weight, rows=rows, columns=step), weight_scale, out, residual, post, scalar, next_norm, slots,
        dense_post, expert_post, ids, weights, factor, hidden, product, eps, 1,
        N=columns, H=depth, ROWS=rows, COLUMNS=step, STAGES=stages,
        EARLY=stages if rows < ROWS else early_of(stages, size, programs),
        TOP_K=0 if ids is None else ids.shape[1], SETTLED=settled,
        LAST=next_norm is not None, GATED=factor is not None,
        num_warps=4, launch_pdl=True, enable_fp_fusion=False,
    )  # fmt: skip
