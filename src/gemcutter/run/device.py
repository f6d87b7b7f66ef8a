"""What the device is, and how many bytes of it the KV cache may take."""

from pathlib import Path

import torch

CPU_SHARE = 0.5  # of the memory available at start; requests rarely need it, and the budget stops at what they can


def resolve_device(name: str) -> torch.device:
    """The torch device of "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or (kind == "cpu" and index):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if int(index or 0) >= count:
        raise ValueError(f"device {name!r} is not here: {count} CUDA devices found; choose another or cpu")
    return torch.device("cuda", int(index or 0))


def kv_byte_budget(device: torch.device, mem_fraction_static: float) -> int:
    """Bytes left for K/V once the weights are loaded.

    On a GPU weights and cache share `mem_fraction_static` of the whole memory, as in SGLang; the rest is for
    activations and graphs.

    Raises:
        ValueError: nothing is left.
    """
    if device.type == "cpu":
        return int(_available_memory() * CPU_SHARE)
    free, total = torch.cuda.mem_get_info(device)
    used, allowed = total - free, int(total * mem_fraction_static)
    if allowed <= used:
        raise ValueError(
            f"no memory left for the KV cache: {used / 2**30:.1f} of {total / 2**30:.1f} GiB are in use, and "
            f"mem_fraction_static {mem_fraction_static} allows {allowed / 2**30:.1f}; raise it or free the device"
        )
    return allowed - used


def _available_memory() -> int:
    """Bytes of the host that are free, or given back on demand, as are the pages of weight files just read."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
