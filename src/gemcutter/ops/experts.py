"""Mixture of experts: each token's top k expert MLPs.

Per slot (token, expert): gate, up = linear; gelu_tanh(gate) * up (`ops/geglu.py`) or silu(gate) * up
(`ops/swiglu.py`); down = linear; each rounded to the dtype. Their weighted sum is a seam's (`slot_sum.py`), which
reads them but once.
Source: HF `Gemma4TextExperts` with `experts_implementation="eager"`; on a CPU the bits are its bits, were its
products made 16 rows at a time (`ops/linear.py`): a row then does not know how many share its expert.

On a GPU the slots are sorted by expert (`ops/sort_by_expert.py`), a grouped GEMM makes the [slots, N] activations,
a second one the [slots, H] outputs. `experts_tiles.py` chooses by the number of tokens: tiles, or with the same
bits the products of `experts_hopper.py`, or for few tokens those of `experts_stream_hopper.py`, which need no
sort. Grids are bounded by the number of slots alone, so nothing waits for the device and a CUDA graph can hold it
all. A row's bits depend on no other row, nor on how many share its expert: every tile walks K upwards, into one
accumulator a row.
"""

import torch
import triton
import triton.language as tl

from gemcutter.ops.activation import REFERENCES, Activation, activate, check_activation
from gemcutter.ops.arguments import check_matrix
from gemcutter.ops.chain import chained, join, release
from gemcutter.ops.experts_fp8 import experts_fp8
from gemcutter.ops.experts_hopper import grouped_experts
from gemcutter.ops.experts_stream_hopper import stream_experts
from gemcutter.ops.experts_table import Plan, Tile
from gemcutter.ops.experts_tiles import plan_for
from gemcutter.ops.library import define
from gemcutter.ops.linear import linear_reference
from gemcutter.ops.quantize_fp8 import Quantized
from gemcutter.ops.sort_by_expert import check_sort_by_expert, sort_by_expert


def experts(
    x: torch.Tensor | Quantized,
    ids: torch.Tensor,
    gate_up: torch.Tensor | Quantized,
    down: torch.Tensor | Quantized,
    settled: bool = False,
    activation: Activation = Activation.GELU_TANH,
) -> torch.Tensor:
    """Apply each token's experts.

    Args:
        x: [T, H] of float32, bfloat16 or float16, normed; dense rows, row stride free. T may be 0. Before quantised
            weights (`experts_fp8.py`) bfloat16, which is then quantised, or a pair.
        ids: [T, k] int32 or int64 in [0, E), which the caller guarantees; dense.
        gate_up: [E, 2N, H] of x's dtype, gate rows then up rows, dense; or a pair, scale [E, 2N, 1].
        down: [E, H, N] of x's dtype, dense; or a pair, scale [E, H, 1], where gate_up is one.
        settled: x and ids are, as `ops/chain.py` has it, and few tokens need not wait for the kernel ahead. Where
            they are not and this says so, the kernels may read what stood there before.
        activation: of the gates.

    Returns:
        [T, k, H] of x's dtype (bfloat16 of a pair), contiguous: a token's experts in the order of its ids, not
        weighted.

    Raises:
        TypeError, ValueError: on other dtypes, shapes and strides.
    """
    quantized = [isinstance(weight, Quantized) for weight in (gate_up, down)]
    if all(quantized):
        return experts_fp8(x, ids, gate_up, down, settled, activation)
    if any(quantized) or isinstance(x, Quantized):
        kinds = ", ".join(
            f"{name} {type(each).__name__}" for name, each in dict(x=x, gate_up=gate_up, down=down).items()
        )
        raise TypeError(f"{kinds}: quantise both weights or neither, and x only for quantised ones")
    return _experts(x, ids, gate_up, down, settled, activation)


