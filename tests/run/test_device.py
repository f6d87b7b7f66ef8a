"""What a device is called, and how much of the host the cache may take."""

from pathlib import Path

import pytest
import torch

from gemcutter.run.device import CPU_SHARE, kv_byte_budget, resolve_device


def test_names():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for wrong in ("", "gpu", "cpu:0", "cuda:x", "cuda:-1"):
        with pytest.raises(ValueError, match="must be auto, cpu, cuda or cuda:N"):
            resolve_device(wrong)
    with pytest.raises(ValueError, match="'cuda:99' is not here: .* choose another or cpu"):
        resolve_device("cuda:99")


def test_files_that_were_read_take_nothing_from_the_cache():
    """The weights are read from files, whose pages the kernel keeps and gives back: not free, but available."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    assert kv_byte_budget(torch.device("cpu"), 0.5) == pytest.approx(available * CPU_SHARE, rel=0.05)
