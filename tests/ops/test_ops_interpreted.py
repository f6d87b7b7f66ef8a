"""The kernels' arithmetic on a CPU: Triton's interpreter against the references."""

import pytest
from interpreter import interpret

CASES = ["rms_norm", "seams", "geglu", "embed", "softcap", "experts"]


@pytest.fixture(scope="module")
def report() -> str:
    pytest.importorskip("triton")
    done = interpret(__file__)
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", CASES)
def test_interpreted(report, name):
    assert f"{name} passed" in report, report[-4000:]


def close(got, want, ulps: float = 4, differing: float = 0.005) -> None:
    """Within some ulps of the dtype, relative to the element or, for sums that cancel, to the largest.

    In half types few elements may differ at all, 1 in 200 and two by chance: a rounding left out moves a quarter.
    """
    assert got.dtype == want.dtype and got.shape == want.shape
    eps = torch.finfo(want.dtype).eps * ulps
    scale = want.abs().max().item() if want.numel() else 0.0
    torch.testing.assert_close(got, want, rtol=eps, atol=eps * scale)
    if want.dtype != torch.float32 and want.numel():
        count = (got != want).sum().item()
        print(f"{count} of {tuple(want.shape)} differ")
        assert count <= differing * want.numel() + 2, count


def check_rms_norm(dtype) -> None:
    weight = torch.randn(70).to(dtype)
    wide = torch.randn(3, 4, 100).to(dtype) * 30
    for x in (wide[:, :, :70], wide[:, 1, :70], wide[0, 0, :70], wide[:0, :, :70]):
        for w in (weight, None):
            assert torch.equal(rms_norm.rms_norm_launch(x, w, 1e-6), rms_norm.rms_norm_reference(x, w, 1e-6))
    for width in (1, 1300, 11_000):  # one part; three; six, whose integers are added in int64
        x = torch.randn(2, width).to(dtype)
        assert torch.equal(rms_norm.rms_norm_launch(x, None, 1e-6), rms_norm.rms_norm_reference(x, None, 1e-6))


def check_seams(dtype) -> None:
    """No sum in them has an order and no step is contracted, so the bits are the references'."""
    for tokens, width in ((0, 64), (3, 64), (5, 100), (2, 1300), (1, 11_000)):
        for module in (attention_seam, layer_seam):  # by itself it takes weights late from 1024 rows, too many here
            module.seam_tile = lambda width, rows, experts: row.row_tile(width) | dict(EARLY=rows % 2 == 0)
        wide = torch.randn(tokens, width + 4).to(dtype) * 3
        out, (residual, routed) = wide[:, :width], torch.randn(2, tokens, width).to(dtype)
        slots, ids = torch.randn(tokens, 6, width).to(dtype), torch.randint(4, (tokens, 6))  # some ids twice
        a, b, c, d = torch.rand(4, width).to(dtype) + 0.5
        for extra in ((None, None), (c, d)):
            args = (out, residual, a, b, 1e-6, *extra)
            for fp8 in ((False, False), (True, False), (False, True), (True, True)):
                got = attention_seam.attention_seam_launch(*args, *fp8)
                same(got, attention_seam.attention_seam_reference(*args, *fp8))
        scalar = torch.rand(1).to(dtype) + 0.5
        for last in ((None, None), (scalar, b)):
            for experts in ((None,) * 5, (routed, c, d, None, None), (slots, c, d, ids, torch.rand(tokens, 6))):
                args = (out, residual, a, 1e-6, *last, *experts)
                for fp8 in (False, True):
                    same(layer_seam.layer_seam_launch(*args, fp8), layer_seam.layer_seam_reference(*args, fp8))


def same(got, want) -> None:
    for g, w in zip(got, want, strict=True):
        assert not count_differing(g, w), (g.float() != w.float()).sum()


def check_geglu(dtype) -> None:
    wide = torch.randn(3, 2 * 1100 + 5).to(dtype) * 2
    for x in (wide[:, : 2 * 1100], wide[:, :62], wide[:, :256], wide[:0, :8]):
        close(geglu.geglu_launch(x), geglu.geglu_reference(x))
    gate, layers = torch.randn(5, 192).to(dtype), torch.randn(5, 3, 192).to(dtype)
    close(geglu.gelu_mul_launch(gate, layers[:, 1]), geglu.gelu_mul_reference(gate, layers[:, 1]))


def check_embed(dtype) -> None:
    wide = torch.randn(30, 1100).to(dtype) * 3
    for table in (wide, wide[:, :70], wide[:, :192]):
        for ids in (torch.tensor([29, 0, 0, 7, 3]), torch.tensor([5]), torch.tensor([], dtype=torch.int64)):
            args = ids, table, table.shape[1] ** 0.5
            same([embed.embed_launch(*args)], [embed.embed_reference(*args)])


def check_softcap(dtype) -> None:
    x = torch.randn(3, 2049).to(dtype) * 30
    got, want = x.clone(), x.clone()
    logits.softcap_launch_(got, 30.0)
    logits.softcap_reference_(want, 30.0)
    close(got, want)


def check_experts(dtype) -> None:
    # Ragged in every dim; 33 and 260 tokens over few experts reach the larger tiles.
    shapes = [(0, 4, 2, 48, 24, False), (1, 5, 3, 70, 33, False)]
    shapes += [(33, 2, 2, 80, 40, False), (19, 9, 4, 48, 72, True)]
    if dtype == torch.float16:
        shapes.append((260, 3, 2, 72, 40, False))
    for tokens, num_experts, top_k, hidden, width, hot in shapes:
        x = torch.randn(tokens, hidden + 3).to(dtype)[:, :hidden]
        scores = torch.rand(tokens, num_experts)
        if hot:
            scores[:, 4:] -= 2  # experts without a row
        ids = scores.topk(top_k, -1).indices
        gate_up = (torch.randn(num_experts, 2 * width, hidden) * hidden**-0.5).to(dtype)
        down = (torch.randn(num_experts, hidden, width) * width**-0.5).to(dtype)
        args = x, ids, gate_up, down
        got = experts.experts_launch(*args)
        close(got, experts.experts_reference(*args), ulps=8)
        args = *args, False, "silu"
        close(experts.experts_launch(*args), experts.experts_reference(*args), ulps=8)
        if tokens:
            assert torch.equal(experts.experts_launch(x[:1], ids[:1], gate_up, down), got[:1])


if __name__ == "__main__":
    import importlib

    import torch

    from gemcutter.verify.compare import count_differing

    modules = (
        "seams.attention_seam", "tokens.embed", "moe.experts", "activations.geglu", "seams.layer_seam",
        "tokens.logits", "norms.rms_norm", "row",
    )  # fmt: skip
    attention_seam, embed, experts, geglu, layer_seam, logits, rms_norm, row = (
        importlib.import_module(f"gemcutter.ops.{name}") for name in modules
    )

    # Poisoned, so that an unwritten output cannot pass for one of zeros.
    empty = torch.empty
    torch.empty = lambda *args, **kwargs: empty(*args, **kwargs).fill_(7)
    for name in CASES:
        torch.manual_seed(0)
        # Interpreted products of bf16 matrices are of their bits as integers.
        for dtype in (torch.float32, torch.float16, *[torch.bfloat16] * (name != "experts")):
            globals()[f"check_{name}"](dtype)
        print(f"{name} passed")
