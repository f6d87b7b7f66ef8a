"""What every test runs under: one thread, and GPU tests only where there is a GPU."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """PyTorch cuts a CPU tensor among its threads, and where a cut leaves a piece that does not fill the vector
    unit, gelu and tanh take other bits there (one of 19008 bf16 values at two threads). What is compared bit by bit
    must not depend on how many cores a machine has.
    """
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    """Leave GPU tests out where there is none, however they were asked for."""
    if not torch.cuda.is_available():
        left_out = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
