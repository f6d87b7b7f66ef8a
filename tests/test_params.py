"""SamplingParams: types, ranges, and what the checkpoint decides."""

import math

import pytest

from gemcutter import SamplingParams
from gemcutter.params import resolve

WHOLE = ("n", "top_k", "seed", "max_tokens", "logprobs")
REAL = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


@pytest.mark.parametrize("name", WHOLE + REAL)
@pytest.mark.parametrize("value", ["1", True, [1], math.nan, math.inf, -math.inf])
def test_no_number_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", WHOLE)
def test_integers_are_no_floats(name):
    with pytest.raises(ValueError, match=f"{name} must be an integer, got 1.0"):
        SamplingParams(**{name: 1.0})


# name, the ends that are allowed, the nearest that are not
ENDS = [
    ("n", (1, 128), (0, 129)),
    ("temperature", (0, 100.0), (-1e-9, 100.1)),
    ("top_p", (1e-9, 1), (0.0, 1.0001)),
    ("top_k", (-1, 0, 2**31 - 1), (-2, 2**31)),
    ("min_p", (0, 1), (-0.001, 1.001)),
    ("presence_penalty", (-2, 2), (-2.01, 2.01)),
    ("frequency_penalty", (-2, 2), (-2.01, 2.01)),
    ("repetition_penalty", (1e-9, 100), (0, 100.1)),
    ("seed", (-(2**63), 2**64 - 1), (-(2**63) - 1, 2**64)),
    ("max_tokens", (1, 2**31 - 1), (0, 2**31)),
    ("logprobs", (0, 20), (-1, 21)),
    ("stop", ("x", ("x" * 1024,) * 16, ()), (("",), ("x",) * 17, ("x" * 1025,), (1,))),
    ("stop_token_ids", ((), (1,) * 1024), ((1,) * 1025,)),
    ("logit_bias", ({}, {5: 100, 6: -100}), ({5: 100.1}, {5: -101}, {5: math.nan}, dict.fromkeys(range(1025), 0))),
]


@pytest.mark.parametrize("name, good, bad", ENDS, ids=[end[0] for end in ENDS])
def test_ends_of_ranges(name, good, bad):
    for value in good:
        SamplingParams(**{name: value})
    for value in bad:
        with pytest.raises(ValueError, match=name.split("_")[0]):
            SamplingParams(**{name: value})


def numbers(params: SamplingParams) -> tuple:
    return params.temperature, params.top_p, params.top_k, params.min_p, params.repetition_penalty


@pytest.mark.parametrize(
    "given, config, expected",
    [
        ({}, {}, (1.0, 1.0, 0, 0.0, 1.0)),
        ({}, {"temperature": 0.7, "top_p": 0.9, "top_k": 64, "min_p": 0.1}, (0.7, 0.9, 64, 0.1, 1.0)),
        ({}, dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "do_sample")), (1.0, 1.0, 0, 0.0, 1.0)),
        ({}, {"do_sample": False, "temperature": 0.7}, (0.0, 1.0, 0, 0.0, 1.0)),
        ({"temperature": 0.5}, {"do_sample": False}, (0.5, 1.0, 0, 0.0, 1.0)),
        ({"temperature": 0, "top_k": 0}, {"temperature": 0.7, "top_k": 64}, (0.0, 1.0, 0, 0.0, 1.0)),
        ({"top_k": -1, "repetition_penalty": 1.2}, {"repetition_penalty": 2.0}, (1.0, 1.0, 0, 0.0, 1.2)),
    ],
)
def test_what_is_open_the_checkpoint_decides(given, config, expected):
    assert numbers(resolve(SamplingParams(**given), config)) == expected
