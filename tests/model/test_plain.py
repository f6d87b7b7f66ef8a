"""The models in plain words against HF's eager modules: all kinds, float32 and bf16, layer by layer."""

import pytest
import tiny_models
import torch

from gemcutter.checkpoint.config import read_spec
from gemcutter.checkpoint.load import load
from gemcutter.model import glm4_moe_plain, plain
from gemcutter.spec import Family


@pytest.fixture(scope="module", params=tiny_models.KINDS)
def pair(request, tmp_path_factory):
    """(HF's model, spec, weights) of one kind in one dtype; the checkpoint is HF's own."""
    pairs = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_models.make(request.param, dtype=dtype)
        folder = tmp_path_factory.mktemp(request.param)
        model.save_pretrained(folder)
        spec = read_spec(folder)
        pairs[dtype] = model, spec, load(spec, folder, torch.device("cpu"), dtype, "auto", 0)
    return pairs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("length", [1, 7, 50])
def test_equals_hf(pair, dtype, length):
    model, spec, weights = pair[dtype]
    words = plain if spec.family is Family.GEMMA4 else glm4_moe_plain
    ids = torch.randint(3, spec.vocab, (length,), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        theirs = model(ids[None], use_cache=False, output_hidden_states=True)
        ours = words.forward(spec, weights, ids)
        stream = list(words.residual_stream(spec, weights, ids))
    # HF normalises the last of its hidden states, so the streams are compared up to the layer before it.
    for layer, (mine, hidden) in enumerate(zip(stream[:-1], theirs.hidden_states, strict=False)):
        assert torch.equal(mine, hidden[0]), f"residual stream into layer {layer}: {difference(mine, hidden[0])}"
    assert torch.equal(ours, theirs.logits[0]), difference(ours, theirs.logits[0])


def difference(a: torch.Tensor, b: torch.Tensor) -> str:
    return f"{(a != b).sum()} of {a.numel()} differ, by up to {(a.double() - b.double()).abs().max():.3g}"
