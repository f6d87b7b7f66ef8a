"""One thread for every test.

PyTorch cuts a CPU tensor among its threads, and where a cut leaves a piece that does not fill the vector unit, gelu
and tanh take other bits there (one of 19008 bf16 values at two threads). What is compared bit by bit must not
depend on how many cores a machine has.
"""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)
