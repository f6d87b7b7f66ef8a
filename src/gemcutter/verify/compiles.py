"""Compile the ops' kernels for cards that are not there.

Each launch runs as it stands, on tensors of the CPU; what would start a kernel compiles it instead, for the target
of a driver that has no card. So a signature stands in the launch alone.
"""

import ast
import contextlib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from gemcutter import ops
from gemcutter.ops.attention.attend_decode import ROWS, SPLIT, launch_decode
from gemcutter.ops.attention.attend_decode_hopper import launch_hopper
from gemcutter.ops.attention.attend_prefill import launch_prefill
from gemcutter.ops.attention.attend_prefill_hopper import prefill
from gemcutter.ops.attention.qkv_rope_store import qkv_rope_store_launch
from gemcutter.verify.case import Case
from gemcutter.verify.cases import all_cases
from gemcutter.verify.inputs import Kind
from gemcutter.verify.products import product_launches
from gemcutter.verify.shapes import MODELS as RELEASED

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
HOPPER_ONLY = ("sm_90",)  # of files named so, whose Gluon is written for that card
MODELS = ("E2B", "26B-A4B", "GLM-4.7")  # have every form between them; shapes without a model's name are taken too
MOST_BYTES = 2**28  # of one launch's tensors


def launched_kernels() -> set[str]:
    """Module and name of every kernel that something in `gemcutter.ops` launches, as `name[grid](...)`."""
    found = set()
    for info in pkgutil.walk_packages(ops.__path__, ops.__name__ + "."):
        module = importlib.import_module(info.name)
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                kernel = getattr(module, getattr(node.func.value, "id", ""), None)
                if isinstance(kernel, JITFunction):
                    found.add(name_of(kernel))
    return found


def targets_of(name: str) -> tuple[str, ...]:
    """What an op, or a kernel by its module and name, is compiled for."""
    return HOPPER_ONLY if name.partition(".")[0].endswith("_hopper") else tuple(TARGETS)


def name_of(kernel: JITFunction) -> str:
    return f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"


def launches() -> dict[str, list[Callable[[], object]]]:
    """By op, what launches its kernels at the shapes of MODELS: on one row, and on many."""
    found: dict[str, list[Callable[[], object]]] = {}
    for case in all_cases():
        first = case.shape.split()[0]
        if case.dtype == torch.bfloat16 and (first in MODELS or first not in {model.name for model in RELEASED}):
            many = max(1, min(1024, MOST_BYTES // case.bytes_moved(1)))
            found.setdefault(case.op, []).extend(functools.partial(_launch, case, rows) for rows in (1, many))
    found |= product_launches()
    shapes = (16, 8, 256, 1024, torch.bfloat16), (16, 2, 512, None, torch.bfloat16), (4, 1, 64, None, torch.float32)
    found["qkv_rope_store"].append(_store_fp8)
    found["attend"] = [
        functools.partial(_attend, *shape, stored)
        for shape in shapes
        for stored in (shape[-1], torch.float8_e4m3fn)
    ]
    found["attend_decode_hopper"] = [
        functools.partial(_attend_decode, *shape[:4], stored)
        for shape in shapes[:2]
        for stored in (torch.bfloat16, torch.float8_e4m3fn)
    ]
    found["attend_prefill_hopper"] = [
        functools.partial(_attend, *shape, torch.bfloat16, by_tma=True) for shape in shapes[:2]
    ]
    return found


def _launch(case: Case, rows: int) -> None:
    case.launch(*case.make(rows, Kind.NORMAL, "cpu"))


def _store_fp8(heads: int = 16, kv_heads: int = 8, dim: int = 256) -> None:
    """26B's sliding layers: the other forms do not differ in how they store."""
    half = functools.partial(torch.empty, dtype=torch.bfloat16)
    ids = torch.zeros(64, dtype=torch.int64)
    cache, scales = _cache(kv_heads, dim, torch.float8_e4m3fn)
    qkv_rope_store_launch(
        half(64, (heads + 2 * kv_heads) * dim), half(dim), half(dim), half(99, dim // 2), half(99, dim // 2), ids,
        1e-6, heads, kv_heads, cache, cache, ids, "qkv", scales,
    )  # fmt: skip


def _cache(kv_heads: int, head_dim: int, stored: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    scales = torch.empty(2, kv_heads) if stored == torch.float8_e4m3fn else None
    return torch.empty(8, kv_heads, 16, head_dim, dtype=stored), scales


def _attend(
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int | None,
    dtype: torch.dtype,
    stored: torch.dtype,
    by_tma: bool = False,
) -> None:
    """A decode of 40 keys, and a prefill of 32; or the prefill alone, by TMA."""
    q = torch.empty(33, heads, head_dim, dtype=dtype)
    cache, kv_scales = _cache(kv_heads, head_dim, stored)
    pages = torch.zeros(2, 4, dtype=torch.int32)
    start, kv_len = torch.tensor([0, 1, 33], dtype=torch.int32), torch.tensor([40, 40], dtype=torch.int32)
    if by_tma:
        prefill(q, cache, cache, start, kv_len, pages, 1, 1, 32, window, 1.0, q)
        return
    launch_decode(q, cache, cache, kv_scales, kv_len, pages, 1, window, 1.0, q)
    launch_prefill(q, cache, cache, kv_scales, start, kv_len, pages, 1, 32, 40, window, 1.0, q)


def _attend_decode(heads: int, kv_heads: int, head_dim: int, window: int | None, stored: torch.dtype) -> None:
    """Few sequences and many."""
    cache, kv_scales = _cache(kv_heads, head_dim, stored)
    for seqs in (1, 64):
        q = torch.empty(seqs, heads, head_dim, dtype=torch.bfloat16)
        pages, kv_len = torch.zeros(seqs, 4, dtype=torch.int32), torch.full((seqs,), 40, dtype=torch.int32)
        part, top = torch.empty(seqs, heads, 9, head_dim), torch.empty(seqs, heads, 9)
        launch_hopper(q, cache, cache, kv_scales, kv_len, pages, window, 1.0, q, (part, top, top), 3, SPLIT, ROWS)


def compile_op(op: str, target: str) -> dict[str, list[CompiledKernel]]:
    """Every variant of every kernel that the op's launches would start, by the kernel's name."""
    found: dict[str, list[CompiledKernel]] = {}
    with _compile_instead(target) as compiled:
        for launch in launches()[op]:
            launch()
    for name, kernel in compiled:
        if not any(kernel is other for other in found.setdefault(name, [])):
            found[name].append(kernel)
    return found


def count_variants(op: str, target: str) -> dict[str, int] | str:
    """How many there are of each kernel, or what the compiler says."""
    try:
        return {name: len(kernels) for name, kernels in compile_op(op, target).items()}
    except Exception as error:  # whatever the compiler raises is a finding, and the other kernels go on
        return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def _compile_instead(target: str) -> Iterator[list[tuple[str, CompiledKernel]]]:
    """Collects (name, compiled kernel) of what would be launched."""
    found, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        if "CHAINED" in options and TARGETS[target].backend == "cuda":
            options |= dict(CHAINED=True, launch_pdl=True)  # as on such a card; tensors of a CPU do not say so
        found.append((name_of(self), run(self, *args, grid=grid, warmup=True, **options)))

    number = list(TARGETS).index(target)  # Triton keeps its kernels by device
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: TARGETS[target],
            get_current_device=lambda: number,
            get_current_stream=lambda device: 0,
        )
    )
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = run
        driver._active = None
