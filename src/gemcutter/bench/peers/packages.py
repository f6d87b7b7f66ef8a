"""Kernels out of installed packages, without importing the engines around them.

SGLang's and vLLM's package files import servers, patch other libraries and read global configurations; the kernels
need none of it. Compiled ones are loaded as libraries, Triton ones file by file.
"""

import ast
import functools
import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

HOW_TO_ADD = {
    "sgl_kernel": "pip install --no-deps sglang-kernel==0.4.5",
    "sglang": "pip install --no-deps sglang==0.5.17",
    "sglang-jit": "pip install --no-deps sglang==0.5.17, apache-tvm-ffi and ninja; compiled with nvcc at first use",
    "vllm": "pip install --no-deps vllm==0.25.1",
    "torch": "part of gemcutter",
}


@functools.cache
def why_absent(package: str) -> str | None:
    """None where the package's kernels can be called."""
    probes = {"sgl_kernel": sgl_kernel, "sglang": sglang_gemma4, "vllm": vllm_ops, "sglang-jit": _probe_jit}
    if package in probes:
        try:
            probes[package]()
        except (ImportError, OSError, RuntimeError) as error:
            return " ".join(str(error).split())[:200] or type(error).__name__
    return None


@functools.cache
def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{package} is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


@functools.cache
def sgl_kernel() -> Any:
    """The operations of sgl_kernel, built ahead of time."""
    folder = _folder("sgl_kernel")
    built = "sm90" if torch.cuda.get_device_capability() == (9, 0) else "sm100"
    torch.ops.load_library(folder / built / "common_ops.abi3.so")
    return torch.ops.sgl_kernel


@functools.cache
def vllm_ops() -> tuple[Any, Any, Any]:
    """vLLM's operations, built ahead of time: general, of experts, of the cache."""
    for name in ("_C_stable_libtorch", "_moe_C_stable_libtorch"):
        torch.ops.load_library(_folder("vllm") / f"{name}.abi3.so")
    return torch.ops._C, torch.ops._moe_C, torch.ops._C_cache_ops


@functools.cache
def _sglang_file(path: str) -> types.ModuleType:
    """One file of SGLang that imports nothing of SGLang."""
    full = _folder("sglang") / path
    spec = importlib.util.spec_from_file_location(f"peer_{full.stem}", full)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def sglang_gemma4() -> types.ModuleType:
    return _sglang_file("kernels/ops/layernorm/gemma4_fused_ops.py")


def sglang_softcap() -> types.ModuleType:
    return _sglang_file("kernels/ops/activation/softcap.py")


@functools.cache
def sglang_jit(name: str) -> types.ModuleType:
    """A module of sglang.kernels.ops whose CUDA code is compiled on its first call.

    The packages around it are stood in for by empty ones, so that their own files do not run; of those files the
    kernels' want a decorator, which registers a function with PyTorch, and whether this is SGLang's CI.
    """
    root = _folder("sglang")
    inner = ["kernels", "kernels/ops", "srt", "srt/utils", "/".join(["kernels/ops", *name.split(".")[:-1]])]
    for path in ["", *inner]:
        _stand_in(".".join(["sglang", *filter(None, path.split("/"))]), __path__=[str(root / path)])
    _stand_in("sglang.srt.utils.custom_op", register_custom_op=_undecorated)
    _stand_in("sglang.utils", is_in_ci=lambda: False)
    return importlib.import_module(f"sglang.kernels.ops.{name}")


def _stand_in(name: str, **attributes: Any) -> None:
    if name not in sys.modules:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(attributes)


def _undecorated(function=None, **_):
    return function or _undecorated


def _probe_jit() -> None:
    for module in ("tvm_ffi", "sglang"):
        _folder(module)
    sglang_jit("attention.rope")


@functools.cache
def vllm_router() -> Any:
    """vLLM's Triton router of Gemma 4: two functions out of a file whose imports need the whole engine."""
    path = _folder("vllm") / "model_executor" / "models" / "gemma4.py"
    names = {"_gemma4_routing_kernel", "gemma4_fused_routing_kernel_triton"}
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    if len(tree.body) != len(names):
        raise ImportError(f"{path} has no {' and '.join(sorted(names))}")
    module = types.ModuleType("peer_vllm_gemma4")
    module.__dict__.update(torch=torch, triton=triton, tl=tl, __file__=str(path))
    sys.modules[module.__name__] = module
    exec(compile(tree, path, "exec"), module.__dict__)  # line numbers stay, so Triton finds the source
    return module.gemma4_fused_routing_kernel_triton
