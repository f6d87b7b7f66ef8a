"""Selection of experts: softmax of a router's logits, its top k, their weights.

In float: softmax over all experts; top k; divided by their sum; times per_expert_scale[id].
Source: HF `Gemma4TextRouter`, whose torch operations the reference is, one by one.

On a GPU one launch returns the bits that PyTorch returns there in a dozen, since an ulp makes or breaks a tie and
so picks another expert. It adds and orders as PyTorch's CUDA kernels do (read in 2.13, for E <= 1024, k <= 32):
- softmax (`PersistentSoftmax.cuh`): lane l of 32 adds exp(x - max) of experts l, l + 32, ... in turn; then lanes
  add up across distances 16, 8, 4, 2, 1. exp is CUDA's expf, the quotient IEEE's.
- top k (`TensorTopK.cu`, `SortUtils.cuh`): of equal probabilities at the last place the lowest ids are chosen.
  Those above the last place by id, then those at it by id, enter a bitonic network of 32 places, which orders
  equal ones by no simple rule.
- sum of the k (`Reduce.cuh`): first i and i + the largest power of two up to k, then halving, which is again
  distances 16, 8, 4, 2, 1 of 32 lanes padded with zeros.

A NaN or inf among the logits, or -inf throughout, makes the row's probabilities NaN: k distinct ids, weights NaN.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from gemcutter.ops.arguments import FLOATS, check_matrix
from gemcutter.ops.chain import chained, join, release
from gemcutter.ops.library import define

LANES = tl.constexpr(32)
ID_BITS, ID_MASK = tl.constexpr(10), tl.constexpr(1023)
PADDING = tl.constexpr(0xFFFF)
MAX_EXPERTS, MAX_TOP_K = 1024, 32
HALF_WAVE = 2048  # programs of a warp, of which a multiprocessor holds 32


def select_experts(
    logits: torch.Tensor, per_expert_scale: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts from the router's logits.

    Args:
        logits: [T, E] float32, bfloat16 or float16, E up to 1024; dense rows, row stride free. T may be 0.
        per_expert_scale: [E] of any of these dtypes, dense, on the weights.
        top_k: from 1 to E, up to 32.

    Returns:
        ids: [T, top_k] int64, distinct within a row, by descending probability.
        weights: [T, top_k] float32.

    Raises:
        TypeError, ValueError: on other dtypes, shapes and strides.
    """
    return _select_experts(logits, per_expert_scale, top_k)


def check_select_experts(logits: torch.Tensor, per_expert_scale: torch.Tensor, top_k: int) -> None:
    experts = check_choice(logits, top_k)
    if per_expert_scale.dtype not in FLOATS or per_expert_scale.device != logits.device:
        got = f"{per_expert_scale.dtype} on {per_expert_scale.device}"
        raise TypeError(f"per_expert_scale is {got}: a float dtype on {logits.device} is needed")
    if per_expert_scale.shape != (experts,) or not per_expert_scale.is_contiguous():
        got = f"shape {tuple(per_expert_scale.shape)}, strides {per_expert_scale.stride()}"
        raise ValueError(f"per_expert_scale has {got}: one dense scale for each of {experts} experts is needed")


def check_choice(logits: torch.Tensor, top_k: int) -> int:
    """How many experts there are."""
    check_matrix("logits", logits)
    experts = logits.shape[1]
    if experts > MAX_EXPERTS:
        raise ValueError(f"logits have {experts} experts: up to {MAX_EXPERTS} are taken")
    if not 1 <= top_k <= min(experts, MAX_TOP_K):
        raise ValueError(f"top_k is {top_k} of {experts} experts: 1 to {min(experts, MAX_TOP_K)} are taken")
    return experts


