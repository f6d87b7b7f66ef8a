"""GLM's seam: the reference against HF's operations one by one, the kernel against the reference."""

import pytest
import torch
from interpreter import interpret

from gemcutter.ops.norms.t5_norm import t5_norm
from gemcutter.ops.quantize_fp8 import Quantized, quantize_fp8
from gemcutter.ops.seams.add_norm import Slots, add_norm, add_norm_launch, add_norm_reference
from gemcutter.verify.compare import count_differing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5


def case(tokens, width, top_k=0, dtype=torch.bfloat16, device="cpu"):
    """x, residual, weight, and the experts' slots or None; rows are cut out of wider ones."""
    g = torch.Generator().manual_seed(tokens + width)

    def randn(*shape, scale=3.0):
        return (torch.randn(*shape, generator=g) * scale).to(device, dtype)

    x, residual = (randn(tokens, width + 8)[:, :width] for _ in range(2))
    slots = None
    if top_k:
        ids = torch.randint(0, 5 * top_k, (tokens, top_k), generator=g).to(device)  # some of them twice
        slots = Slots(randn(tokens, top_k, width), ids, torch.rand(tokens, top_k, generator=g).to(device))
    return x, residual, randn(width, scale=0.2) + 1, slots


def fp8_weight(width):
    return quantize_fp8(torch.randn(16, width).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("top_k", [0, 1, 6, 8])
@pytest.mark.parametrize("tokens, width", [(0, 64), (1, 5120), (5, 100)])
def test_is_hf_step_by_step(tokens, width, top_k, dtype):
    x, residual, weight, slots = case(tokens, width, top_k, dtype)
    hidden, (normed,) = add_norm(x, residual, weight, EPS, [weight], slots)
    branch = x
    if top_k:  # as index_add_ in ascending expert id, then the shared expert
        total = torch.zeros_like(x)
        for token in range(tokens):
            for slot in slots.ids[token].sort(stable=True).indices.tolist():
                y = slots.out[token, slot].float() * slots.weights[token, slot]
                total[token] += y.to(dtype)
        branch = total + x
    want = residual + branch
    assert torch.equal(hidden, want) and torch.equal(normed, t5_norm(want, weight, EPS))


def test_every_reader_gets_its_form():
    x, residual, weight, slots = case(7, 256, 4)
    plain, fp8 = torch.zeros(16, 256).bfloat16(), fp8_weight(256)
    hidden, (a, b, c) = add_norm(x, residual, weight, EPS, [plain, fp8, fp8], slots)
    other, (alone,) = add_norm(x, residual, weight, EPS, [plain], slots)
    assert torch.equal(hidden, other) and torch.equal(a, alone)
    assert isinstance(b, Quantized) and b is c
    for got, want in zip(b, quantize_fp8(a), strict=True):
        assert count_differing(got, want) == 0
    _, (pair,) = add_norm(x, residual, weight, EPS, [fp8], slots)
    assert all(count_differing(got, want) == 0 for got, want in zip(pair, b, strict=True))
    # What a pair tells no dtype of is handed on as it is.
    x, residual, weight, _ = case(7, 256, dtype=torch.float16)
    assert isinstance(add_norm(x, residual, weight, EPS, [fp8])[1][0], torch.Tensor)
    empty = add_norm(x[:0], residual[:0], weight, EPS, [plain])
    assert empty[0].shape == (0, 256)


def test_refusals():
    x, residual, weight, slots = case(5, 64, 4)
    for change, error, message in (
        (dict(x=x.double()), TypeError, "x is torch.float64"),
        (dict(x=x[0]), ValueError, "two dims"),
        (dict(residual=residual[:4]), ValueError, "residual has shape"),
        (dict(residual=residual.float()), TypeError, "residual is torch.float32"),
        (dict(weight=weight[:63]), ValueError, "weight has shape"),
        (dict(slots=slots._replace(ids=slots.ids.float())), TypeError, "ids are torch.float32"),
        (dict(slots=slots._replace(weights=None)), ValueError, "come together"),
        (dict(slots=slots._replace(out=slots.out[:, :3])), ValueError, "slots have shape"),
        (dict(slots=slots._replace(out=slots.out.float())), TypeError, "slots are torch.float32"),
    ):
        args = dict(x=x, residual=residual, weight=weight, eps=EPS, readers=[weight], slots=slots) | change
        with pytest.raises(error, match=message):
            add_norm(**args)
    wide = torch.zeros(1, 65_544, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="up to 65536"):
        add_norm(wide, wide, wide[0], EPS, [fp8_weight(64)])


def test_opcheck():
    for top_k in (0, 4):
        x, residual, weight, slots = case(5, 64, top_k)
        for forms in ((True, False), (True, True)):
            args = x, residual, weight, EPS, *(slots or (None, None, None)), *forms
            checks = [f"test_{name}" for name in ("autograd_registration", "faketensor", "aot_dispatch_dynamic")]
            torch.library.opcheck(torch.ops.gemcutter.add_norm.default, args, test_utils=checks)


def test_kernel_in_the_interpreter():
    done = interpret(__file__)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr


def check(tokens, width, top_k, dtype, device="cpu") -> None:
    x, residual, weight, slots = case(tokens, width, top_k, dtype, device)
    if tokens > 2:
        x[0, 1], residual[1, 2], x[2, 0] = float("inf"), float("nan"), torch.finfo(dtype).max
        if top_k:
            slots.out[0, -1, 3] = float("-inf")
    for plain, fp8 in ((True, False), (False, True), (True, True)):
        args = x, residual, weight, EPS, *(slots or (None, None, None)), plain, fp8
        for got, want in zip(add_norm_launch(*args), add_norm_reference(*args), strict=True):
            assert count_differing(got, want) == 0, (tokens, width, top_k, dtype, plain, fp8)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("top_k", [0, 6, 8])
def test_gpu_kernel(top_k, dtype):
    for tokens, width in ((0, 64), (1, 5120), (3, 100), (300, 5120), (1500, 4096)):
        check(tokens, width, top_k, dtype, "cuda")


if __name__ == "__main__":
    empty = torch.empty
    torch.empty = lambda *args, **kwargs: empty(*args, **kwargs).fill_(7)
    for dtype in DTYPES:
        for top_k in (0, 6):
            for tokens, width in ((0, 64), (3, 64), (4, 100), (3, 1300)):
                check(tokens, width, top_k, dtype)
    print("passed")
