"""The engine's forward pass with kernels, and with their references in their place: the same logits, bit for bit.

Matrix products, attention and experts, stay what they are.
"""

from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from forward import CUTS, PAGE, build, step_batch
from swap import REFERENCES, reference, swapped

import gemcutter
from gemcutter.cache.layout import CacheLayout
from gemcutter.cache.pool import KVPool
from gemcutter.checkpoint.config import read_spec
from gemcutter.checkpoint.load import load
from gemcutter.model.models import MODELS as FAMILIES
from gemcutter.spec import Family
from gemcutter.verify.compare import count_differing

MODELS = Path(gemcutter.__file__).parent / "models"
# Ops that only some models call.
EXPERTS, PER_LAYER = {"select_experts", "sort_by_expert"}, {"per_layer_inputs"}
GLM = {"add_norm", "rope_store", "sigmoid_topk", "swiglu", "t5_norm"}


def called_by(spec) -> set[str]:
    if spec.family is Family.GLM4_MOE:
        return GLM | {"embed", "sort_by_expert"}
    left_out = set() if any(layer.experts for layer in spec.layers) else EXPERTS
    left_out = left_out if spec.ple_width else left_out | PER_LAYER
    return set(REFERENCES) - GLM - left_out - (set() if spec.softcap else {"softcap_"})


class Case:
    """A model, and steps through it: prompts side by side, then a token of each, then both mixed."""

    def __init__(self, spec, weights, lengths: list[int]) -> None:
        self.spec, self.model = spec, FAMILIES[spec.family](spec, weights, 2048)
        self.dtype, self.device = weights.embed.dtype, weights.embed.device
        self.layout = CacheLayout.of(spec, PAGE, self.dtype.itemsize)
        longest = self.layout.num_pages(max(lengths) + 2)
        rng = np.random.default_rng(0)
        self.pages = len(lengths) * longest + 1
        self.tables = {
            kind: (1 + rng.permutation(self.pages - 1)).astype(np.int32).reshape(len(lengths), longest)
            for kind in self.layout.kinds
        }
        prompts = [(0, length) for length in lengths]
        decodes = [(length, length + 1) for length in lengths]
        mixed = [(length + 1, length + 2) for length in lengths[:-1]] + [(lengths[-1] // 2, lengths[-1])]
        self.steps = [prompts, decodes, mixed]

    def run(self) -> tuple[list[torch.Tensor], KVPool]:
        pool = KVPool(self.spec, self.layout, dict.fromkeys(self.layout.kinds, self.pages), self.dtype, self.device)
        generator = torch.Generator().manual_seed(1)
        logits = []
        for chunks in self.steps:
            count = sum(stop - start for start, stop in chunks)
            ids = torch.randint(self.spec.vocab, (count,), generator=generator).to(self.device)
            batch = step_batch(ids, chunks, self.tables)
            logits.append(self.model.forward(batch, pool))
        return logits, pool


def differing(ours: tuple, theirs: tuple, spec) -> dict[str, int]:
    """Elements that differ, of the logits of each step and of all caches."""
    found = {f"step {i}": count_differing(a, b) for i, (a, b) in enumerate(zip(ours[0], theirs[0], strict=True))}
    for layer in spec.layers:
        found[f"k of {layer.index}"] = count_differing(ours[1].k(layer.index), theirs[1].k(layer.index))
        found[f"v of {layer.index}"] = count_differing(ours[1].v(layer.index), theirs[1].v(layer.index))
    return {name: count for name, count in found.items() if count}


@pytest.mark.parametrize("kind", ["moe", "ple_shared", "glm"])
@torch.inference_mode()
def test_swap_reaches_every_op(kind, tmp_path):
    """On a CPU references run anyway, so this is about the swap: it is seen, wrong ops are found, and it ends."""
    tiny_models.make(kind).save_pretrained(tmp_path)
    spec = read_spec(tmp_path)
    case = Case(spec, load(spec, tmp_path, torch.device("cpu"), torch.float32, "auto", 0), [1, 9, 30])
    want = case.run()
    called = called_by(spec) - {"sort_by_expert"}  # the experts' reference does not sort
    with swapped("CPU", **{op: reference(op) for op in REFERENCES}) as calls:
        assert not differing(case.run(), want, spec)
    assert set(calls) == called, set(calls) ^ called
    for op in called:
        with swapped("CPU", **{op: off_by_an_ulp(reference(op))}):
            assert differing(case.run(), want, spec), f"nobody notices a wrong {op}"
    before = calls.total()
    assert not differing(case.run(), want, spec) and calls.total() == before


def off_by_an_ulp(function):
    """The same function, but the floats it returns, or changes, are one step larger."""

    def wrong(*args):
        found = function(*args)
        results = [args[0]] if found is None else [found] if isinstance(found, torch.Tensor) else found
        for x in results:
            if x.is_floating_point():
                x.copy_(torch.nextafter(x, torch.full_like(x, torch.inf)))
        return found

    return wrong


def real(name: str, folder) -> tuple:
    """(spec, weights) on the GPU: ours as shipped, released shapes with random weights, a few layers."""
    if name in CUTS:
        return build(name, folder)
    spec = read_spec(MODELS / name)
    return spec, load(spec, MODELS / name, torch.device("cuda"), torch.bfloat16, "auto", 0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["carat", "carat-edge", *CUTS])
@torch.inference_mode()
def test_gpu_logits_are_those_of_the_references(name, tmp_path):
    spec, weights = real(name, tmp_path)
    for lengths in [1, 3, 50, 17, 1100], [50]:  # the latter decodes one token, which has kernels of its own
        case = Case(spec, weights, lengths)
        got = case.run()
        assert all(logits.isfinite().all() for logits in got[0])
        with swapped("CUDA", **{op: reference(op) for op in REFERENCES}) as calls:
            want = case.run()
        assert set(calls) == called_by(spec), set(calls) ^ called_by(spec)
        assert not differing(got, want, spec)
        print(f"{name}: {sum(x.numel() for x in want[0])} logits, none differs; calls {dict(calls)}")
