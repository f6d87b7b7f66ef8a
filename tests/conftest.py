"""What every test runs under: one thread, and GPU tests only where there is a GPU."""

from types import SimpleNamespace

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """PyTorch cuts a CPU tensor among its threads, and where a cut leaves a piece that does not fill the vector
    unit, gelu and tanh take other bits there (one of 19008 bf16 values at two threads). What is compared bit by bit
    must not depend on how many cores a machine has.
    """
    torch.set_num_threads(1)


@pytest.fixture
def hf_sums_as_we_do(monkeypatch):
    """HF with our sum of squares: what remains of a comparison is every other operation and rounding."""
    from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
    from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedRMSNorm

    from gemcutter.ops.mean_square import mean_square_reference

    def norm(self, x):
        return x * torch.pow(mean_square_reference(x) + self.eps, -0.5)

    monkeypatch.setattr(Gemma4RMSNorm, "_norm", norm)
    monkeypatch.setattr(Gemma4UnifiedRMSNorm, "_norm", norm)


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """A Hopper card in Triton's mind, under a number that no other has, and a cache on disk of its own."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    target, number = GPUTarget("cuda", 90, 32), 77
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: number,
            get_current_stream=lambda device: 0,
        )
    )
    yield number
    driver._active = None


def pytest_collection_modifyitems(config, items):
    """Leave GPU tests out where there is none, however they were asked for."""
    if not torch.cuda.is_available():
        left_out = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