def check_experts(x, ids, gate_up, down, settled, activation) -> None:
    check_activation(activation)
    check_matrix("x", x)
    num_experts, _, width = down.shape if down.ndim == 3 else (0, 0, 0)
    shapes = dict(
        gate_up=(gate_up, (num_experts, 2 * width, x.shape[1])), down=(down, (num_experts, x.shape[1], width))
    )
    for name, (weight, shape) in shapes.items():
        if weight.dtype != x.dtype or weight.device != x.device:
            raise TypeError(f"{name} is {weight.dtype} on {weight.device}: {x.dtype} on {x.device} is needed")
        if weight.shape != shape or not weight.is_contiguous() or not weight.numel():
            got = f"{name} {tuple(weight.shape)}, strides {weight.stride()}"
            raise ValueError(f"{got}: dense gate_up [E, 2N, {x.shape[1]}] and down [E, {x.shape[1]}, N] are needed")
    check_sort_by_expert(ids, num_experts)
    if len(ids) != len(x) or ids.device != x.device or not ids.shape[1]:
        got = f"shape {tuple(ids.shape)} on {ids.device}"
        raise ValueError(f"ids have {got}: some for each of {len(x)} tokens on {x.device} are needed")


def experts_reference(
    x: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    settled: bool = False,
    activation: str = Activation.GELU_TANH,
) -> torch.Tensor:
    out = experts_fake(x, ids, gate_up, down, settled, activation)
    for expert in ids.unique().tolist():
        slot, token = torch.where(ids.T == expert)
        activated = REFERENCES[activation](linear_reference(x[token], gate_up[expert]))
        out[token, slot] = linear_reference(activated, down[expert])
    return out


@triton.jit
def _find_rows(starts_ptr, tile, E: tl.constexpr, E_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr):
    """Expert and rows [begin, end) of the order that this tile covers; expert >= E past the last tile."""
    lane = tl.arange(0, E_BLOCK)
    starts = tl.load(starts_ptr + lane, mask=lane < E, other=0)
    ends = tl.load(starts_ptr + lane + 1, mask=lane < E, other=0)
    tiles = (ends - starts + BLOCK_M - 1) // BLOCK_M
    last = tl.cumsum(tiles, axis=0)
    expert = tl.sum((last <= tile).to(tl.int32), axis=0)
    chosen = lane == expert
    begin = tl.sum(tl.where(chosen, starts + (tile - last + tiles) * BLOCK_M, 0), axis=0)
    end = tl.sum(tl.where(chosen, ends, 0), axis=0)
    return expert, begin, end


