"""GLM-4.7: a dense layer and one with experts at their real widths, bf16, on a GPU.

Close to plain, the very bits of the references of the ops, and the same in any company.
"""

import numpy as np
import pytest
import torch
from forward import PAGE, step_batch
from glm_cut import build
from swap import REFERENCES, reference, swapped
from test_ops_swapped import Case, called_by, differing

from gemcutter.cache.layout import CacheLayout
from gemcutter.cache.pool import KVPool
from gemcutter.model import glm4_moe
from gemcutter.model import glm4_moe_plain as plain
from gemcutter.ops.norms.t5_norm import t5_norm

CHUNKS = [(0, 400), (400, 620), (620, 621)]


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    return build(tmp_path_factory.mktemp("glm"))


@pytest.mark.gpu
@torch.inference_mode()
def test_gpu_layers_stay_close_to_plain(cut, monkeypatch):
    """Tokens whose eighth and ninth expert are a rounding apart are counted, and left out."""
    spec, weights = cut
    total = CHUNKS[-1][1]
    ids = torch.randint(0, spec.vocab, (total,), generator=torch.Generator("cuda").manual_seed(5), device="cuda")
    chosen, chosen_plainly = [], []
    for module, name, results in ((glm4_moe, "sigmoid_topk", chosen), (plain, "router", chosen_plainly)):
        original = getattr(module, name)

        def recorded(*args, original=original, results=results):
            results.append(original(*args))
            return results[-1]

        monkeypatch.setattr(module, name, recorded)
    stream = list(plain.residual_stream(spec, weights, ids))
    layout = CacheLayout.of(spec, PAGE, 2)
    count = layout.num_pages(total)
    tables = {
        kind: (1 + np.random.default_rng(6).permutation(count)).astype(np.int32)[None] for kind in layout.kinds
    }
    pool = KVPool(spec, layout, dict.fromkeys(layout.kinds, count + 1), torch.bfloat16, torch.device("cuda"))
    model = glm4_moe.Glm4Moe(spec, weights, 2048)
    for layer, w in zip(spec.layers, weights.layers, strict=True):
        parts = []
        for start, stop in CHUNKS:
            batch = step_batch(ids[start:stop], [(start, stop)], tables)
            hidden = stream[layer.index][start:stop]
            normed = t5_norm(hidden, w.input_norm, spec.eps)
            parts.append(model.decoder_layer(layer, w, weights.norm, weights.head, hidden, normed, batch, pool)[0])
        ours, theirs = torch.cat(parts).float(), stream[layer.index + 1].float()
        if layer.experts:
            got = torch.cat([ids for ids, _ in chosen]).sort(-1).values
            same = (got == chosen_plainly[0][0].sort(-1).values).all(-1)
            print(f"layer {layer.index}: {int((~same).sum())} of {total} tokens take other experts")
            assert same.float().mean() > 0.9
            ours, theirs = ours[same], theirs[same]
        error = ((ours - theirs).norm() / theirs.norm()).item()
        print(f"layer {layer.index}: relative error {error:.2e}")
        assert error <= 1e-2


@pytest.mark.gpu
@torch.inference_mode()
def test_gpu_logits_are_those_of_the_references_and_of_no_company(cut):
    spec, weights = cut
    lengths = [1, 3, 50, 17, 300]
    case = Case(spec, weights, lengths)
    got = case.run()
    assert all(logits.isfinite().all() for logits in got[0])
    with swapped("CUDA", **{op: reference(op) for op in REFERENCES}) as calls:
        want = case.run()
    assert set(calls) <= called_by(spec), set(calls) - called_by(spec)
    assert not differing(got, want, spec)
    generator = torch.Generator().manual_seed(1)
    ids = [
        torch.randint(spec.vocab, (sum(b - a for a, b in chunks),), generator=generator) for chunks in case.steps
    ]
    begin = np.cumsum([0, *lengths])
    pages = dict.fromkeys(case.layout.kinds, case.pages)
    for i, length in enumerate(lengths):
        pool = KVPool(spec, case.layout, pages, case.dtype, case.device)
        tables = {kind: table[i : i + 1] for kind, table in case.tables.items()}
        prompt = step_batch(ids[0][begin[i] : begin[i + 1]].cuda(), [(0, length)], tables)
        decode = step_batch(ids[1][i : i + 1].cuda(), [(length, length + 1)], tables)
        for step, batch in enumerate((prompt, decode)):
            assert torch.equal(case.model.forward(batch, pool)[0], got[0][step][i]), (length, step)