def select_experts_reference(
    logits: torch.Tensor, per_expert_scale: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    probabilities = torch.softmax(logits, -1, dtype=torch.float32)
    weights, ids = torch.topk(probabilities, top_k, -1)
    weights /= weights.sum(-1, keepdim=True)
    return ids, weights * per_expert_scale[ids]


@triton.jit
def sum_of_lanes(x, lane, WIDTH: tl.constexpr):
    """The first WIDTH lanes, a power of two, get their sum, added across distances WIDTH / 2 ... 4, 2, 1."""
    for log_distance in tl.static_range(4, -1, -1):
        if (1 << log_distance) < WIDTH:
            x += tl.gather(x, lane ^ (1 << log_distance), 0)
    return x


@triton.jit
def as_ordered(bits):
    """A float's bits as an integer that orders like the float, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def greatest(parts, COUNT: tl.constexpr):
    best = parts[0]
    for i in tl.static_range(1, COUNT):
        best = tl.maximum(best, parts[i])
    return tl.max(best, axis=0)


@triton.jit
def take_greatest(left, lane, GONE: tl.constexpr, E: tl.constexpr, PARTS: tl.constexpr):
    """The greatest of a row in parts, its lowest expert, and the row with GONE in that one's place."""
    best = greatest(left, PARTS)
    candidate = tl.full([LANES], E, tl.int32)
    for i in tl.static_range(PARTS - 1, -1, -1):
        candidate = tl.where(left[i] == best, lane + i * LANES, candidate)
    chosen = tl.min(candidate, axis=0)
    rest = ()
    for i in tl.static_range(PARTS):
        rest += (tl.where(lane + i * LANES == chosen, GONE, left[i]),)
    return best, chosen, rest


@triton.jit
def at_experts(parts, ids, PARTS: tl.constexpr):
    """The numbers of these experts, float32, out of a row in parts."""
    found = tl.zeros([LANES], tl.float32)
    for i in tl.static_range(PARTS):
        found = tl.where(ids // LANES == i, tl.gather(parts[i].to(tl.float32), ids % LANES, 0), found)
    return found


@triton.jit
def _order_as_gathered(entry, ids, lane, last, E: tl.constexpr, WIDTH: tl.constexpr):
    """Entries in the order of their ids, those of the last rank behind the others, padding behind all."""
    place = tl.where(entry >> ID_BITS >= last, E, 0) + ids
    place = tl.where(entry == PADDING, 2 * E + lane, place)
    rank = tl.zeros([LANES], tl.int32)
    for distance in tl.static_range(1, WIDTH):
        rank += (tl.gather(place, lane ^ distance, 0) < place).to(tl.int32)
    sent = (rank << 16) | entry
    received = sent
    for distance in tl.static_range(1, WIDTH):
        other = tl.gather(sent, lane ^ distance, 0)
        received = tl.where(other >> 16 == lane, other, received)
    return received & 0xFFFF


@triton.jit
def _sort_as_network(entry, lane, WIDTH: tl.constexpr):
    """Bitonic network of 32 places by rank: a pair in the wrong order is exchanged, and in runs of rising ranks an
    equal one. Across WIDTH and more, the first WIDTH places meet padding alone and stay."""
    for log_size in tl.static_range(1, 6):
        for step in tl.static_range(log_size):
            distance = 1 << (log_size - 1 - step)
            if distance < WIDTH:
                is_first = (lane & distance) == 0
                falling = (lane & (1 << log_size) & (WIDTH - 1)) != 0
                # Ready when the shuffle is. An other above it: the first has the lower rank, the second not.
                bound = (entry | ID_MASK) - tl.where(is_first, 0, ID_MASK + 1)
                other = tl.gather(entry, lane ^ distance, 0)
                entry = tl.where((other > bound) == (is_first == falling), other, entry)
    return entry


@triton.jit
def _select_kernel(
    logits_ptr, scale_ptr, ids_ptr, weights_ptr, row_stride,
    E: tl.constexpr, TOP_K: tl.constexpr, WIDTH: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One row a program, on one warp. Part i of the row holds experts 32 i + lane.

    An entry is a chosen expert: rank << ID_BITS | id, where equal probabilities share a rank, 0 the highest.
    """
    PARTS: tl.constexpr = (E + LANES - 1) // LANES
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    lane = tl.arange(0, LANES)
    scales = ()
    for i in tl.static_range(PARTS):
        scales += (tl.load(scale_ptr + lane + i * LANES, mask=lane + i * LANES < E, other=0.0),)
    join(CHAINED)
    release(CHAINED)
    x, order = (), ()
    for i in tl.static_range(PARTS):
        expert = lane + i * LANES
        part = tl.load(logits_ptr + expert, mask=expert < E, other=float("-inf")).to(tl.float32)
        x += (part,)
        order += (as_ordered(part.to(tl.int32, bitcast=True)),)

    # Of integers, since a warp has an instruction for their greatest.
    top = as_ordered(greatest(order, PARTS)).to(tl.float32, bitcast=True)
    powers, total = (), tl.zeros([LANES], tl.float32)
    for i in tl.static_range(PARTS):
        powers += (libdevice.exp(x[i] - top),)
        total += powers[i]
    total = sum_of_lanes(total, lane, LANES)  # equal in all lanes

    # Probabilities are not negative: their bits order like them. All NaN are one value.
    left = ()
    for i in tl.static_range(PARTS):
        p = tl.div_rn(powers[i], total)
        bits = tl.where(p == p, p.to(tl.int32, bitcast=True), 0x7FC00000)
        left += (tl.where(lane + i * LANES < E, bits, -1),)
    key, entry = tl.full([LANES], 0, tl.int32), tl.full([LANES], PADDING, tl.int32)
    rank, before = -1, -1
    for place in range(TOP_K):
        best, chosen, left = take_greatest(left, lane, -1, E, PARTS)
        rank += (best != before).to(tl.int32)
        before = best
        key = tl.where(lane == place, best, key)
        entry = tl.where(lane == place, (rank << ID_BITS) | chosen, entry)

    if rank < TOP_K - 1:  # some are equal; sorted by rank, entries move and probabilities stay
        entry = _order_as_gathered(entry, entry & ID_MASK, lane, rank, E, WIDTH)
        entry = _sort_as_network(entry, lane, WIDTH)
    ids = entry & ID_MASK

    inside = lane < TOP_K
    scale = at_experts(scales, ids, PARTS)
    weight = key.to(tl.float32, bitcast=True)
    weight = tl.div_rn(weight, sum_of_lanes(weight, lane, WIDTH))
    tl.store(ids_ptr + row * TOP_K + lane, ids.to(tl.int64), mask=inside)
    tl.store(weights_ptr + row * TOP_K + lane, weight * scale, mask=inside)


def chained_rows(logits: torch.Tensor) -> dict[str, bool]:
    """Unless two kernels do not fit on the card: programs that wait for the first one slow it, 10.4 µs for 7.7."""
    return chained(logits) if len(logits) <= HALF_WAVE else {"CHAINED": False}


def select_experts_launch(
    logits: torch.Tensor, per_expert_scale: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, num_experts = logits.shape
    ids = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    if tokens:
        _select_kernel[(tokens,)](
            logits, per_expert_scale, ids, weights, logits.stride(0),
            E=num_experts, TOP_K=top_k, WIDTH=triton.next_power_of_2(top_k),
            num_warps=1, enable_fp_fusion=False, **chained_rows(logits),
        )  # fmt: skip
    return ids, weights


_select_experts = define(
    "select_experts(Tensor logits, Tensor per_expert_scale, int top_k) -> (Tensor, Tensor)",
    check=check_select_experts, reference=select_experts_reference, launch=select_experts_launch,
)  # fmt: skip
