"""What verify compares, and how: bits, poisoned memory, inputs of every kind, the released shapes."""

import dataclasses
import os
from fractions import Fraction

import numpy as np
import pytest
import released
import torch

from gemcutter.cli import main
from gemcutter.verify.cases import all_cases
from gemcutter.verify.check import check
from gemcutter.verify.compare import POISON, Poisoned, count_differing
from gemcutter.verify.floats import fma
from gemcutter.verify.inputs import ROWS, Draw, Kind
from gemcutter.verify.shapes import MODELS, VOCABULARY

CPU = torch.device("cpu")
FIRST = all_cases()[0]
NAMES = {"E2B": "e2b", "E4B": "e4b", "12B": "12b", "26B-A4B": "26b", "31B": "31b"}


def bits(*values: int, dtype=torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64).to(torch.int32).view(dtype)


@pytest.mark.parametrize(
    "got, want, wrong",
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), 0),
        (torch.tensor([0.0, 0.0]), torch.tensor([-0.0, 0.0]), 1),
        (bits(0x7FC00000, 0xFFC00001), bits(0x7F800001, 0x7FC00000), 0),  # NaN of other payloads and signs
        (torch.tensor([torch.nan, 1.0]), torch.tensor([1.0, torch.nan]), 2),
        (bits(0x3F800001), bits(0x3F800000), 1),  # an ulp
        (bits(1), bits(0), 1),  # a denormal
        (torch.ones(3), torch.ones(2), 2),
        (torch.ones(2).bfloat16(), torch.ones(2), 2),
        (torch.zeros(0, 4), torch.zeros(0, 4), 0),
        (torch.zeros(0, 4), torch.zeros(0, 5), 1),
        (torch.tensor([1, -1]), torch.tensor([1, 1]), 1),
        (torch.tensor([1.0, -0.0]).to(torch.float8_e4m3fn), torch.tensor([1.0, 0.0]).to(torch.float8_e4m3fn), 1),
    ],
)
def test_counts_bits(got, want, wrong):
    assert count_differing(got, want) == wrong
    assert count_differing(got[..., None].expand(*got.shape, 2), want[..., None].expand(*want.shape, 2)) == (
        2 * wrong if got.shape == want.shape and got.dtype == want.dtype else max(2 * want.numel(), 1)
    )


def test_memory_is_poisoned():
    like = torch.zeros(3)
    with Poisoned():
        made = (
            torch.empty(2, 2),
            torch.empty_like(like),
            like.new_empty(1),
            torch.empty(2, dtype=torch.float8_e4m3fn),
        )
    assert all((x.float() == POISON).all() for x in made)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_inputs_are_of_their_kind(dtype):
    x = {kind: Draw(64, kind, dtype, CPU).rows(500) for kind in Kind}
    tiny, largest = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    assert all(a.shape == (64, 500) and a.dtype == dtype for a in x.values())
    assert 0.9 < x[Kind.NORMAL].float().std() < 1.1 and 0.9e-4 < x[Kind.SMALL].float().std() < 1.1e-4
    assert x[Kind.LARGE].float().abs().median() > 5e3 and x[Kind.HEAVY].float().abs().max() > 1e3
    assert (x[Kind.CONSTANT] == 0.75).all() and (x[Kind.ZEROS] == 0).all()
    assert 0.4 < x[Kind.ZEROS].signbit().float().mean() < 0.6
    assert (x[Kind.HUGE] == largest).any(1).sum() == 32
    assert len(x[Kind.TIES].unique()) < 20
    denormal = (x[Kind.DENORMAL] != 0) & (x[Kind.DENORMAL].abs() < tiny)
    assert denormal.float().mean() > 0.9
    assert x[Kind.INF].isposinf().sum() >= 20 and x[Kind.INF].isneginf().sum() >= 20
    assert x[Kind.NAN].isnan().sum() == 32
    assert all(x[kind].isfinite().all() for kind in set(Kind) - {Kind.INF, Kind.NAN, Kind.HEAVY, Kind.LARGE})


def test_arguments_come_again():
    for case in all_cases():
        if case.dtype == torch.bfloat16 and case.bytes_moved(1) < 1 << 18:
            first, second = case.make(3, Kind.HEAVY, CPU), case.make(3, Kind.HEAVY, CPU)
            for a, b in zip(first, second, strict=True):
                assert not isinstance(a, torch.Tensor) or (count_differing(a, b) == 0 and a is not b)


def test_shapes_are_the_released_ones():
    for model in MODELS:
        if model.name not in NAMES:
            continue
        config = released.text_config(NAMES[model.name])
        assert (model.hidden, model.layers) == (config["hidden_size"], config["num_hidden_layers"])
        assert model.mlp[0] == config["intermediate_size"] and VOCABULARY == config["vocab_size"]
        assert model.mlp[1:] == ((2 * model.mlp[0],) if config["use_double_wide_mlp"] else ())
        assert model.per_layer == bool(config["hidden_size_per_layer_input"])
        sliding, full, *shared = model.attention
        assert {layer.heads for layer in model.attention} == {config["num_attention_heads"]}
        assert (sliding.head_dim, full.head_dim) == (config["head_dim"], config["global_head_dim"])
        few = config["num_global_key_value_heads"] or config["num_key_value_heads"]
        assert (sliding.kv_heads, full.kv_heads) == (config["num_key_value_heads"], few)
        assert (full.mode.value == "q_keqv") == config["attention_k_eq_v"]
        assert bool(shared) == bool(config["num_kv_shared_layers"])
        experts = model.experts and tuple(model.experts)
        fields = ("num_experts", "top_k_experts", "moe_intermediate_size")
        assert experts == (tuple(config[f] for f in fields) if config["enable_moe_block"] else None)
    assert ROWS == (0, 1, 2, 3, 7, 16, 64, 255, 256, 257, 1024, 8192)


