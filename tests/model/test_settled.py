"""What the model's kernels read before they join the chain has been written long before (`ops/chain.py`)."""

import re

import pytest
import tiny_models
import torch
from test_ops_swapped import Case
from torch.utils._python_dispatch import TorchDispatchMode

from gemcutter.checkpoint.config import read_spec
from gemcutter.checkpoint.load import load
from gemcutter.verify.compiles import compile_op

# Ops whose every kernel, for few rows, joins first and lets the next one come then.
SETTLERS = {
    "embed", "geglu", "geglu_fp8", "quantize_fp8", "select_experts", "attention_seam", "attention_seam_fp8",
    "layer_seam", "layer_seam_fp8", "linear", "linear_hopper", "linear_fp8", "linear_fp8_hopper",
    "linear_row_hopper", "add_norm", "float_linear", "sigmoid_topk", "swiglu", "t5_norm",
    "seam_gate_up_hopper", "seam_gate_up_wide_hopper", "seam_linear", "seam_linear_hopper",
}  # fmt: skip


class OpsCalled(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "gemcutter":
            self.names.append(function._schema.name.removeprefix("gemcutter::"))
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module", params=["moe", "glm"])
def steps(request, tmp_path_factory) -> list[list[str]]:
    """The ops of steps of a model with experts, in order."""
    return steps_of(request.param, tmp_path_factory)


def steps_of(kind, tmp_path_factory) -> list[list[str]]:
    folder = tmp_path_factory.mktemp(kind)
    tiny_models.make(kind).save_pretrained(folder)
    spec = read_spec(folder)
    case = Case(spec, load(spec, folder, torch.device("cpu"), torch.float32, "auto", 0), [1, 9, 30])
    found = []
    forward = case.model.forward

    def recorded(batch, pool):
        with OpsCalled() as called:
            out = forward(batch, pool)
        found.append(called.names)
        return out

    case.model.forward = recorded
    with torch.inference_mode():
        case.run()
    return found


def test_the_choice_of_experts_is_settled_when_they_come(steps):
    for names in steps:
        assert "experts" in names
        for place, name in enumerate(names):
            chooses = ("select_experts", "sigmoid_topk")
            if name == "experts" or (name == "seam_linear" and "select_experts" in names[:place]):
                chosen = max(i for i in range(place) if names[i] in chooses)
                assert SETTLERS & set(names[chosen + 1 : place]), names[chosen : place + 1]


def test_per_layer_inputs_are_settled_when_a_gate_reads_them(tmp_path_factory):
    for names in steps_of("ple_shared", tmp_path_factory):
        made = names.index("per_layer_inputs")
        assert names.index("seam_linear") > made
        assert SETTLERS & set(names[made + 1 : names.index("seam_linear")]) - {"seam_linear"}


def test_a_step_begins_with_an_op_that_settles_its_batch(steps):
    assert all(names[0] == "embed" for names in steps)


@pytest.mark.parametrize("op", sorted(SETTLERS - {"seam_linear"}))  # its last kernel is one of these
def test_settlers_release_behind_their_join(op):
    kernels = [kernel for kernels in compile_op(op, "sm_90").values() for kernel in kernels]
    chained = [kernel for kernel in kernels if "griddepcontrol" in kernel.asm["ptx"]]
    assert chained
    for kernel in chained:
        steps = re.findall(r"griddepcontrol\.(\w+)", kernel.asm["ptx"])
        assert steps[0] == "wait" and steps.count("launch_dependents") == 1, steps
