"""What an FP8 cache holds: rounding against the list of all e4m3 numbers, bounds, exact scales, and the error."""

import pytest
import torch
from attend_cases import as_it_stands_for, error, exact, make_case

from gemcutter.ops.attention.attend import attend
from gemcutter.ops.attention.kv_fp8 import check_kv_cache, kv_from_fp8, kv_scale_above, kv_scales, kv_to_fp8
from gemcutter.ops.attention.rope import rope_table, rotate_reference
from gemcutter.ops.norms.rms_norm import rms_norm
from gemcutter.spec import RopeSpec
from gemcutter.verify.inputs import Draw, Kind

CODES = torch.arange(256, dtype=torch.uint8)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def e4m3_number(code: int) -> float:
    """By the format: 1 sign, 4 exponent bits with bias 7, 3 of mantissa; no infinities, and no NaN here."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


NUMBERS = torch.tensor([e4m3_number(code) for code in range(256)], dtype=torch.float64)


@pytest.mark.parametrize("power", [-15, -4, 0, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_is_the_nearest_of_all_numbers(dtype, power):
    """Every number of the dtype: clamped beyond 448, ties to the even code, zeros keep their sign."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    got = kv_to_fp8(x[:, None, None], torch.tensor([2.0**power])).flatten().view(torch.uint8)
    assert torch.equal(got & 0x7F == 0x7F, x.isnan())
    x, got = x[~x.isnan()], got[~x.isnan()].int()
    size = (x.double() / 2.0**power).abs().clamp(max=448)
    above = torch.searchsorted(NUMBERS[:127].contiguous(), size).clamp(min=1)
    low, high = size - NUMBERS[above - 1], NUMBERS[above] - size
    want = torch.where((low < high) | ((low == high) & (above % 2 == 1)), above - 1, above)
    want += 128 * x.signbit()
    assert torch.equal(got, want.int())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("power", [-15, -4, 0, 7])
def test_read_is_exact(dtype, power):
    scale = torch.tensor([2.0**power, 1.0])
    got = kv_from_fp8(CODES.view(torch.float8_e4m3fn).expand(2, 1, 256), scale, dtype)
    assert got.dtype == dtype
    assert torch.equal(got[0, 0].double(), NUMBERS * 2.0**power)
    again = kv_to_fp8(got.transpose(0, 1), scale).view(torch.uint8)[0, 0]
    assert torch.equal(again, torch.where(CODES & 0x7F == 0x7F, CODES - 1, CODES)), "a stored number is kept"


@pytest.mark.parametrize("kind", [Kind.NORMAL, Kind.HEAVY, Kind.HUGE, Kind.CONSTANT, Kind.TIES, Kind.SMALL])
@pytest.mark.parametrize("head_dim, angles", [(32, 16), (256, 128), (512, 64)])
def test_no_normed_head_is_clamped(head_dim, angles, kind):
    """Nor does much of it vanish, however unlike the weights are: one is 256 times the others."""
    draw = Draw(64, kind, torch.bfloat16, "cpu")
    x, weight = draw.rows(2, head_dim), 0.06 * draw.weight(head_dim).float()
    weight[5] *= 256
    weight = weight.bfloat16()
    x[0] = 0.0  # HUGE has heads whose squares overflow, which the norm makes zeros of
    x[0, :, 5] = 3e4  # all of the norm in one element, and that of the largest weight
    cos, sin = (table[:64, None] for table in rope_table(RopeSpec(1e4, angles), head_dim, 64, x.dtype, x.device))
    k, v = rotate_reference(rms_norm(x, weight, 1e-6), cos, sin), rms_norm(x, None, 1e-6)
    scales = kv_scales(weight, 2)
    assert scales.shape == (2, 2) and (scales.log2() == scales.log2().round()).all()
    for part, scale in zip((k, v), scales, strict=True):
        assert (part.abs() / scale[0]).max() <= 464, "464 still rounds to 448"
        read = kv_from_fp8(kv_to_fp8(part, scale).transpose(0, 1), scale, x.dtype).transpose(0, 1)
        lost = (read - part).double().norm(dim=-1) / part.double().norm(dim=-1).clamp(min=1e-30)
        assert lost.max() <= 2.0**-4, f"{lost.max()}: half a unit of three bits is 2^-4 of any element"


def test_scales_of_bounds():
    assert [kv_scale_above(bound) for bound in (448, 449, 16, 22.7, 7, 0, 1e-30, 1e30)] == [
        1, 2, 2**-4, 2**-4, 2**-6, 1, 2**-15, 2**7,
    ]  # fmt: skip


@pytest.mark.parametrize("power", [-6, -4, -2, 0, 4])
def test_error_of_attention(power):
    """6 % whatever the scale, so long as nothing is clamped and little vanishes: the error is the mantissa's.

    Values of deviation 1, each 2.6 % off, under scores of deviation 3, which the keys' errors move by 0.08: sharper
    than a trained model's.
    """
    case = make_case([(1, 1000), (1, 300), (70, 300)], 4, 2, 256, 16, None, torch.bfloat16)
    wanted, plain = exact(case), error(attend(*case.args), exact(case))
    scales = torch.full((2, 2), 2.0**power)
    k_cache, v_cache = (
        torch.stack([kv_to_fp8(page.transpose(0, 1), scales[0]).transpose(0, 1) for page in cache])
        for cache in (case.k_cache, case.v_cache)
    )
    got = attend(case.q, k_cache.contiguous(), v_cache.contiguous(), case.batch, case.pages, None, 1.0, scales)
    whole = (got.double() - wanted).norm() / wanted.norm()
    print(f"scale 2^{power}: worst row {error(got, wanted):.3f}, all {whole:.3f}; bfloat16 {plain:.3f}")
    assert plain < 0.02 < whole < 0.08


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 37])
def test_attention_is_that_over_what_the_cache_stands_for(dtype, window):
    case = make_case([(1, 1), (1, 90), (70, 70), (33, 300)], 6, 2, 64, 16, window, dtype, fp8=True)
    got = attend(*case.args)
    assert got.dtype == dtype and torch.equal(got, attend(*as_it_stands_for(case).args))
    assert error(got, exact(case)) < (1e-5 if dtype == torch.float32 else 0.04)


LIKE = torch.zeros(1)
SCALES = torch.ones(2, 3)
CACHE = torch.zeros(4, 3, 16, 32).to(torch.float8_e4m3fn)
REFUSED = {
    "no scales": (dict(scales=None), TypeError, "float8_e4m3fn on cpu: without kv_scales torch.float32"),
    "no FP8": (dict(x=CACHE.float()), TypeError, "float32 on cpu: with kv_scales torch.float8_e4m3fn"),
    "e5m2": (dict(x=CACHE.to(torch.float8_e5m2)), TypeError, "float8_e5m2"),
    "heads": (dict(num_kv_heads=2), ValueError, r"dense \[pages, 2, page size, 32\]"),
    "scales of other heads": (dict(scales=torch.ones(2, 4)), ValueError, r"\[2, 3\], for the keys and the values"),
    "scales of bfloat16": (dict(scales=SCALES.bfloat16()), TypeError, "kv_scales is torch.bfloat16"),
    "strided scales": (dict(scales=torch.ones(3, 2).t()), ValueError, "strides"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    changed, kind, words = REFUSED[name]
    good = dict(name="k_cache", x=CACHE, num_kv_heads=3, head_dim=32, like=LIKE, scales=SCALES)
    check_kv_cache(**good)
    with pytest.raises(kind, match=words):
        check_kv_cache(**good | changed)
