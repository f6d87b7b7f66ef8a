"""EngineConfig refuses what cannot be run, before anything is loaded."""

import math

import pytest

from gemcutter.config import EngineConfig


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("context_length", 1, r"in \[2, "),
        ("context_length", 64.5, "an integer"),
        ("max_running_requests", "3", "an integer"),
        ("max_running_requests", 0, r"in \[1, 4096\]"),
        ("max_running_requests", 10**9, r"in \[1, 4096\]"),
        ("chunked_prefill_size", None, "an integer"),
        ("chunked_prefill_size", True, "an integer"),
        ("cuda_graph_max_bs", -1, r"in \[0, "),
        ("page_size", 24, "a power of two"),
        ("page_size", 16.0, "a power of two"),
        ("page_size", 4, "a power of two from 8"),
        ("port", 65536, r"in \[0, 65535\]"),
        ("mem_fraction_static", math.nan, "between 0 and 1"),
        ("mem_fraction_static", 1.0, "between 0 and 1"),
        ("tensor_parallel_size", 2, "1 so far"),
        ("dtype", "int8", "one of "),
        ("load_format", "pickle", "one of "),
        ("quantization", "awq", "one of "),
    ],
)
def test_refused(name, value, why):
    with pytest.raises(ValueError, match=f"{name} must be {why}.*got"):
        EngineConfig(**{name: value})


def test_edges_are_taken():
    EngineConfig(context_length=2, chunked_prefill_size=1, max_prefill_tokens=1, page_size=8, max_total_tokens=1)
    EngineConfig(cuda_graph_max_bs=0, max_running_requests=4096, port=0)
