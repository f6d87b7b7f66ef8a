"""Selection by sigmoid: the reference against HF's router, the kernel against the reference."""

import pytest
import torch
from interpreter import interpret
from transformers.models.glm4_moe.configuration_glm4_moe import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

from gemcutter.ops.moe.sigmoid_topk import sigmoid_topk, sigmoid_topk_launch, sigmoid_topk_reference
from gemcutter.verify.compare import count_differing


def case(tokens, experts, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts + 3, generator=g)[:, :experts] * 2
    return logits.to(device), (torch.randn(experts, generator=g) * 0.1).to(device)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("tokens, experts, top_k", [(0, 8, 2), (1, 160, 8), (50, 32, 4), (9, 128, 8), (5, 3, 3)])
def test_is_hfs_router(tokens, experts, top_k, renormalise):
    config = Glm4MoeConfig(
        hidden_size=64, n_routed_experts=experts, num_experts_per_tok=top_k, norm_topk_prob=renormalise,
        routed_scaling_factor=2.5,
    )  # fmt: skip
    router = Glm4MoeTopkRouter(config)
    logits, correction = case(tokens, experts)
    router.weight.data = torch.randn(experts, 64, generator=torch.Generator().manual_seed(1))
    router.e_score_correction_bias.copy_(correction)
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(2)) * 0.2
    logits, want_weights, want_ids = router(x)
    ids, weights = sigmoid_topk(logits.detach(), correction, top_k, renormalise, 2.5)
    assert ids.dtype == torch.int64 and weights.dtype == torch.float32
    assert torch.equal(ids.sort(-1).values, want_ids.sort(-1).values)
    order, want_order = ids.argsort(-1), want_ids.argsort(-1)
    ours, theirs = weights.gather(1, order), want_weights.gather(1, want_order)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)  # HF adds up k scores in its own order
    if not renormalise:
        assert torch.equal(ours, theirs)


def test_correction_is_for_the_choice_alone():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    ids, weights = sigmoid_topk(logits, torch.tensor([0.0, 0.0, 5.0, 9.0]), 2, False, 1.0)
    assert ids.tolist() == [[3, 2]]
    assert torch.equal(weights, torch.sigmoid(logits[0, [3, 2]])[None])


def test_equal_ones_by_id_and_nan_first():
    logits, nan = torch.zeros(3, 8), float("nan")
    logits[1, 5], logits[1, 6] = nan, nan
    logits[2] = torch.tensor([float("-inf")] * 4 + [float("inf")] * 4)
    ids, weights = sigmoid_topk(logits, torch.zeros(8), 3, True, 1.0)
    assert ids.tolist() == [[0, 1, 2], [5, 6, 0], [4, 5, 6]]
    assert torch.equal(weights[0], torch.full((3,), 0.5) / 1.5) and weights[1].isnan().all()


def test_refusals():
    logits, correction = case(5, 16)
    for change, error, message in (
        (dict(logits=logits.bfloat16()), TypeError, "logits is torch.bfloat16"),
        (dict(correction=correction.bfloat16()), TypeError, "correction is torch.bfloat16"),
        (dict(correction=correction[:15]), ValueError, "correction has shape"),
        (dict(top_k=17), ValueError, "top_k is 17 of 16"),
        (dict(top_k=0), ValueError, "top_k is 0"),
        (dict(logits=torch.zeros(1, 1025), correction=torch.zeros(1025)), ValueError, "1025 experts"),
    ):
        args = dict(logits=logits, correction=correction, top_k=4, renormalise=True, scale=1.0) | change
        with pytest.raises(error, match=message):
            sigmoid_topk(**args)


def test_opcheck():
    torch.library.opcheck(torch.ops.gemcutter.sigmoid_topk.default, (*case(5, 16), 4, True, 2.5))


def test_kernel_in_the_interpreter():
    done = interpret(__file__)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr


def cases(device="cpu"):
    for experts, top_k in ((160, 8), (128, 8), (33, 32), (7, 7), (5, 1), (1024, 32)):
        logits, correction = case(6, experts, device)
        logits[1] = logits[1].round()  # ties
        correction[::2] = 0.0
        logits[2, 0], logits[2, -1] = float("nan"), float("inf")
        logits[3] = -200.0  # scores of 0
        logits[4] = 0.0
        yield logits, correction, top_k


@pytest.mark.gpu
@pytest.mark.parametrize("renormalise", [True, False])
def test_gpu_kernel(renormalise):
    for logits, correction, top_k in cases("cuda"):
        for scale in (1.0, 2.5):
            args = logits, correction, top_k, renormalise, scale
            for got, want in zip(sigmoid_topk(*args), sigmoid_topk_reference(*args), strict=True):
                assert count_differing(got, want) == 0, (logits.shape, top_k)
    logits, correction = case(5000, 160, "cuda")
    args = correction, 8, renormalise, 2.5
    for got, want in zip(sigmoid_topk(logits, *args), sigmoid_topk_reference(logits, *args), strict=True):
        assert count_differing(got, want) == 0
    assert torch.equal(sigmoid_topk(logits[7:8], *args)[1], sigmoid_topk(logits, *args)[1][7:8])


if __name__ == "__main__":
    from gemcutter.verify import cuda_arithmetic

    for logits, correction, top_k in cases():
        for renormalise in (True, False):
            args = logits, correction, top_k, renormalise, 2.5
            for got, want in zip(sigmoid_topk_launch(*args), cuda_arithmetic.sigmoid_topk(*args), strict=True):
                assert count_differing(got, want) == 0, (logits.shape, top_k)
    assert sigmoid_topk_launch(logits[:0], *args[1:])[0].shape == (0, 32)
    print("passed")
