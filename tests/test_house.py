"""The shape of the house: imports run down, nothing runs in circles, files stay small, planning needs no torch."""

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "gemcutter"
FILES = sorted(SRC.rglob("*.py"))

# From the ground up: a room imports from itself and from rooms named before it. What lies in ops/ itself, its rooms
# share.
FLOORS = [
    "spec", "params", "config", "batch",
    "ops.*", "ops.norms", "ops.activations", "ops.linears", "ops.moe", "ops.seams", "ops.attention", "ops.tokens",
    "ops", "hf", "verify", "cache", "schedule", "model", "checkpoint",
    "run", "engine", "text", "llm", "serve", "bench", "__init__", "tune", "cli", "__main__",
]  # fmt: skip

# Files over 300 lines, each with its reason.
LONG: dict[str, str] = {}


def module_of(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports_of(path: Path) -> set[str]:
    """Modules of this package that a file imports, wherever in the file the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "gemcutter":
                inner = name.removeprefix("gemcutter").lstrip(".")
                while inner and inner not in MODULES:
                    inner = inner.rpartition(".")[0]
                found.add(inner or "__init__")
    return found


def floor_of(module: str) -> int:
    room, *inner = module.split(".")
    if room == "ops" and inner:
        room = f"ops.{inner[0]}" if f"ops.{inner[0]}" in FLOORS else "ops.*"
    return FLOORS.index(room)


MODULES = {module_of(path) for path in FILES}
GRAPH = {module_of(path): imports_of(path) for path in FILES}


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_imports_run_down(module):
    for target in GRAPH[module]:
        assert floor_of(target) <= floor_of(module), f"{module} imports {target}, which stands above it"


def test_no_import_circles():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, "circle: " + " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in GRAPH.get(module, ()):
                visit(target, (*path, module))
            done.add(module)

    for module in GRAPH:
        visit(module, ())


def test_files_stay_small():
    lines = {str(path.relative_to(SRC)): len(path.read_text().splitlines()) for path in FILES}
    too_long = {name: n for name, n in lines.items() if n > 300 and name not in LONG}
    assert not too_long, f"over 300 lines without a reason: {too_long}"
    assert statistics.median(n for n in lines.values() if n) <= 130


@pytest.mark.parametrize("module", ["schedule.planner", "cache.ledger", "text.intake", "spec", "params"])
def test_plans_without_torch(module):
    code = f"import sys, gemcutter.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(SRC.parent)}).returncode == 0
