"""FP8 checkpoints that are broken: each of many ways is refused by the tensor's name, before a weight is read."""

import fp8_checkpoints as made
import pytest
import torch
from fp8_held import read
from safetensors.torch import load_file, save_file

from gemcutter.checkpoint.files import CheckpointError, shards

BF16 = torch.bfloat16
EXPERT = "model.layers.2.experts.5"
LINEAR = "model.layers.1.mlp.down_proj"


def swap(state, one, other):
    state[one], state[other] = state[other], state[one]


def put(name, value):
    return lambda state: state.update({name: value(state[name]) if callable(value) else value})


def spoil(name, index, value):
    """The scale with another value in one row."""
    return lambda state: state[name].view(-1).__setitem__(index, value)


# How a checkpoint is broken: what is done to its tensors, and what the error says
BROKEN = {
    "an expert's scale is missing": (
        lambda s: s.pop(f"{EXPERT}.up_proj.weight_scale"),
        f"1 problem(s):\n  {EXPERT}.up_proj.weight_scale: missing",
    ),
    "an expert's weight is missing": (
        lambda s: s.pop(f"{EXPERT}.gate_proj.weight"),
        f"1 problem(s):\n  {EXPERT}.gate_proj.weight: missing",
    ),
    "an expert is missing": (
        lambda s: [s.pop(name) for name in list(s) if name.startswith(f"{EXPERT}.")],
        "6 problem(s)",
    ),
    "a linear's scale is missing": (
        lambda s: s.pop(f"{LINEAR}.weight_scale"),
        f"1 problem(s):\n  {LINEAR}.weight_scale: missing",
    ),
    "two experts' shapes are swapped": (
        lambda s: swap(s, f"{EXPERT}.up_proj.weight", f"{EXPERT}.down_proj.weight"),
        f"{EXPERT}.up_proj.weight: shape must be [32, 64], got [64, 32]",
    ),
    "two scales are swapped": (
        lambda s: swap(s, f"{EXPERT}.up_proj.weight_scale", f"{EXPERT}.down_proj.weight_scale"),
        f"{EXPERT}.up_proj.weight_scale: shape must be [32, 1] or [32], got [64, 1]",
    ),
    "a scale is truncated": (
        put(f"{LINEAR}.weight_scale", lambda x: x[:-1]),
        f"{LINEAR}.weight_scale: shape must be [64, 1] or [64], got [63, 1]",
    ),
    "a scale lies down": (
        put(f"{LINEAR}.weight_scale", lambda x: x.T),
        f"{LINEAR}.weight_scale: shape must be [64, 1] or [64], got",
    ),
    "one scale for a tensor of channels": (
        put(f"{LINEAR}.weight_scale", lambda x: x[:1]),
        f"{LINEAR}.weight_scale: shape must be [64, 1] or [64], got",
    ),
    "a scale is NaN": (
        spoil(f"{EXPERT}.down_proj.weight_scale", 9, torch.nan),
        f"{EXPERT}.down_proj.weight_scale: must be finite and above 0, got nan",
    ),
    "a scale is infinite": (
        spoil(f"{LINEAR}.weight_scale", 63, torch.inf),
        f"{LINEAR}.weight_scale: must be finite and above 0, got inf",
    ),
    "a scale is zero": (
        spoil(f"{LINEAR}.weight_scale", 0, 0.0),
        f"{LINEAR}.weight_scale: must be finite and above 0, got 0.0",
    ),
    "a scale is negative": (
        spoil(f"{LINEAR}.weight_scale", 1, -0.5),
        f"{LINEAR}.weight_scale: must be finite and above 0, got -0.5",
    ),
    "a scale is in FP8": (
        put(f"{LINEAR}.weight_scale", lambda x: x.to(torch.float8_e4m3fn)),
        f"{LINEAR}.weight_scale: dtype must be BF16 or F16 or F32, got F8_E4M3",
    ),
    "an expert was left in bfloat16": (
        put(f"{EXPERT}.up_proj.weight", lambda x: x.to(BF16)),
        f"{EXPERT}.up_proj.weight: dtype must be F8_E4M3, got BF16: quantization_config means it",
    ),
    "the other FP8": (
        put(f"{LINEAR}.weight", lambda x: x.float().to(torch.float8_e5m2)),
        f"{LINEAR}.weight: dtype must be F8_E4M3, got F8_E5M2",
    ),
    "the router was quantised": (
        put("model.layers.0.router.proj.weight", lambda x: x.to(torch.float8_e4m3fn)),
        "model.layers.0.router.proj.weight: dtype must be BF16, got F8_E4M3: quantization_config leaves it out",
    ),
    "a norm was quantised": (
        put("model.layers.0.input_layernorm.weight", lambda x: x.to(torch.float8_e4m3fn)),
        "model.layers.0.input_layernorm.weight: dtype must be BF16, got F8_E4M3",
    ),
    "a scale without a quantised weight": (
        put("model.layers.0.router.proj.weight_scale", torch.ones(8, 1)),
        "model.layers.0.router.proj.weight_scale: left over",
    ),
    "an expert too many": (
        put("model.layers.0.experts.8.up_proj.weight", torch.ones(32, 64).to(torch.float8_e4m3fn)),
        "model.layers.0.experts.8.up_proj.weight: left over",
    ),
    "an expert by two names": (
        lambda s: s.update(
            {"model.layers.0.experts.03.up_proj.weight": s["model.layers.0.experts.3.up_proj.weight"]}
        ),
        "model.layers.0.experts.03.up_proj.weight: left over",
    ),
    "experts in both places": (
        lambda s: s.update({n.replace(".experts.", ".moe.experts."): x for n, x in s.items() if EXPERT in n}),
        "model.layers.2.moe.experts.5.gate_proj.weight: left over",
    ),
    "experts apart and together": (
        put("model.layers.0.experts.gate_up_proj", torch.ones(8, 64, 64, dtype=BF16)),
        "model.layers.0.experts.0.gate_proj.weight: left over",
    ),
    "experts together in FP8": (
        lambda s: (
            [s.pop(name) for name in list(s) if "layers.0.experts." in name],
            put("model.layers.0.experts.gate_up_proj", torch.ones(8, 64, 64).to(torch.float8_e4m3fn))(s),
            put("model.layers.0.experts.down_proj", torch.ones(8, 64, 32, dtype=BF16))(s),
        ),
        "model.layers.0.experts.gate_up_proj: dtype must be BF16, got F8_E4M3",
    ),
    "a static scale that no scheme has": (
        put(f"{LINEAR}.input_scale", torch.ones(1)),
        f"{LINEAR}.input_scale: left over",
    ),
    "a zero point": (
        put(f"{LINEAR}.weight_zero_point", torch.zeros(64, 1)),
        f"{LINEAR}.weight_zero_point: left over",
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe")
    return folder, made.make(folder)


def refusal(folder) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    return str(caught.value)


@pytest.mark.parametrize("way", BROKEN)
def test_broken_tensors_are_named(way, whole):
    folder, state = whole
    damage, says = BROKEN[way]
    broken = {name: tensor.clone() for name, tensor in state.items()}
    damage(broken)
    made.write(folder, broken)
    assert says in refusal(folder)
    made.write(folder, state)
    read(folder)  # whole again


def test_every_piece_of_every_expert_is_needed_once(whole):
    folder, state = whole
    pieces = [name for name in state if "layers.3.experts." in name]
    assert len(pieces) == 8 * 3 * 2
    for name in pieces:
        made.write(folder, {key: tensor for key, tensor in state.items() if key != name})
        assert f"1 problem(s):\n  {name}: missing" in refusal(folder)
    made.write(folder, state)
    first, second = shards(folder)
    name = next(name for name in pieces if name in load_file(second))
    save_file(load_file(first) | {name: state[name]}, first)
    assert f"1 problem(s):\n  {name}: stored twice" in refusal(folder)
    made.write(folder, state)


def test_a_truncated_file_is_named(whole):
    folder, state = whole
    path = shards(folder)[1]
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path} is not a whole safetensors file" in refusal(folder)
    made.write(folder, state)


def test_all_damaged_scales_are_counted(whole):
    folder, state = whole
    names = [name for name in state if name.endswith("weight_scale")]
    made.write(folder, {name: x * (torch.nan if name in names[:30] else 1) if name in names else x
                        for name, x in state.items()})  # fmt: skip
    message = refusal(folder)
    assert "30 scale(s)" in message and message.count("must be finite") == 20 and names[0] in message
    made.write(folder, state)


def test_damage_is_found_before_any_weight_is_read(whole, monkeypatch):
    folder, state = whole
    broken = {name: tensor.clone() for name, tensor in state.items()}
    broken[f"{LINEAR}.weight_scale"][3] = torch.nan
    made.write(folder, broken)
    monkeypatch.setattr("gemcutter.checkpoint.load.empty_weights", None)
    assert f"{LINEAR}.weight_scale" in refusal(folder)
    made.write(folder, state)
