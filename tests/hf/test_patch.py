"""A patched model against HF's own: with one order of the norms' sums, every bit; against stock HF, counted."""

import copy
from collections import Counter

import pytest
import released
import tiny_models
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DynamicCache,
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4TextModel,
    Gemma4UnifiedForCausalLM,
    Gemma4UnifiedTextConfig,
    StaticCache,
)

import gemcutter

KINDS = list(tiny_models.GEMMA)
DTYPES = [torch.float32, torch.bfloat16]
PROMPT, STEPS = 21, 4
S, F = "sliding_attention", "full_attention"


class Ops(TorchDispatchMode):
    """Counts gemcutter's ops."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gemcutter":
            self.count[func._schema.name.removeprefix("gemcutter::")] += 1
        return func(*args, **(kwargs or {}))


def prompts(model, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and their mask, the last row padded on the left."""
    generator = torch.Generator().manual_seed(5)
    config = model.config.get_text_config()
    ids = torch.randint(3, config.vocab_size, (rows, PROMPT + STEPS), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, :6] = 0
    return ids.to(model.device), mask.to(model.device)


@torch.no_grad()
def walk(model, cache, rows: int = 2) -> torch.Tensor:
    """Logits of a prompt and of STEPS cached steps behind it: [rows, PROMPT + STEPS, V]."""
    ids, mask = prompts(model, rows)
    parts, begin = [], 0
    for end in [PROMPT, *range(PROMPT + 1, PROMPT + STEPS + 1)]:
        out = model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)
        parts.append(out.logits)
        begin = end
    return torch.cat(parts, 1)


def three_walks(model, make_cache) -> list[torch.Tensor]:
    """Unpatched, patched, unpatched again."""
    results = [walk(model, make_cache(model))]
    for change in (gemcutter.patch, gemcutter.unpatch):
        assert change(model) is model
        results.append(walk(model, make_cache(model)))
    return results


def dynamic(model):
    return DynamicCache(config=model.config)


