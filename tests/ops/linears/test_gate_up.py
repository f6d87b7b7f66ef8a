"""gate_up: the MLP's first half and a router's logits, with the bits of the ops one by one."""

import pytest
import torch
import torch.nn.functional as F

from gemcutter.ops.activations.geglu import geglu
from gemcutter.ops.linears.gate_up import gate_up, gate_up_launch, gate_up_reference
from gemcutter.ops.linears.gate_up_hopper import MOST_TOKENS, SHARED, gate_up_tile, streams_gate_up
from gemcutter.ops.linears.linear import linear
from gemcutter.verify.compare import count_differing

# width, depth, experts of E2B (both widths), E4B, 12B, 26B-A4B, 31B; and widths that fill no program.
RELEASED = [
    (6144, 1536, 0),
    (12288, 1536, 0),
    (10240, 2560, 0),
    (15360, 3840, 0),
    (2112, 2816, 128),
    (21504, 5376, 0),
]
ODD = [(33, 320, 0), (1000, 1088, 130), (16, 4096, 2), (96, 448, 70)]
# depths: one step, a prime number of steps (one window), two windows, a ring of three, the widest
DEPTHS = (64, 256, 320, 1024, 1536, 2560, 2816, 3840, 4352, 5376, 8192, 21504)


def case(rows: int, width: int, depth: int, experts: int, dtype=torch.bfloat16, device="cpu") -> list:
    generator = torch.Generator(device).manual_seed(rows + width)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

    x, weight = normal(rows, depth), normal(2 * width, depth, scale=depth**-0.5)
    return [x, weight, normal(rows, depth), normal(experts, depth)] if experts else [x, weight, None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("experts", [0, 10])
@pytest.mark.parametrize("rows", [0, 1, 19])
def test_is_the_mlp_of_hf(rows, experts, dtype):
    arguments = case(rows, 48, 64, experts, dtype)
    x, weight, router_x, router = arguments
    hidden, logits = gate_up(*arguments)
    gate, up = (x.double() @ weight.double().T).chunk(2, -1)
    tolerance = dict(rtol=3e-2, atol=2e-2) if dtype != torch.float32 else dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.double(), F.gelu(gate, approximate="tanh") * up, **tolerance)
    assert torch.equal(hidden, geglu(linear(x, weight)))
    if experts:
        assert torch.equal(logits, linear(router_x, router)) and logits.shape == (rows, experts)
    else:
        assert logits is None
    if rows:
        torch.library.opcheck(torch.ops.gemcutter.gate_up.default, arguments)


def test_refusals():
    x, weight, router_x, router = case(3, 16, 32, 8)
    for arguments, error, message in (
        ((x.double(), weight), TypeError, "x is torch.float64"),
        ((x, weight[:31]), ValueError, "31 rows"),
        ((x, weight.float()), TypeError, "both must agree"),
        ((x, weight, router_x), ValueError, "belong together"),
        ((x, weight, None, router), ValueError, "belong together"),
        ((x, weight, router_x[:2], router), ValueError, "router_x has shape"),
        ((x, weight, router_x, router[:, :16]), ValueError, "rows of 16"),
    ):
        with pytest.raises(error, match=message):
            gate_up(*arguments)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("tokens", [1, 8, 9, MOST_TOKENS])
def test_windows_and_stages_fit(tokens, depth):
    """Windows divide the steps, and all of it fits."""
    tile = gate_up_tile(tokens, depth)
    steps = -(-depth // 256)
    assert steps % tile["WINDOW"] == 0 and tile["X_ROWS"] >= tokens
    held = tile["WINDOW"] * tile["WINDOWS"]
    assert held == steps or tile["WINDOWS"] >= 3, "a ring of fewer windows would overwrite one that is read"
    assert held <= steps
    used = held * 4 * tile["X_ROWS"] * 128 + tile["STAGES"] * 64 * 4 * 128 + 64 * tile["X_ROWS"] * 4
    assert used <= SHARED and tile["STAGES"] >= 1


def poisoned_equal(arguments) -> None:
    """Kernel and the ops one by one, whatever lies in memory that the allocator hands out."""
    torch.empty(64 << 20, dtype=torch.uint8, device="cuda").fill_(255)
    found = gate_up_launch(*arguments)
    x, weight, router_x, router = arguments
    want = [geglu(linear(x, weight))] if router is None else [geglu(linear(x, weight)), linear(router_x, router)]
    for got, ref in zip(found, want, strict=True):
        assert not count_differing(got, ref), (len(x), weight.shape)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*RELEASED, *ODD], ids=str)
def test_gpu_has_the_bits_of_the_ops_one_by_one(shape):
    for rows in (1, 2, 7, 8, 9, 15, MOST_TOKENS, MOST_TOKENS + 1, 64, 65):
        arguments = case(rows, *shape, device="cuda")
        if rows > 4:
            arguments[0][1, 5], arguments[0][2, 7], arguments[0][3] = float("inf"), float("nan"), 0
        assert streams_gate_up(*arguments) == (rows <= MOST_TOKENS) or torch.cuda.get_device_capability() != (9, 0)
        poisoned_equal(arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_gpu_other_dtypes_and_strides(dtype):
    arguments = case(5, 96, 448, 70, dtype, "cuda")
    poisoned_equal(arguments)
    wide = torch.cat([arguments[0], torch.full_like(arguments[0], float("nan"))], 1)
    for columns in (448, 440):  # rows at multiples of 16 bytes, and a depth of no whole chunks
        x = wide[:, :columns]
        poisoned_equal([x, arguments[1][:, :columns].contiguous(), None, None])
    odd = wide.new_empty(5, 903)[:, :448].copy_(arguments[0])  # rows that are at none
    poisoned_equal([odd, arguments[1], None, None])


@pytest.mark.gpu
def test_gpu_a_row_alone_and_in_a_crowd():
    arguments = case(80, 2112, 2816, 128, device="cuda")
    crowd = gate_up_launch(*arguments)
    for begin in (0, 13, 79):
        x, weight, router_x, router = arguments
        alone = gate_up_launch(x[begin : begin + 1], weight, router_x[begin : begin + 1], router)
        assert all(torch.equal(one, all_[begin : begin + 1]) for one, all_ in zip(alone, crowd, strict=True))
    reference = gate_up_reference(*arguments)
    assert all(torch.equal(one, other) for one, other in zip(crowd, reference, strict=True))
