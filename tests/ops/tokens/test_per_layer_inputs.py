"""Per-layer embeddings: the reference against HF's module, the kernel against the reference, bit for bit."""

import pytest
import torch
from interpreter import interpret

from gemcutter.ops.tokens.per_layer_inputs import (
    per_layer_inputs,
    per_layer_inputs_launch,
    per_layer_inputs_reference,
)
from gemcutter.verify.compare import count_differing

EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(tokens: int, layers: int, width: int, hidden: int, dtype, device="cpu") -> tuple:
    """Arguments; some rows large, small, zero of both signs, infinite, NaN, denormal, with one huge element."""
    generator = torch.Generator().manual_seed(tokens)
    wide = torch.randn(tokens, layers * width + 8, generator=generator) * 3
    table = torch.randn(50, layers * width + 8, generator=generator)
    limits = torch.finfo(dtype)
    odd = (1e4, 1e-4, 0.0, -0.0, torch.inf, torch.nan, limits.tiny / 4)
    for row, factor in enumerate(odd[: max(0, tokens - 1)]):
        wide[row + 1] *= factor
        table[row + 2] *= odd[-row - 1]
    wide[: tokens // 2, 3] = limits.max / 2
    wide, table = wide.to(dtype), table.to(dtype)
    weight = (torch.rand(width, generator=generator) + 0.5).to(dtype)
    ids = torch.arange(tokens) % 50
    wide, ids, table, weight = (x.to(device) for x in (wide, ids, table, weight))
    return wide[:, : layers * width], ids, table[:, : layers * width], weight, hidden**-0.5, EPS


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    wrong = count_differing(got, want)
    assert not wrong, f"{wrong} of {want.numel()} differ"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 13])
def test_reference_is_hf(tokens, dtype, hf_sums_as_we_do):
    from transformers.models.gemma4 import modeling_gemma4 as hf

    projected, ids, table, weight, scale, eps = case(tokens, 3, 64, 192, dtype)
    rows = hf.Gemma4TextScaledWordEmbedding(50, 3 * 64, 0, embed_scale=64**0.5).to(dtype)
    rows.weight.data = table.contiguous()
    norm = hf.Gemma4RMSNorm(64, eps=eps).to(dtype)
    norm.weight.data = weight
    identity = rows(ids).reshape(tokens, 3, 64)
    context = norm((projected * scale).reshape(tokens, 3, 64))
    same(per_layer_inputs(projected, ids, table, weight, scale, eps), (context + identity) * 2.0**-0.5)


def test_opcheck():
    torch.library.opcheck(torch.ops.gemcutter.per_layer_inputs.default, case(1, 3, 64, 192, torch.bfloat16))


def test_refusals():
    projected, ids, table, weight, scale, eps = case(4, 3, 64, 192, torch.float32)
    for change, error, message in (
        (dict(projected=projected.double()), TypeError, "projected is torch.float64"),
        (dict(table=table.half()), TypeError, "table is torch.float16"),
        (dict(table=table[:, :64]), ValueError, "table has rows of 64: 192 are needed"),
        (dict(ids=ids.int()), TypeError, "token_ids are torch.int32"),
        (dict(ids=ids[:3]), ValueError, "3 token_ids for 4 rows"),
        (dict(weight=weight[:50].contiguous()), ValueError, "multiple of weight's 50"),
        (dict(weight=weight[:0]), ValueError, "multiple of weight's 0"),
        (dict(weight=weight[::2]), ValueError, "dense weight"),
    ):
        args = dict(projected=projected, ids=ids, table=table, weight=weight) | change
        with pytest.raises(error, match=message):
            per_layer_inputs(*args.values(), scale, eps)


def test_interpreted():
    done = interpret(__file__)
    assert "passed" in done.stdout, (done.stdout + done.stderr)[-4000:]


def check_interpreted(dtype) -> None:
    for tokens, layers, width in ((0, 3, 32), (1, 5, 256), (13, 3, 64), (9, 2, 40)):
        args = case(tokens, layers, width, 1536, dtype)
        got = per_layer_inputs_launch(*args)
        same(got, per_layer_inputs_reference(*args))
        if tokens > 4:
            alone = args[0][4:5], args[1][4:5], *args[2:]
            same(per_layer_inputs_launch(*alone), got[4:5])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layers, hidden", [(35, 1536), (42, 2560)])
def test_gpu_is_the_reference(layers, hidden, dtype):
    for tokens in (0, 1, 2, 7, 64, 257, 1024):
        args = case(tokens, layers, 256, hidden, dtype, "cuda")
        got = per_layer_inputs(*args)
        same(got, per_layer_inputs_reference(*args))
    same(per_layer_inputs(args[0][5:6], args[1][5:6], *args[2:]), got[5:6])
    args = case(20, 3, 40, hidden, dtype, "cuda")  # no power of two
    same(per_layer_inputs(*args), per_layer_inputs_reference(*args))


@pytest.mark.gpu
def test_gpu_past_int32():
    """E4B's table: 262144 rows of 10752 are 2.8e9 elements."""
    projected, ids, small, *rest = case(5, 42, 256, 2560, torch.bfloat16, "cuda")
    table = torch.empty(262_144, 10_752, dtype=torch.bfloat16, device="cuda")
    rows = torch.tensor([0, 262_143, 199_999, 200_000, 131_072], device="cuda")
    table[rows] = small[ids]
    same(per_layer_inputs(projected, rows, table, *rest), per_layer_inputs_reference(projected, ids, small, *rest))


if __name__ == "__main__":
    # Poisoned, so that an unwritten output cannot pass for one of zeros.
    empty = torch.empty
    torch.empty = lambda *args, **kwargs: empty(*args, **kwargs).fill_(7)
    for some in DTYPES:
        check_interpreted(some)
    print("passed")
