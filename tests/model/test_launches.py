"""Launches of a layer on a GPU, which docs/kernels.md lists: HF's operations one by one, and ours."""

import glm_cut
import pytest
import torch
from forward import CUTS, PAGE, build, logits_of_all, step_batch
from fp8_weights import quantized

from gemcutter.cache.layout import CacheLayout
from gemcutter.cache.pool import KVPool
from gemcutter.model import glm4_moe_plain, plain
from gemcutter.model.models import MODELS
from gemcutter.run.ahead import compile_ahead
from gemcutter.spec import Family, LayerSpec

# Chunks of sequences, as `step_batch` takes them.
STEPS = {"1 token": [(50, 51)], "8 tokens": [(50, 51)] * 8, "prompt of 1024": [(0, 1024)]}


def launches(run) -> int:
    """Kernels, copies and fills on the GPU."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def described(layer: LayerSpec, family: Family) -> str:
    if family is Family.GLM4_MOE:
        return "experts" if layer.experts else "dense"
    return layer.kind.value + ("" if layer.owns_kv else ", reads shared K/V")


def of_layers(spec, weights, chunks) -> dict[str, int]:
    """By kind of layer, each with the projection of the layer behind it where that is part of it."""
    layout = CacheLayout.of(spec, PAGE, 2)
    pages = layout.num_pages(chunks[0][1])
    pool = KVPool(spec, layout, dict.fromkeys(layout.kinds, pages + 1), torch.bfloat16, weights.embed.device)
    tables = {
        kind: torch.arange(1, pages + 1, dtype=torch.int32).repeat(len(chunks), 1).numpy() for kind in layout.kinds
    }
    model = MODELS[spec.family](spec, weights, 2048)
    calls, layer_of = [], model.decoder_layer

    def recorded(*args):
        calls.append(args)
        return layer_of(*args)

    count = sum(stop - start for start, stop in chunks)
    batch = step_batch(torch.arange(count, device=weights.embed.device), chunks, tables)
    compile_ahead([lambda: logits_of_all(model, batch, pool)])
    model.decoder_layer = recorded
    logits_of_all(model, batch, pool)
    found = {}
    for layer, w, following, *rest in calls:
        following = weights.layers[0] if following is None else following
        if (kind := described(layer, spec.family)) not in found:
            found[kind] = launches(lambda: layer_of(layer, w, following, *rest))  # noqa: B023
    return found


def of_layers_eagerly(spec, weights) -> dict[str, int]:
    """Of one token, which sees itself alone: launches do not depend on keys."""
    hidden = torch.randn(1, spec.hidden, device=weights.embed.device).bfloat16()
    own = torch.randn(1, spec.ple_width, device=weights.embed.device).bfloat16() if spec.ple_width else None
    found, shared = {}, {}
    for layer, w in zip(spec.layers, weights.layers, strict=True):
        if spec.family is Family.GLM4_MOE:
            count = launches(lambda: glm4_moe_plain.decoder_layer(spec, layer, w, hidden))  # noqa: B023
        else:
            count = launches(lambda: plain.decoder_layer(spec, layer, w, hidden, own, shared))  # noqa: B023
        found.setdefault(described(layer, spec.family), count)
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*CUTS, "glm"])
@torch.inference_mode()
def test_fewer_than_hfs(name, tmp_path):
    """Prints the rows of docs/kernels.md."""
    spec, weights = glm_cut.build(tmp_path) if name == "glm" else build(name, tmp_path)
    eager = of_layers_eagerly(spec, weights)
    columns = [of_layers(spec, weights, chunks) for chunks in STEPS.values()]
    in_fp8 = quantized(weights, experts=True)
    columns += [of_layers(spec, in_fp8, chunks) for chunks in STEPS.values()]
    for kind, as_hf in eager.items():
        ours = [column[kind] for column in columns]
        print("|", " | ".join([name, kind, *map(str, [as_hf, *ours])]), "|")
        assert max(ours) < as_hf / 4
