"""Where a patched model must step aside: gradients, training, autocast, hooks, wrappers; and what it refuses."""

import copy
import gc
import threading
import weakref
from types import MethodType

import pytest
import tiny_models
import torch
from torch import nn
from transformers import Gemma4ForCausalLM, Gemma4TextConfig, LlamaConfig, LlamaForCausalLM

import gemcutter
from gemcutter.hf.patch import OURS

IDS = torch.arange(3, 45).view(2, 21)


def make(kind: str = "moe", dtype: torch.dtype = torch.bfloat16):
    return tiny_models.make(kind, dtype)


def classes(model) -> list[type]:
    return [type(module) for module in model.modules()]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("kind", ["moe", "ple_shared"])
def test_unpatch_leaves_nothing(kind):
    model = make(kind)
    kinds, before = classes(model), [dict(vars(module)) for module in model.modules()]
    expected = logits(model)
    assert gemcutter.unpatch(model) is model and classes(model) == kinds  # never patched: nothing to take back
    gemcutter.patch(model)
    assert sum(kind in OURS for kind in kinds) == sum(
        a is not b for a, b in zip(kinds, classes(model), strict=True)
    )
    logits(model)
    gemcutter.unpatch(model)
    assert classes(model) == kinds
    assert [dict(vars(module)) for module in model.modules()] == before
    assert torch.equal(logits(model), expected)


def test_patching_twice_is_patching_once():
    model = make()
    once = classes(gemcutter.patch(model))
    assert classes(gemcutter.patch(model)) == once
    assert not set(classes(gemcutter.unpatch(model))) & set(OURS.values())


def test_names_and_weights_stay():
    model = make()
    names = {name: type(module).__name__ for name, module in model.named_modules()}
    state = model.state_dict()
    gemcutter.patch(model)
    # accelerate and FSDP look up by class name which modules must not be split
    assert {name: type(module).__name__ for name, module in model.named_modules()} == names
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_other_models_are_refused():
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    for change in (gemcutter.patch, gemcutter.unpatch):
        with pytest.raises(TypeError, match="LlamaForCausalLM and holds no Gemma 4.*Gemma4ForCausalLM"):
            change(LlamaForCausalLM(config))
        with pytest.raises(TypeError, match="model is a str: a loaded Gemma 4 model"):
            change("google/gemma-4-E2B")


def test_wrapped_modules_are_refused_and_nothing_is_patched():
    model = make()
    norm = model.model.layers[-1].post_feedforward_layernorm
    norm.forward = MethodType(lambda self, x: type(self).forward(self, x), norm)
    kinds = classes(model)
    with pytest.raises(
        RuntimeError, match=r"layers\.3\.post_feedforward_layernorm has a forward of its own.*device_map"
    ):
        gemcutter.patch(model)
    assert classes(model) == kinds


def gradients(model, reentrant: bool | None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    if reentrant is not None:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["eval", "checkpointing", "reentrant"])
@pytest.mark.parametrize("kind", ["moe", "ple_shared"])
def test_gradients_are_stock_hfs(kind, reentrant):
    """Not one bit of our sums, so stock HF is the oracle."""
    expected = gradients(make(kind, torch.float32), reentrant)
    found = gradients(gemcutter.patch(make(kind, torch.float32)), reentrant)
    assert expected.keys() == found.keys() and len(found) > 20
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())


def test_gradients_of_a_soft_prompt():
    """Weights frozen, only the input wants a gradient."""
    grads = []
    for change in (gemcutter.unpatch, gemcutter.patch):
        model = change(make("dense", torch.float32)).requires_grad_(False)
        prompt = (torch.arange(5 * 64).view(1, 5, 64) / 100).sin().requires_grad_()
        model(inputs_embeds=prompt).logits.square().sum().backward()
        grads.append(prompt.grad)
    assert grads[0].any() and torch.equal(*grads)


def test_frozen_models_need_no_no_grad(hf_sums_as_we_do, monkeypatch):
    model = make().requires_grad_(False)
    expected = model(IDS).logits
    calls = count_calls(monkeypatch)
    assert torch.equal(gemcutter.patch(model)(IDS).logits, expected)
    assert calls["attention_seam"] == 4


def count_calls(monkeypatch) -> dict[str, int]:
    from gemcutter.hf import layer

    calls = {"attention_seam": 0}
    original = layer.attention_seam

    def counted(*args):
        calls["attention_seam"] += 1
        return original(*args)

    monkeypatch.setattr(layer, "attention_seam", counted)
    return calls


