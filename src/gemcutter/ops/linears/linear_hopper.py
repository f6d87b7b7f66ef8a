"""The streaming kernel of `linear` on Hopper, in Gluon: weights come by TMA, before the predecessor is done.

A program owns 64 rows of the weight and up to 64 of x. It asks for the first stages of weights, joins the
chain, and asks for x: while the kernel ahead finishes, up to 160 KiB of weights an SM are under way. Weights
are the M operand of wgmma, so 16 tokens fill an instruction. Measured on one H200 at 26B-A4B's shapes, one
token, the four linears of a layer in a chain: 31.5 µs, against 36.5 without the early loads, 38.4 for the plain
Triton kernel, 49.3 for cuBLAS and 23.9 for the bytes alone.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gemcutter.ops.hopper import PROCESSORS, descriptor, load_tile, stage_barriers

ROWS = 64  # of the weight a program, the M of one wgmma


@gluon.jit
def _stream_kernel(
    weight_desc, x_desc, weight_scale_ptr, scale_ptr, bias_ptr, out_ptr, tokens, N: gl.constexpr, K: gl.constexpr,
    ROWS: gl.constexpr, BLOCK_T: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Scales: of products in FP8, for each column and token; else None."""
    first, first_token = gl.program_id(0) * ROWS, gl.program_id(1) * BLOCK_T
    dtype: gl.constexpr = weight_desc.dtype
    w_stages = gl.allocate_shared_memory(dtype, [STAGES, ROWS, BLOCK_K], weight_desc.layout)
    x_stages = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_T, BLOCK_K], x_desc.layout)
    ready = stage_barriers(STAGES)

    STEPS: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    BITS: gl.constexpr = dtype.primitive_bitwidth
    BYTES: gl.constexpr = (ROWS + BLOCK_T) * BLOCK_K * BITS // 8
    for stage in gl.static_range(STAGES):
        if stage < STEPS:
            mbarrier.expect(ready.index(stage), BYTES)
            at = [first, stage * BLOCK_K]
            load_tile(weight_desc, at, ready.index(stage), w_stages.index(stage))
    gdc_wait()
    gdc_launch_dependents()  # not before: what the kernel ahead wrote is settled for those behind, see chain.py
    for stage in gl.static_range(STAGES):
        if stage < STEPS:
            at = [first_token, stage * BLOCK_K]
            load_tile(x_desc, at, ready.index(stage), x_stages.index(stage))

    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_T, 256 // BITS])
    acc = gl.zeros([ROWS, BLOCK_T], gl.float32, layout)
    for step in range(STEPS):
        now = step % STAGES
        mbarrier.wait(ready.index(now), (step // STAGES) & 1)
        acc = warpgroup_mma(w_stages.index(now), x_stages.index(now).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        # The product before this one is done: its stage is free for the load that comes STAGES later.
        coming = step - 1 + STAGES
        free = coming % STAGES
        more = (step > 0) & (coming < STEPS)
        mbarrier.expect(ready.index(free), BYTES, pred=more)
        w_at = [first, coming * BLOCK_K]
        load_tile(weight_desc, w_at, ready.index(free), w_stages.index(free), pred=more)
        x_at = [first_token, coming * BLOCK_K]
        load_tile(x_desc, x_at, ready.index(free), x_stages.index(free), pred=more)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(stage))

    column = first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    token = first_token + gl.arange(0, BLOCK_T, gl.SliceLayout(0, layout))
    if scale_ptr is not None:
        acc *= gl.load(weight_scale_ptr + column, mask=column < N, other=0.0)[:, None]
        acc *= gl.load(scale_ptr + token, mask=token < tokens, other=0.0)[None, :]
    if bias_ptr is not None:
        acc += gl.load(bias_ptr + column, mask=column < N, other=0.0).to(gl.float32)[:, None]
    at = out_ptr + token[None, :].to(gl.int64) * N + column[:, None]
    gl.store(at, acc.to(out_ptr.dtype.element_ty), mask=(token < tokens)[None, :] & (column < N)[:, None])


def stream(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
) -> None:
    """x [T, K], weight [N, K], bias [N] -> out [T, N], of any float dtype; in FP8 with scales [T, 1] and [N, 1].

    More rows than fill a tile stream the weights once for every tile.
    """
    (tokens, depth), columns = x.shape, weight.shape[0]
    tile = stream_tile(tokens, columns) if scale is None else stream_fp8_tile(tokens, columns)
    block_t, block_k, stages = tile
    _stream_kernel[(triton.cdiv(columns, ROWS), triton.cdiv(tokens, block_t))](
        descriptor(weight, [ROWS, block_k]), descriptor(x, [block_t, block_k]), weight_scale, scale, bias, out,
        tokens, N=columns, K=depth, ROWS=ROWS, BLOCK_T=block_t, BLOCK_K=block_k, STAGES=stages,
        num_warps=4, launch_pdl=True, enable_fp_fusion=False,
    )  # fmt: skip


def stream_tile(tokens: int, columns: int) -> tuple[int, int, int]:
    """BLOCK_T, BLOCK_K and STAGES: about 200 KiB of shared memory, one program an SM.

    A router's 128 columns are two programs for a tile of tokens: smaller tiles are on more SMs, 4.0 µs for 6.0.
    """
    if tokens <= (1024 if columns <= 2 * ROWS else 16):
        return 16, 256, 5
    return (32, 128, 8) if tokens <= 32 else (64, 128, 6)


def stream_fp8_tile(tokens: int, columns: int) -> tuple[int, int, int]:
    """As `stream_tile`; where programs are more than SMs, two share one, and fill the other's pauses."""
    tiles = triton.cdiv(columns, ROWS)
    if tokens <= 16:
        rows = 8 if tokens <= 8 else 16
        return (rows, 256, 6 if rows == 8 else 5) if tiles > PROCESSORS else (rows, 512, 5)
    if tokens <= 32:
        return 32, 256, 8
    if tokens <= 64 or tiles * triton.cdiv(tokens, 64) <= PROCESSORS:
        return 64, 256, 6
    return (128, 256, 4) if tokens <= 128 else (128, 128, 8)
