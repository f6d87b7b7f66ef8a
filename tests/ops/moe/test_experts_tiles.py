"""Plans do not show in the bits: tiles in Triton's interpreter; on a GPU every kernel and a table's every plan."""

import pytest
import torch
from interpreter import interpret

from gemcutter.ops.moe import experts_table
from gemcutter.ops.moe.expert_slots import expert_slots
from gemcutter.ops.moe.experts_table import KERNELS, Plan, Tile, read_table
from gemcutter.ops.moe.experts_tiles import built_in_tiles, takes

# Blocks of M, N and K; the experts below, 80 deep and 48 wide, leave a part of most of them empty.
BLOCKS = [(16, 32, 64), (32, 16, 128), (64, 64, 16), (128, 128, 32), (16, 256, 256)]


def test_interpreted_tiles_have_the_bits_of_the_reference():
    pytest.importorskip("triton")
    done = interpret(__file__)
    assert done.stdout.count("tiles passed") == 2, done.stdout + done.stderr


def check_tiles(dtype) -> None:
    """Sums of small integers are exact in any order: what differs is a row, a column or a step of K astray."""
    for tokens, num_experts, top_k, hot in ((1, 5, 3, None), (37, 6, 2, None), (37, 9, 2, 2), (70, 2, 2, None)):
        hidden, width = 80, 48
        scores = torch.rand(tokens, num_experts)
        if hot:
            scores[:, hot:] -= 2
        ids = scores.topk(top_k, -1).indices
        x = torch.randint(0, 2, (tokens, hidden + 3)).to(dtype)[:, :hidden]
        x[:, 0] = 1
        gate_up = torch.randint(-1, 2, (num_experts, 2 * width, hidden)).to(dtype)
        gate_up[:, :width, 0] = 40  # gates of 8 and more, which the activation leaves as they are
        down = torch.randint(-1, 2, (num_experts, hidden, width)).to(dtype)
        want = x.new_empty(tokens * top_k, hidden)
        for slot, expert in enumerate(ids.flatten().tolist()):
            gate, up = (x[slot // top_k].double() @ gate_up[expert].double().T).to(dtype).chunk(2)
            assert gate.min() >= 8
            want[slot] = (gate * up).double() @ down[expert].double().T
        for up, low in zip(BLOCKS, BLOCKS[2:] + BLOCKS[:2], strict=True):
            plan = Plan("tiles", Tile(*up, 4, 2), Tile(*low, 4, 2))
            got = expert_slots(plan, x, ids, gate_up, down, False)
            assert torch.equal(got, want), f"{plan}: {(got != want).sum()} of {want.numel()} differ"


def gpu_tables():
    """Those of this machine's card."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    tables = (read_table(path) for path in sorted(experts_table.FOLDER.glob("*.json")))
    return [table for table in tables if table.device == name]


@pytest.mark.gpu
@pytest.mark.parametrize("hot", [None, 16], ids=["spread", "hot"])
def test_gpu_plans_of_the_tables_have_one_result(hot):
    for table in gpu_tables():
        (e, k, h, n), dtype = table.shape, getattr(torch, table.dtype)
        torch.manual_seed(0)
        gate_up, down = (
            torch.empty(size, dtype=dtype, device="cuda").normal_(0, size[-1] ** -0.5)
            for size in ((e, 2 * n, h), (e, h, n))
        )
        for tokens in (1, 8, 16, 100, 700):
            x = torch.randn(tokens, h, device="cuda").to(dtype)
            x[0, ::7] *= 100
            scores = torch.rand(tokens, e, device="cuda")
            if hot:
                scores[:, hot:] -= 2
            ids = scores.topk(k, -1).indices
            want = expert_slots(Plan("tiles", *built_in_tiles(dtype, 1)), x, ids, gate_up, down, False)
            plans = {*table.plans.values(), *(Plan(kernel) for kernel in KERNELS if kernel != "tiles")}
            for plan in plans:
                if takes(plan, x, gate_up, down):
                    poison = [want.new_full((len(want), width), float("nan")) for width in (n, h)]
                    del poison
                    got = expert_slots(plan, x, ids, gate_up, down, False)
                    assert torch.equal(got, want), f"{tokens} tokens, {plan}: {(got != want).sum()} differ"


if __name__ == "__main__":
    # Poisoned, so that an unwritten output cannot pass for one of zeros.
    empty = torch.empty
    torch.empty = lambda *args, **kwargs: empty(*args, **kwargs).fill_(7)
    for dtype in (torch.float16, torch.bfloat16):
        torch.manual_seed(0)
        check_tiles(dtype)
        print("tiles passed")
