"""What ops take, checked in one place: an error says which argument, what it is and what would do."""

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_rows(name: str, x: torch.Tensor, width: int | None = None, like: torch.Tensor | None = None) -> None:
    """x [..., H]: a float dtype, dense rows any distance apart.

    Args:
        width: H, where it is given.
        like: a tensor of the same device, dtype and shape.
    """
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} is {x.dtype}: float32, bfloat16 or float16 are taken; cast it")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: its rows have no elements")
    if width is not None and x.shape[-1] != width:
        raise ValueError(f"{name} has rows of {x.shape[-1]}: {width} are needed")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name} has strides {x.stride()}: rows must be contiguous; call .contiguous()")
    if like is not None and x.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: {tuple(like.shape)} is needed")
    if like is not None and (x.dtype != like.dtype or x.device != like.device):
        raise TypeError(f"{name} is {x.dtype} on {x.device}: {like.dtype} on {like.device} is needed")


def check_matrix(name: str, x: torch.Tensor, width: int | None = None, like: torch.Tensor | None = None) -> None:
    """x [T, H], likewise."""
    if x.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: two dims are needed, tokens and columns")
    check_rows(name, x, width, like)


def check_weight(name: str, weight: torch.Tensor, width: int, like: torch.Tensor) -> None:
    """weight [width], dense, of the dtype and on the device of `like`."""
    if weight.dtype != like.dtype or weight.device != like.device:
        raise TypeError(f"{name} is {weight.dtype} on {weight.device}: {like.dtype} on {like.device} is needed")
    if weight.shape != (width,) or not weight.is_contiguous():
        got = f"shape {tuple(weight.shape)}, strides {weight.stride()}"
        raise ValueError(f"{name} has {got}: one dense weight for each of {width} columns is needed")
