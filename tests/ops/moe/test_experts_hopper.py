"""The grouped products of Hopper: their tiles on the CPU, their bits on the card."""

import importlib

import pytest
import torch
from interpreter import interpret

from gemcutter.ops.hopper import loads_by_tma
from gemcutter.ops.moe.expert_slots import expert_slots
from gemcutter.ops.moe.experts_hopper import BLOCK_M, BLOCK_N, HALF, grouped_experts
from gemcutter.ops.moe.experts_results import rows_layout_of
from gemcutter.ops.moe.experts_table import Plan
from gemcutter.ops.moe.experts_tiles import built_in_tiles
from gemcutter.ops.moe.experts_weave import weaves, woven
from gemcutter.ops.moe.sort_by_expert import sort_by_expert


def test_interpreted_table_covers_every_row_once():
    pytest.importorskip("triton")
    done = interpret(__file__)
    assert done.stdout.count("table passed") == 1, done.stdout + done.stderr


def check_table() -> None:
    module = importlib.import_module("gemcutter.ops.moe.experts_hopper")
    generator = torch.Generator().manual_seed(0)
    for num_experts, most_rows in ((1, 500), (5, 300), (16, 700), (128, 40), (100, 1)):
        rows = torch.randint(most_rows + 1, (num_experts,), generator=generator)
        rows[torch.rand(num_experts, generator=generator) < 0.3] = 0
        rows[-1] = BLOCK_M  # a tile just filled
        starts = torch.cat([torch.zeros(1), rows.cumsum(0)]).to(torch.int32)
        want = [
            [expert, first, starts[expert + 1].item()]
            for expert in range(num_experts)
            for first in range(starts[expert].item(), starts[expert + 1].item(), BLOCK_M)
        ]
        most = (len(want) and starts[-1].item() + num_experts * (BLOCK_M - 1)) // BLOCK_M
        table = torch.full((1 + most, 3), -1, dtype=torch.int32)
        width = 1 << (num_experts - 1).bit_length()
        module._tiles_kernel[(1,)](starts, table, E=num_experts, E_BLOCK=width, BLOCK_M=BLOCK_M)
        assert table[0, 0] == len(want) <= most
        assert table[1 : 1 + len(want)].tolist() == want
        assert (table[1 + len(want) :] == -1).all()


@pytest.mark.parametrize("rows", [HALF, BLOCK_M])
@pytest.mark.parametrize("columns", [BLOCK_N // 2, BLOCK_N])
def test_every_element_of_a_tile_has_one_thread(rows, columns):
    layout = rows_layout_of(rows, columns)
    places = torch.zeros(1, 2, dtype=torch.int64)
    for base in (*layout.reg_bases, *layout.lane_bases, *layout.warp_bases):
        places = torch.cat([places, places ^ torch.tensor(base)])
    assert len(places) == rows * columns == len({tuple(place) for place in places.tolist()})
    assert (places.amax(0) == torch.tensor([rows - 1, columns - 1])).all()
    # As the accumulator has it: a warp every 16 rows, a lane's pair of columns within the row's first 32.
    assert layout.warp_bases == [[16, 0], [32, 0]] and layout.reg_bases[:3] == [[0, 1], [0, 2], [0, 4]]


def test_woven_rows_give_each_thread_neighbours():
    """The view that the TMA unit walks, against where wgmma's accumulators lie: two columns of every 8 a thread."""
    weight = torch.arange(192)[:, None].expand(-1, 64).reshape(2, 96, 64).bfloat16()
    blocks = woven(weight, 64, 64).base
    assert torch.equal(blocks.flatten().sort().values, weight.flatten().sort().values)
    for expert_row in (0, 96, 128):
        rows = blocks[expert_row // 32 : expert_row // 32 + 2, ..., 0].flatten() - expert_row
        for thread in range(4):
            held = torch.tensor([column for column in range(64) if column % 8 // 2 == thread])
            assert rows[held].tolist() == [32 * i + 8 * thread + n for i in range(2) for n in range(8)]
    assert weaves(torch.empty(2, 128, 96), torch.empty(2, 96, 64))
    assert not weaves(torch.empty(2, 96, 96), torch.empty(2, 96, 48))
    assert not weaves(torch.empty(2, 128, 80), torch.empty(2, 80, 64))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "tokens,num_experts,top_k,hidden,width,hot",
    [
        (1, 4, 2, 64, 32, None),  # a step a product, fewer stages than the ring has
        (70, 5, 1, 160, 96, None),
        (300, 8, 4, 224, 96, None),
        (900, 16, 3, 160, 32, 3),
        (333, 128, 8, 2816, 704, None),
        (1500, 128, 8, 2816, 704, 9),
    ],
    ids=str,
)
def test_gpu_grouped_products_have_the_bits_of_the_tiles(tokens, num_experts, top_k, hidden, width, hot, dtype):
    generator = torch.Generator("cuda").manual_seed(tokens)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    gate_up = (randn(num_experts, 2 * width, hidden) * hidden**-0.5).to(dtype)
    down = (randn(num_experts, hidden, width) * width**-0.5).to(dtype)
    if not loads_by_tma(gate_up, down):
        pytest.skip("written for Hopper")
    wide = randn(tokens, hidden + 12).to(dtype)
    wide[0, :] = float("nan")  # the tokens beside it, and what lies behind a row, are not to notice
    wide[:, hidden:] = float("inf")
    scores = torch.rand(tokens, num_experts, generator=generator, device="cuda")
    if hot:
        scores[:, hot:] -= 2
    ids = scores.topk(top_k, -1).indices
    plan = Plan("tiles", *built_in_tiles(dtype, 1))
    activation = "silu" if hot else "gelu_tanh"
    want = expert_slots(plan, wide[:, :hidden].contiguous(), ids, gate_up, down, False, activation)
    for x in (wide[:, :hidden], wide[:, :hidden].contiguous(), wide[:, 4 : 4 + hidden]):
        if x.data_ptr() % 16:
            wide[:, 4 : 4 + hidden] = wide[:, :hidden].clone()
        poison = [want.new_full((len(want), columns), float("nan")) for columns in (width, hidden)]
        del poison  # whose memory comes back for the results
        order, starts = sort_by_expert(ids, num_experts)
        got = grouped_experts(x, order, starts, gate_up, down, top_k, activation).view_as(want)
        same = (got == want) | (got.isnan() & want.isnan())
        assert same.all(), f"strides {x.stride()}: {int((~same).sum())} of {want.numel()} differ"
        assert not got.view(tokens, -1)[1:].isnan().any()


if __name__ == "__main__":
    check_table()
    print("table passed")