def static(model):
    return StaticCache(config=model.config, max_cache_len=PROMPT + STEPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_is_hfs(kind, dtype, hf_sums_as_we_do):
    before, patched, after = three_walks(tiny_models.make(kind, dtype), dynamic)
    assert before.isfinite().all() and before.std() > 1
    assert torch.equal(patched, before)
    assert torch.equal(after, before)


@pytest.mark.parametrize("make_cache", [static, lambda model: None], ids=["static", "no_cache"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["dense_k_eq_v", "ple_shared"])
def test_every_bit_is_hfs_with_other_caches(kind, attention, make_cache, hf_sums_as_we_do):
    model = tiny_models.make(kind, torch.bfloat16)
    model.set_attn_implementation(attention)
    if make_cache(model) is None:
        ids, mask = prompts(model)
        with torch.no_grad():
            before = model(ids, attention_mask=mask, use_cache=False).logits
            patched = gemcutter.patch(model)(ids, attention_mask=mask, use_cache=False).logits
    else:
        before, patched, _ = three_walks(model, make_cache)
    assert torch.equal(patched, before)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", KINDS)
def test_ops_run(kind, device):
    """No module fell back to HF's forward: what is compared here ran the ops."""
    model = gemcutter.patch(tiny_models.make(kind, torch.bfloat16).to(device))
    layers, ple = model.config.num_hidden_layers, bool(model.config.hidden_size_per_layer_input)
    with torch.no_grad(), Ops() as ops:
        model(prompts(model)[0])
    expected = {
        "rms_norm": layers + 1 + ple,  # in front of attention, the last one, the per-layer inputs' context
        "qkv_rope_store": layers,
        "attention_seam": layers,
        "layer_seam": layers * (1 + ple),
        "gelu_mul": layers * (1 + ple),
    }
    if model.config.enable_moe_block:
        expected["select_experts"] = layers
    assert ops.count == expected
    gemcutter.unpatch(model)
    with torch.no_grad(), Ops() as ops:
        model(prompts(model)[0])
    assert not ops.count


def count_against_stock(
    name: str, stock: torch.Tensor, patched: torch.Tensor, wide: torch.Tensor, noise=0.1
) -> None:
    """Another order of a sum is as right as HF's: no further from float32 than stock HF is, but for noise."""
    different = (stock != patched).sum().item()
    errors = [(x.float() - wide).abs().mean().item() for x in (stock, patched)]
    off = (stock.float() - patched.float()).abs().max().item()
    print(f"\n{name}: {different} of {stock.numel()} logits differ from stock HF's, at most by {off:.3g};", end=" ")
    print(f"mean error against float32 {errors[0]:.3g} -> {errors[1]:.3g}")
    assert errors[1] <= (1 + noise) * errors[0]


@pytest.mark.parametrize("kind", KINDS)
def test_against_stock_bfloat16(kind):
    before, patched, after = three_walks(tiny_models.make(kind, torch.bfloat16), dynamic)
    wide_model = tiny_models.make(kind)
    wide_model.load_state_dict(tiny_models.make(kind, torch.bfloat16).state_dict())
    count_against_stock(kind, before, patched, walk(wide_model, dynamic(wide_model)))
    assert torch.equal(after, before)


@pytest.mark.parametrize("kind", KINDS)
def test_against_stock_float32(kind):
    before, patched, _ = three_walks(tiny_models.make(kind), dynamic)
    off = (before - patched).abs().max().item()
    print(f"\n{kind}: {(before != patched).sum().item()} of {before.numel()} logits differ, at most by {off:.3g}")
    assert off < 3e-4  # 1e-4 of logits that reach 10 and more; 7e-5 was seen
    assert torch.equal(before.argmax(-1), patched.argmax(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_generate(kind, hf_sums_as_we_do):
    model = tiny_models.make(kind)
    ids, mask = prompts(model)
    options = dict(attention_mask=mask, max_new_tokens=12, do_sample=False)
    expected = model.generate(ids, **options)
    gemcutter.patch(model)
    assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
    assert torch.equal(model.generate(ids, num_beams=2, **options), gemcutter.unpatch(model).generate(
        ids, num_beams=2, **options))  # fmt: skip


def test_recorded_outputs(hf_sums_as_we_do):
    model = tiny_models.make("moe", torch.bfloat16)
    ids, mask = prompts(model)
    kinds = ["hidden_states", "attentions", "router_logits"]
    with torch.no_grad():
        options = dict(attention_mask=mask, **{f"output_{kind}": True for kind in kinds})
        before = model(ids, **options)
        patched = gemcutter.patch(model)(ids, **options)
    for kind in kinds:
        if kind not in before:
            assert kind == "router_logits"  # which transformers 5.17 records and does not hand on
            continue
        ours, theirs = patched[kind], before[kind]
        assert len(ours) == len(theirs) >= model.config.num_hidden_layers
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def unified():
    torch.manual_seed(0)
    config = Gemma4UnifiedTextConfig(**copy.deepcopy(tiny_models.GEMMA["dense_k_eq_v"]))
    config._attn_implementation = "eager"
    return Gemma4UnifiedForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def test_unified(hf_sums_as_we_do):
    model = unified()
    before, patched, after = three_walks(model, dynamic)
    assert torch.equal(before, patched) and torch.equal(before, after)
    with torch.no_grad(), Ops() as ops:
        gemcutter.patch(model)(prompts(model)[0])
    layers = model.config.num_hidden_layers
    assert ops.count["attention_seam"] == ops.count["layer_seam"] == ops.count["qkv_rope_store"] == layers


def test_language_model_inside_another(hf_sums_as_we_do):
    torch.manual_seed(0)
    text = tiny_models.config("moe").to_dict()
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16,
                  num_key_value_heads=2, global_head_dim=16)  # fmt: skip
    config = Gemma4Config(text_config=text, vision_config=vision, audio_config=None)
    model = Gemma4ForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval()
    tower = [type(m) for m in model.model.vision_tower.modules()]
    ids = prompts(model)[0]
    with torch.no_grad():
        before = model(ids).logits
        with Ops() as ops:
            patched = gemcutter.patch(model)(ids).logits
    assert torch.equal(before, patched) and ops.count["attention_seam"] == 4
    assert [type(m) for m in model.model.vision_tower.modules()] == tower


def test_text_model_alone(hf_sums_as_we_do):
    model = tiny_models.make("ple_double_wide", torch.bfloat16).model
    assert type(model) is Gemma4TextModel
    ids, mask = prompts(model)
    with torch.no_grad():
        before = model(ids, attention_mask=mask).last_hidden_state
        assert torch.equal(gemcutter.patch(model)(ids, attention_mask=mask).last_hidden_state, before)


def on_gpu(kind: str, dtype: torch.dtype):
    return tiny_models.make(kind, dtype).cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_is_hfs_on_a_gpu(kind, dtype, hf_sums_as_we_do):
    before, patched, after = three_walks(on_gpu(kind, dtype), dynamic)
    assert torch.equal(after, before), "HF does not repeat itself: nothing is shown"
    assert torch.equal(patched, before), f"{(patched != before).sum().item()} of {before.numel()} differ"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_against_stock_on_a_gpu(kind):
    before, patched, _ = three_walks(on_gpu(kind, torch.bfloat16), dynamic)
    wide_model = tiny_models.make(kind)
    wide_model.load_state_dict(tiny_models.make(kind, torch.bfloat16).state_dict())
    count_against_stock(kind, before.cpu(), patched.cpu(), walk(wide_model, dynamic(wide_model)))


SLICES = {
    "e4b": dict(num_hidden_layers=6, layer_types=[S, F, S, F, S, F], num_kv_shared_layers=2),
    "26b": dict(num_hidden_layers=2, layer_types=[S, F]),
    "31b": dict(num_hidden_layers=2, layer_types=[S, F]),
}


def real_width(name: str):
    """The first layers of a released model, random weights, a small vocabulary."""
    small = {"vocab_size": 4096, "vocab_size_per_layer_input": 4096, "max_position_embeddings": 2048}
    config = Gemma4TextConfig(**(released.config(name)["text_config"] | SLICES[name] | small))
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Gemma4ForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.ndim == 1:  # norms, scales and scalars of 1 hide one that is swapped or forgotten
                tensor.copy_(0.8 + 0.4 * torch.rand(tensor.shape, device="cuda"))
            if key.endswith("q_norm.weight"):
                tensor.mul_(tensor.numel() ** -0.5)
    return model


@pytest.mark.gpu
@pytest.mark.parametrize("name", SLICES)
def test_every_bit_is_hfs_at_real_width(name, hf_sums_as_we_do):
    before, patched, after = three_walks(real_width(name), dynamic)
    assert before.isfinite().all()
    assert torch.equal(after, before)
    assert torch.equal(patched, before), f"{(patched != before).sum().item()} of {before.numel()} differ"


@pytest.mark.gpu
@pytest.mark.parametrize("name", SLICES)
def test_against_stock_at_real_width(name):
    model = real_width(name)
    before, patched, _ = three_walks(model, dynamic)
    # a token whose eighth and ninth expert are a rounding apart moves a mean over fifty of them
    count_against_stock(name, before, patched, walk(model.float(), dynamic(model)), noise=0.25)
