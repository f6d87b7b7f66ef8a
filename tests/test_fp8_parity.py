"""FP8 checkpoints in the engine against HF: greedy tokens of HF's eager model on the dequantised weights.

HF's linears round their input as W8A8 does, for each token, and multiply by the exact products of the stored
values and scales, in float64. In float32 both sides have the same log-probabilities within 1e-4 or so, until
the last bit of a sum decides which of two values of e4m3, 6 % apart, an input becomes: from there on that
sequence differs by what FP8 is off anyway, and HF's likeliest tokens may change places where they are near. In
bfloat16 that is so at once.
"""

import fp8_checkpoints as made
import pytest
import tiny_models
import torch
from drive import Outcome, finish, request
from torch.overrides import TorchFunctionMode
from transformers import Gemma4ForCausalLM

from gemcutter import LLM, SamplingParams
from gemcutter.checkpoint.files import locate
from gemcutter.checkpoint.quantize import quantize_checkpoint
from gemcutter.config import EngineConfig
from gemcutter.engine import Engine

NEW = 8
LENGTHS = (1, 2, 3, 5, 9, 17, 30)


class W8A8(TorchFunctionMode):
    """F.linear with weights that are in the table quantises its input first."""

    def __init__(self) -> None:
        super().__init__()
        self.exact: dict[int, torch.Tensor] = {}  # by address of a weight: the product of values and scales
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.nn.functional.linear or args[1].data_ptr() not in self.exact:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        x, weight = args[0].float(), self.exact[args[1].data_ptr()]
        scale = (x.abs().amax(-1, keepdim=True).clamp(min=1e-10).double() / 448).float()
        q = (x.double() / scale.double()).float().clamp(-448, 448).to(torch.float8_e4m3fn)
        out = (q.double() * scale.double()) @ weight.T
        bias = args[2] if len(args) > 2 else None
        return (out if bias is None else out + bias.double()).to(args[0].dtype)


def hf_model(kind: str, state: dict, dtype: torch.dtype):
    """HF's model with the dequantised weights, and the mode that it is to run in."""
    model = tiny_models.make(kind, dtype)
    mode = W8A8()
    for name, parameter in model.named_parameters():
        if name.endswith(made.EXPERTS):
            begin, _, kind_of = name.rpartition(".")
            for id in range(len(parameter)):
                parts = ("gate", "up") if kind_of == "gate_up_proj" else ("down",)
                exact = torch.cat([double(state, f"{begin}.{id}.{part}_proj.weight") for part in parts])
                parameter.data[id] = exact
                mode.exact[parameter[id].data_ptr()] = exact
        elif f"{name.removesuffix('.weight')}.weight_scale" in state:
            parameter.data[:] = mode.exact[parameter.data_ptr()] = double(state, name)
        else:
            parameter.data[:] = state[name]
    for name, buffer in model.named_buffers():
        if name in state:
            buffer[:] = state[name]
    return model, mode


def double(state: dict, name: str) -> torch.Tensor:
    return state[name].double() * state[f"{name.removesuffix('.weight')}.weight_scale"].double().reshape(-1, 1)


@pytest.mark.parametrize("kind, dtype", [
    ("dense_k_eq_v", "float32"), ("ple_double_wide", "float32"), ("ple_shared", "bfloat16"), ("moe", "bfloat16"),
    ("glm", "bfloat16"), ("glm_air", "bfloat16"),
])  # fmt: skip
def test_greedy_tokens_are_hfs(kind, dtype, tmp_path):
    state = made.make(tmp_path, kind)
    model, mode = hf_model(kind, state, getattr(torch, dtype))
    drawn = draw(tmp_path, dtype, model.config.vocab_size)
    with mode:
        rounded = compare(drawn, model)
    check(*rounded, exact=dtype == "float32")
    assert mode.calls > 3 * len(model.model.layers)
    assert compare(drawn, model)[0].median() > 2 * rounded[0].median(), "no rounding was seen"


@pytest.mark.parametrize("kind", ["dense_k_eq_v", "ple_shared"])
def test_greedy_tokens_are_those_of_compressed_tensors(kind, tmp_path):
    """HF's model as its own quantiser runs what we wrote, in float32, where it takes scales as they are."""
    pytest.importorskip("compressed_tensors")
    tiny_models.make(kind, torch.bfloat16).save_pretrained(tmp_path / "bf16")
    quantize_checkpoint(tmp_path / "bf16", tmp_path / "fp8", [], lambda done, total: None)
    model = Gemma4ForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.float32, attn_implementation="eager")
    check(*compare(draw(tmp_path / "fp8", "float32", model.config.vocab_size), model), exact=True)


def draw(folder, dtype: str, vocab: int) -> list[tuple[list[int], Outcome]]:
    """Prompts, and what the engine draws."""
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in LENGTHS]
    options = {"device": "cpu", "dtype": dtype, "page_size": 8, "max_total_tokens": 512, "max_running_requests": 4}
    engine = Engine.start(EngineConfig(model_path=str(folder), **options))
    outcomes = finish(engine, [request(str(i), p, max_tokens=NEW, logprobs=5) for i, p in enumerate(prompts)])
    return list(zip(prompts, outcomes, strict=True))


def compare(drawn: list[tuple[list[int], Outcome]], model) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each drawn token: how far our log-probabilities are off HF's, and how far its is below HF's likeliest."""
    off, less = [], []
    for prompt, outcome in drawn:
        assert len(outcome.token_ids) == NEW
        with torch.no_grad():
            logits = model(torch.tensor([prompt + outcome.token_ids]), use_cache=False).logits
        for theirs, ours, token in zip(
            torch.log_softmax(logits[0, len(prompt) - 1 : -1].float(), -1),
            outcome.logprobs,
            outcome.token_ids,
            strict=True,
        ):
            off.append(max(abs(value - theirs[id].item()) for id, value in ours.items()))
            less.append((theirs.max() - theirs[token]).item())
    return torch.tensor(off), torch.tensor(less)


def check(off: torch.Tensor, less: torch.Tensor, exact: bool) -> None:
    """A token drawn at random would be 5 less likely or more."""
    same = off < 1e-3
    assert (less[same] == 0).all() and (less < 1.5).all(), less
    assert same.float().mean() > 0.6 or not exact, off
    assert (less == 0).float().mean() > 0.85, less


@pytest.fixture(scope="module")
def carat(tmp_path_factory):
    """carat in FP8, as `gemcutter quantize` makes it."""
    folder = tmp_path_factory.mktemp("carat") / "fp8"
    quantize_checkpoint(locate("carat"), folder, [], lambda done, total: None)
    return folder


@pytest.mark.parametrize("quantization", ["auto", "fp8"], ids=["quantised before", "quantised on load"])
def test_carat_in_fp8_knows_what_7_and_5_are(quantization, carat):
    model = str(carat) if quantization == "auto" else "carat"
    with LLM(model=model, device="cpu", quantization=quantization) as llm:
        messages = [{"role": "user", "content": "What is 7 + 5?"}]
        [reply] = llm.chat([messages], SamplingParams(temperature=0, max_tokens=24))
    assert "12" in reply.outputs[0].text and "<pad>" not in reply.outputs[0].text
