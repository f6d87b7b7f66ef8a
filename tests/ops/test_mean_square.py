"""mean_square: against float64, in any order, at the edges, and beside torch.mean."""

import pytest
import torch

from gemcutter.ops.mean_square import mean_square_reference
from gemcutter.ops.norms.rms_norm import rms_norm

WIDTHS = [1, 33, 256, 2816, 5376, 65536]


def rows(width: int, kind: str) -> torch.Tensor:
    x = torch.randn(16, width, generator=torch.Generator().manual_seed(width))
    if kind == "heavy":
        x = x**7
    elif kind == "one huge":
        x[:, width // 2] = 1e15
    elif kind == "constant":
        x[:] = 1.0 + 2.0**-20
    elif kind == "largest":
        x[:] = 1.9999999
    return x * {"tiny": 1e-18, "small": 1e-4, "large": 1e4, "vast": 1e16}.get(kind, 1.0)


@pytest.mark.parametrize(
    "kind", ["plain", "heavy", "one huge", "constant", "largest", "tiny", "small", "large", "vast"]
)
@pytest.mark.parametrize("width", WIDTHS)
def test_close_to_float64_in_any_order(width, kind):
    """Of eights, and within one of what is added: neighbours, then pairs, then fours."""
    x = rows(width, kind)
    got, want = mean_square_reference(x), x.double().pow(2).mean(-1, keepdim=True)
    assert ((got.double() - want).abs() / want).max() < 2e-7
    whole = width // 8 * 8
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        eights = torch.arange(whole).view(-1, 8)[torch.randperm(whole // 8, generator=generator)]
        order = torch.cat([(eights ^ seed * 2 + 1).flatten(), torch.arange(whole, width)])
        assert torch.equal(mean_square_reference(x[:, order]), got)
    assert torch.equal(mean_square_reference(x[3:4]), got[3:4])


def test_adds_by_halves_within_eight():
    """In another order the small squares would be lost beside the large one, or not."""
    big, small = 1.0, 2.0**-12  # small squared: half of the last place of 1.0, a tie that goes to even
    x = torch.tensor([[big, small, small, 0, 0, 0, 0, 0], [big, 0, small, small, 0, 0, 0, 0]])
    got = mean_square_reference(x) * 8
    assert got[0] == 1 and got[1] > 1


def test_edges():
    inf, nan = float("inf"), float("nan")
    x = torch.zeros(7, 40)
    x[1, 3], x[2, 5], x[3, 0], x[3, 1], x[4] = -inf, nan, inf, nan, 3e38
    x[5], x[6] = 1e-42, 2.0**-127  # denormals: their squares are none
    got = mean_square_reference(x).squeeze()
    assert got[0] == 0 and got[1] == inf and got[2].isnan() and got[3].isnan() and got[4] == inf
    assert got[5] == 0 and got[6] == 0
    assert mean_square_reference(torch.zeros(0, 40)).shape == (0, 1)


def test_how_far_from_torch_mean(capsys):
    """Counted: the mean moves by an ulp or two in half of the rows, a bf16 output in a few of 100,000."""
    moved = total = 0
    worst = 0.0
    for width in (256, 2816, 5376):
        x = torch.randn(400, width, generator=torch.Generator().manual_seed(width)).bfloat16()
        ours, theirs = mean_square_reference(x.float()), x.float().pow(2).mean(-1, keepdim=True)
        worst = max(worst, ((ours - theirs).abs() / theirs).max().item())
        norm = (x.float() * torch.pow(theirs + 1e-6, -0.5)).bfloat16()
        moved += (rms_norm(x, None, 1e-6) != norm).sum().item()
        total += x.numel()
    with capsys.disabled():
        print(f"\nmean square against torch.mean: at most {worst:.1e} apart; {moved} of {total} bf16 outputs move")
    assert worst < 5e-7 and moved < 1e-4 * total
