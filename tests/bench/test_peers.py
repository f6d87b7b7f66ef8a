"""That a peer's sequence of launches does the op's job, and that absent packages are left out."""

import copy
import sys

import engine_kernels
import pytest
import torch

from gemcutter.bench.ops import compare
from gemcutter.bench.peers import (
    HOW_TO_ADD,
    PEERS,
    activations,
    attention,
    experts,
    glm,
    norms,
    packages,
    why_absent,
)
from gemcutter.verify.cases import all_cases
from gemcutter.verify.inputs import Kind

CASES = [case for case in all_cases() if case.dtype is torch.bfloat16]
PAIRS = [(case, number) for case in CASES for number in range(len(PEERS[case.op]))]


def name(pair) -> str:
    case, number = pair
    return f"{case.op}-{case.shape}-{number + 1}".replace(" ", "_")


def results(case, number, rows, device):
    """What the peer gives and what the reference does; None where the peer has no counterpart."""
    args = case.make(rows, Kind.NORMAL, device)
    call = PEERS[case.op][number].prepare(*copy.deepcopy(args))
    return call and (call(), case.run(case.reference, args))


@pytest.fixture
def engines(monkeypatch):
    for module in (norms, attention, experts, activations, glm):
        fakes = dict(
            sgl_kernel=lambda: engine_kernels.SGL_KERNEL,
            vllm_ops=lambda: engine_kernels.VLLM,
            sglang_gemma4=lambda: engine_kernels.GEMMA4,
            vllm_router=lambda: (
                lambda logits, top_k, scale: engine_kernels.GEMMA4.gemma4_fused_routing(logits, scale, top_k)
            ),
            sglang_jit={
                "attention.rope": engine_kernels.ROPE,
                "activation.activation": engine_kernels.ACTIVATION,
            }.get,
            sglang_softcap=lambda: engine_kernels.SOFTCAP,
        )
        for fake, value in fakes.items():
            if hasattr(module, fake):
                monkeypatch.setattr(module, fake, value)


@pytest.mark.parametrize("pair", PAIRS, ids=name)
def test_calls_do_the_job(engines, pair):
    case, number = pair
    found = results(case, number, 3, torch.device("cpu"))
    if found is None:
        assert PEERS[case.op][number].says.startswith(("vLLM fused_qk", "sgl_kernel topk", "sgl_kernel moe")), (
            "only these are partial"
        )
        return
    difference, failure = compare(*found)
    assert not failure and (difference is not None or case.op == "sort_by_expert")


def test_partial_peers_serve_some_shapes(engines):
    for op, number in (("qkv_rope_store", 1), ("select_experts", 2)):
        served = {results(case, number, 2, torch.device("cpu")) is not None for case in CASES if case.op == op}
        assert served == {True, False}


@pytest.mark.gpu
@pytest.mark.parametrize("pair", [p for p in PAIRS if p[0].shape.startswith(("26B-A4B", "E2B"))], ids=name)
def test_installed_kernels_do_the_job(pair):
    case, number = pair
    if missing := [package for package in PEERS[case.op][number].needs if why_absent(package)]:
        pytest.skip(f"without {missing}")
    found = results(case, number, 64, torch.device("cuda"))
    assert found is None or not compare(*found)[1]


def test_packages_are_known():
    assert {need for peers in PEERS.values() for peer in peers for need in peer.needs} <= set(HOW_TO_ADD)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of packages, and no memory of what was looked for."""
    monkeypatch.syspath_prepend(tmp_path)
    caches = (
        packages.why_absent,
        packages._folder,
        packages.vllm_router,
        packages._sglang_file,
        packages.sglang_jit,
    )
    before = set(sys.modules)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()
    for module in set(sys.modules) - before:
        if module.split(".")[0] in ("sglang", "vllm", "peer_vllm_gemma4", "peer_gemma4_fused_ops"):
            del sys.modules[module]


def test_what_is_absent_says_so(site, monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    assert why_absent("torch") is None
    for package in ("sgl_kernel", "sglang", "vllm"):
        assert why_absent(package) == f"{package} is not installed"
    assert why_absent("sglang-jit") == "tvm_ffi is not installed"


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_router_is_taken_out_of_a_file_that_cannot_be_imported(site):
    write(site / "vllm" / "__init__.py", "raise RuntimeError('the engine starts')")
    path = site / "vllm" / "model_executor" / "models" / "gemma4.py"
    write(
        path,
        "from vllm.config import VllmConfig\n\n\n@triton.jit\ndef _gemma4_routing_kernel(x):\n    pass\n\n\n"
        "def gemma4_fused_routing_kernel_triton(logits, topk, scale):\n"
        "    return _gemma4_routing_kernel.src, topk\n",
    )
    source, top_k = packages.vllm_router()(None, 8, None)
    assert top_k == 8 and "def _gemma4_routing_kernel(x)" in source, "Triton has read the function's own lines"


def test_another_version_of_the_router_is_refused(site):
    write(site / "vllm" / "model_executor" / "models" / "gemma4.py", "def other():\n    pass\n")
    with pytest.raises(ImportError, match="_gemma4_routing_kernel"):
        packages.vllm_router()


def test_kernels_compiled_at_first_use_are_imported_without_their_engine(site):
    for name in ("sglang", "sglang/kernels", "sglang/srt", "sglang/srt/utils", "sglang/kernels/ops/attention"):
        write(site / name / "__init__.py", "raise RuntimeError('the engine starts')")
    write(
        site / "sglang" / "kernels" / "ops" / "attention" / "rope.py",
        "from sglang.srt.utils.custom_op import register_custom_op\nfrom sglang.utils import is_in_ci\n"
        "@register_custom_op(mutates_args=['q'])\ndef turn(q):\n    return q, is_in_ci()\n"
        "@register_custom_op\ndef plain(q):\n    return q\n",
    )
    rope = packages.sglang_jit("attention.rope")
    assert rope.turn(3) == (3, False) and rope.plain(4) == 4