@pytest.mark.parametrize("op", ["rms_norm", "attention_seam", "layer_seam", "geglu", "rms_norm_fp8", "k_eq_v_norm"])
def test_bytes_are_those_of_the_tensors(op):
    for case in all_cases():
        if case.op == op and case.dtype == torch.bfloat16:
            args = case.make(5, Kind.NORMAL, CPU)
            tensors = [x for x in args if isinstance(x, torch.Tensor)] + case.run(case.reference, args)
            held = sum(x.numel() * x.element_size() for x in tensors)
            assert abs(case.bytes_moved(5) - held) <= 1024, case.shape  # a scalar, a head's weight


def test_every_op_is_there():
    """All that are registered, but for matrix products, which their own tests hold."""
    import gemcutter.ops

    names = {name.rpartition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "gemcutter::" in name}
    products = {"experts", "experts_fp8", "float_linear", "gate_up", "gate_up_fp8", "linear", "linear_fp8"}
    products |= {"seam_gate_up", "seam_linear"}
    assert gemcutter.ops and names - {case.op for case in all_cases()} <= products


def test_counts_what_a_kernel_does_wrong():
    def wrong(x, weight, eps):
        y = FIRST.reference(x, weight, eps)
        y.view(torch.int16)[:, 5] ^= 1  # an ulp of one column
        return y

    result = check(dataclasses.replace(FIRST, launch=wrong), [0, 3], CPU)
    width = FIRST.make(1, Kind.NORMAL, CPU)[0].shape[1]
    assert result.compared == 3 * width * len(Kind)
    assert not result.passed and result.different == sum(f["different"][0] for f in result.failures)
    assert {f["rows"] for f in result.failures} == {3}
    assert next(f for f in result.failures if f["kind"] == "normal")["different"] == [3]


def test_finds_what_is_not_written():
    result = check(dataclasses.replace(FIRST, launch=lambda x, weight, eps: torch.empty_like(x)), [2], CPU)
    assert len(result.failures) == len(Kind) and result.different == result.compared


def test_tells_what_a_kernel_raises():
    def broken(*args):
        raise RuntimeError("no such card")

    result = check(dataclasses.replace(FIRST, launch=broken), [1], CPU)
    assert not result.passed and result.failures[0]["raised"] == "RuntimeError: no such card"
    assert check(dataclasses.replace(FIRST, launch=FIRST.reference), [0, 1, 2], CPU).passed


def test_fma_rounds_once():
    generator = np.random.default_rng(0)
    x, y, z = (generator.standard_normal(3000).astype(np.float32) for _ in range(3))
    z[:1000] = -(x[:1000].astype(np.float64) * y[:1000]).astype(np.float32)  # cancels to what rounding left
    z[1000:2000] *= np.float32(2.0) ** generator.integers(-60, 60, 1000)
    # A product of 1 + 2^-23 lies on a tie of the sum but for its last bits.
    x[-1], y[-1], z[-1] = 1 + 2.0**-23, 1 + 2.0**-23, 2.0**24
    got = fma(*(torch.from_numpy(part) for part in (x, y, z))).numpy()
    for a, b, c, found in zip(x, y, z, got, strict=True):
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        below, above = np.nextafter(found, np.float32(-np.inf)), np.nextafter(found, np.float32(np.inf))
        off = abs(Fraction(float(found)) - exact)
        others = [abs(Fraction(float(other)) - exact) for other in (below, above)]
        assert off <= min(others), (a, b, c, found)


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--op", "no_op"], "no op 'no_op'"),
        (["--shape", "no such model"], "holds 'no such model'"),
        (["--rows", "-1"], "0 or more"),
        (["--rows", "x"], "whole number"),
        (["--compile", "--op", "embed"], "leave out"),
    ],
)
def test_refuses(capsys, monkeypatch, flags, says):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # put back afterwards
    with pytest.raises(SystemExit) as caught:
        main(["verify", *flags])
    assert caught.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize("asked", ["0", "1"])
def test_compiles_whatever_the_environment_says_of_interpreting(monkeypatch, asked):
    monkeypatch.setenv("TRITON_INTERPRET", asked)
    with pytest.raises(SystemExit):  # after the environment is set, before anything is compiled
        main(["verify", "--compile", "--op", "embed"])
    assert os.environ["TRITON_INTERPRET"] == "0"


@pytest.mark.gpu
def test_gpu_kernels(capsys):
    """A slice of the matrix on the card; the whole of it is `gemcutter verify`."""
    assert main(["verify", "--shape", "26B-A4B", "--rows", "0", "--rows", "1", "--rows", "257"]) == 0
    assert '"different": 0' in capsys.readouterr().out.splitlines()[-1]