@triton.jit
def _up_kernel(
    x_ptr, order_ptr, starts_ptr, gate_up_ptr, hidden_ptr, x_stride,
    E: tl.constexpr, E_BLOCK: tl.constexpr, TOP_K: tl.constexpr, H: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACTIVATION: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """hidden[row] = activation(gate) * up of x[order[row] // TOP_K] @ gate_up[expert].T, rows in sorted order."""
    release(CHAINED)
    join(CHAINED)
    column_tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    expert, begin, end = _find_rows(starts_ptr, pid // column_tiles, E, E_BLOCK, BLOCK_M)
    if expert >= E:
        return
    row = begin + tl.arange(0, BLOCK_M)
    row_in = row < end
    token = tl.load(order_ptr + row, mask=row_in, other=0).to(tl.int64) // TOP_K
    col = pid % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    col_in = col < N
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + token[:, None] * x_stride + k[None, :]
    gate_at = gate_up_ptr + expert.to(tl.int64) * (2 * N * H) + col[None, :] * H + k[:, None]
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin_k in range(0, H, BLOCK_K):
        k_in = k < H - begin_k
        x = tl.load(x_at + begin_k, mask=row_in[:, None] & k_in[None, :], other=0.0)
        w_gate = tl.load(gate_at + begin_k, mask=col_in[None, :] & k_in[:, None], other=0.0)
        w_up = tl.load(gate_at + N * H + begin_k, mask=col_in[None, :] & k_in[:, None], other=0.0)
        gate = tl.dot(x, w_gate, gate, input_precision="ieee")
        up = tl.dot(x, w_up, up, input_precision="ieee")
    dtype = hidden_ptr.dtype.element_ty
    activated = activate(gate.to(dtype).to(tl.float32), ACTIVATION).to(dtype).to(tl.float32)
    out = (activated * up.to(dtype).to(tl.float32)).to(dtype)
    at = hidden_ptr + row[:, None].to(tl.int64) * N + col[None, :]
    tl.store(at, out, mask=row_in[:, None] & col_in[None, :])


@triton.jit
def _down_kernel(
    hidden_ptr, order_ptr, starts_ptr, down_ptr, out_ptr,
    E: tl.constexpr, E_BLOCK: tl.constexpr, H: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """out[order[row]] = hidden[row] @ down[expert].T: back from sorted rows to slots."""
    release(CHAINED)
    join(CHAINED)
    column_tiles: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    expert, begin, end = _find_rows(starts_ptr, pid // column_tiles, E, E_BLOCK, BLOCK_M)
    if expert >= E:
        return
    row = begin + tl.arange(0, BLOCK_M)
    row_in = row < end
    col = pid % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    col_in = col < H
    k = tl.arange(0, BLOCK_K)
    hidden_at = hidden_ptr + row[:, None].to(tl.int64) * N + k[None, :]
    down_at = down_ptr + expert.to(tl.int64) * (H * N) + col[None, :] * N + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin_k in range(0, N, BLOCK_K):
        k_in = k < N - begin_k
        hidden = tl.load(hidden_at + begin_k, mask=row_in[:, None] & k_in[None, :], other=0.0)
        w = tl.load(down_at + begin_k, mask=col_in[None, :] & k_in[:, None], other=0.0)
        acc = tl.dot(hidden, w, acc, input_precision="ieee")
    slot = tl.load(order_ptr + row, mask=row_in, other=0).to(tl.int64)
    at = out_ptr + slot[:, None] * H + col[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=row_in[:, None] & col_in[None, :])


def experts_launch(
    x: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    settled: bool = False,
    activation: str = Activation.GELU_TANH,
) -> torch.Tensor:
    tokens, top_k = ids.shape
    if tokens == 0:
        return experts_fake(x, ids, gate_up, down, settled, activation)
    slots = expert_slots(plan_for(x, top_k, gate_up, down), x, ids, gate_up, down, settled, activation)
    return slots.view(tokens, top_k, x.shape[1])


def expert_slots(
    plan: Plan, x, ids, gate_up, down, settled: bool, activation: str = Activation.GELU_TANH
) -> torch.Tensor:
    """Each slot's expert MLP [T * k, H], before its weight. The plan does not show in the bits."""
    if plan.kernel == "stream":
        return stream_experts(x, ids, gate_up, down, settled, activation)
    top_k, (num_experts, hidden, width) = ids.shape[1], down.shape
    order, starts = sort_by_expert(ids, num_experts)
    if plan.kernel == "grouped":
        return grouped_experts(x, order, starts, gate_up, down, top_k, activation)
    num_slots = len(order)
    activated = torch.empty(num_slots, width, dtype=x.dtype, device=x.device)
    slots = torch.empty(num_slots, hidden, dtype=x.dtype, device=x.device)
    shape = dict(E=num_experts, E_BLOCK=triton.next_power_of_2(num_experts), H=hidden, N=width)

    def programs(tile: Tile, columns: int) -> tuple[int]:
        """Every hit expert ends in at most one partly filled tile."""
        row_tiles = (num_slots + min(num_experts, num_slots) * (tile.block_m - 1)) // tile.block_m
        return (row_tiles * triton.cdiv(columns, tile.block_n),)

    _up_kernel[programs(plan.up, width)](
        x, order, starts, gate_up, activated, x.stride(0),
        TOP_K=top_k, ACTIVATION=str(activation), **shape, **_launch_options(plan.up), **chained(x),
    )  # fmt: skip
    _down_kernel[programs(plan.down, hidden)](
        activated, order, starts, down, slots, **shape, **_launch_options(plan.down), **chained(x)
    )
    return slots


def _launch_options(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def experts_fake(x, ids, gate_up, down, settled, activation) -> torch.Tensor:
    return x.new_empty(*ids.shape, x.shape[1])


_experts = define(
    "experts(Tensor x, Tensor ids, Tensor gate_up, Tensor down, bool settled, str activation) -> Tensor",
    check=check_experts, reference=experts_reference, launch=experts_launch, fake=experts_fake,
)  # fmt: skip
