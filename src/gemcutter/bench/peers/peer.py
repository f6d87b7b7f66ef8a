"""What a peer is."""

from collections.abc import Callable
from typing import NamedTuple

import torch

Results = list[torch.Tensor | None]  # in the order of the op's own; None where the forms cannot be compared


class Peer(NamedTuple):
    says: str  # the launches, "torch" for PyTorch's own operations where the peer has no kernel
    needs: tuple[str, ...]  # packages: keys of `packages.HOW_TO_ADD`
    prepare: Callable[..., Callable[[], Results] | None]
    """From the op's arguments to a call without any. Layouts that a peer keeps at load time are made here and not
    timed. None: no counterpart for these arguments."""
