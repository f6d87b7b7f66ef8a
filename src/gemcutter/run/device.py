"""What the device is, and how many bytes of it the KV cache may take."""

import os

import torch

CPU_SHARE = 0.5  # of the memory free at start; requests rarely need it, and the budget takes no more than they can


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
        return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * CPU_SHARE)
    free, total = torch.cuda.mem_get_info(device)
    used, allowed = total - free, int(total * mem_fraction_static)
    if allowed <= used:
        raise ValueError(
            f"no memory left for the KV cache: {used / 2**30:.1f} of {total / 2**30:.1f} GiB are in use, and "
            f"mem_fraction_static {mem_fraction_static} allows {allowed / 2**30:.1f}; raise it or free the device"
        )
    return allowed - used