@pytest.mark.parametrize("kind", ["moe", "ple_shared"])
def test_autocast(kind):
    model = make(kind, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(model)
        assert torch.equal(logits(gemcutter.patch(model)), expected)


def test_mixed_dtypes(hf_sums_as_we_do):
    """Norms kept in float32 inside a bfloat16 model, as quantisers do."""
    model = make("dense")
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.float()
    expected = logits(model)
    assert torch.equal(logits(gemcutter.patch(model)), expected)


class Int8Linear(nn.Module):
    """A linear as a quantiser leaves it: no float weight, no Linear."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.scale = nn.Buffer(linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.values = nn.Buffer((linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.values.to(x.dtype) * self.scale).T


@pytest.mark.parametrize("kind", ["moe", "ple_shared", "dense_k_eq_v"])
def test_quantised_linears(kind, hf_sums_as_we_do):
    model = make(kind)
    for module in list(model.model.layers.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
    expected = logits(model)
    assert torch.equal(logits(gemcutter.patch(model)), expected)


def seen_by_hooks(model, after_hooks=None) -> list[tuple[str, torch.Tensor]]:
    """What hooks on every module of the layers are shown in one run, those included that an op would take over."""
    seen = []

    def hook_of(name: str):
        def hook(module, args, out):
            seen.append((name, (out[0] if isinstance(out, tuple) else out).clone()))

        return hook

    modules = [(name, each) for name, each in model.model.layers.named_modules() if name]
    handles = [each.register_forward_hook(hook_of(name)) for name, each in modules]
    if after_hooks is not None:
        after_hooks(model)
    logits(model)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("first", ["patch", "hooks"])
@pytest.mark.parametrize("kind", ["moe", "ple_shared"])
def test_hooks_see_what_hf_shows(kind, first, hf_sums_as_we_do):
    model = make(kind)
    expected = seen_by_hooks(model)
    found = seen_by_hooks(gemcutter.patch(model)) if first == "patch" else seen_by_hooks(model, gemcutter.patch)
    assert [name for name, _ in found] == [name for name, _ in expected] and len(found) > 60
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found, expected, strict=True))


def test_a_hook_that_changes_a_step(hf_sums_as_we_do):
    model = make("dense")
    plain = logits(model)
    for name in ("post_attention_layernorm", "self_attn.q_norm", "self_attn.v_norm", "mlp.act_fn"):
        step = model.get_submodule(f"model.layers.1.{name}")
        handle = step.register_forward_hook(lambda module, args, out: out + 1)
        expected = logits(model)
        assert not torch.equal(expected, plain)
        assert torch.equal(logits(gemcutter.patch(model)), expected), name
        gemcutter.unpatch(model)
        handle.remove()


def test_hooks_on_all_modules(hf_sums_as_we_do):
    """PyTorch's global hooks, as its module tracker uses them, see every call."""
    names = []
    model = make()
    found = []
    for change in (gemcutter.unpatch, gemcutter.patch):
        change(model)
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, out: names.append(type(module).__name__)
        )
        logits(model)
        handle.remove()
        found.append(names.copy())
        names.clear()
    assert len(found[0]) > 60 and found[0] == found[1]


def test_a_norm_that_is_replaced(hf_sums_as_we_do):
    model = make("dense")
    gemcutter.patch(model)
    model.model.layers[1].pre_feedforward_layernorm = nn.Identity()
    found = logits(model)
    assert torch.equal(logits(gemcutter.unpatch(model)), found)


@pytest.mark.parametrize(
    "name",
    ["input_layernorm.weight", "post_attention_layernorm.weight", "router.scale", "router.per_expert_scale"],
)
def test_weights_with_gaps(name, hf_sums_as_we_do):
    """HF takes any strides, the ops dense weights only."""
    model = make("moe")
    for layer in model.model.layers:
        weight = layer.get_parameter(name)
        weight.data = torch.stack([weight.data] * 2, -1)[:, 0]
    expected = logits(model)
    assert torch.equal(logits(gemcutter.patch(model)), expected)


@pytest.mark.parametrize("experts, top_k", [(40, 33), (1025, 4)])
def test_more_experts_than_the_op_takes(experts, top_k, hf_sums_as_we_do):
    fields = tiny_models.GEMMA["moe"] | {"num_experts": experts, "top_k_experts": top_k, "num_hidden_layers": 1}
    config = Gemma4TextConfig(**fields | {"layer_types": ["full_attention"]})
    torch.manual_seed(0)
    model = Gemma4ForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="eager").eval()
    expected = logits(model)
    assert torch.equal(logits(gemcutter.patch(model)), expected)


def test_copies_and_pickles(tmp_path):
    model = gemcutter.patch(make())
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert classes(twin) == classes(model) and torch.equal(logits(twin), expected)
    gemcutter.unpatch(model)
    assert set(classes(twin)) & set(OURS.values())  # the copy is a model of its own
    assert torch.equal(logits(twin), expected)
    torch.save(twin, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert classes(loaded) == classes(twin) and torch.equal(logits(loaded), expected)


def test_a_patched_model_is_freed_at_once():
    model = gemcutter.patch(make())
    logits(model)
    reference = weakref.ref(model.model.layers[0].self_attn)
    gc.disable()
    try:
        del model
        assert reference() is None
    finally:
        gc.enable()


def test_two_models_on_two_threads():
    models = [gemcutter.patch(make("moe")), make("moe"), gemcutter.patch(make("ple_shared"))]
    expected = [logits(model) for model in models]
    found = [[] for _ in models]

    def run(index: int) -> None:
        found[index].extend(logits(models[index]) for _ in range(4))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for wanted, runs in zip(expected, found, strict=True):
        assert len(runs) == 4 and all(torch.equal(run, wanted) for run in runs)


@pytest.mark.parametrize("kind", ["dense_k_eq_v", "ple_shared"])
def test_compiled(kind):
    """torch.compile sees through a patched model as through HF's, without a break."""
    model = gemcutter.patch(make(kind))
    expected = logits(model)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(IDS, use_cache=False).logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", ["dense_k_eq_v", "ple_shared"])
def test_compiled_by_inductor(kind, device):
    """`generate` compiles by itself on a GPU with a static cache. Inductor rounds less often than eager, in HF's
    model as in a patched one: tokens of a float32 model are compared.
    """
    model = gemcutter.patch(make(kind, torch.float32).to(device))
    ids = IDS.to(device)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)(ids, use_cache=False).logits
        assert (compiled - model(ids).logits).abs().max() < 1e-3
    assert torch.equal(
        model.generate(ids, max_new_tokens=8, do_sample=False, cache_implementation="static"), expected
    )
