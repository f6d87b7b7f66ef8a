"""Ops as PyTorch knows them: `torch.ops.gemcutter.<name>`, which torch.compile and CUDA graphs see through.

CUDA tensors go to the kernel, all others to the reference. Whatever the device, the arguments are checked first, so
that a CPU refuses what a GPU would.
"""

import functools
from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("gemcutter", "DEF")


def define(
    schema: str, *, check: Callable, reference: Callable, launch: Callable, fake: Callable | None = None
) -> Callable:
    """Register one op.

    Args:
        schema: name, arguments and results in PyTorch's schema language, without defaults.
        check: raises TypeError or ValueError on arguments that the op does not take.
        reference, launch: the plain PyTorch function, and the kernel's, of the same arguments.
        fake: allocates the results from arguments without data; None: the reference, which then may not look at
            values.

    Returns:
        What calls it through PyTorch's dispatcher.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, _checked(check, reference), "CompositeExplicitAutograd")
    _LIBRARY.impl(name, _checked(check, launch), "CUDA")
    torch.library.register_fake(f"gemcutter::{name}", _checked(check, fake or reference), lib=_LIBRARY)
    op = getattr(torch.ops.gemcutter, name).default
    if not op._schema.is_mutable:  # PyTorch has no gradients of those anyhow
        torch.library.register_autograd(f"gemcutter::{name}", _refuse_gradient, lib=_LIBRARY)
    return op


def _checked(check: Callable, run: Callable) -> Callable:
    @functools.wraps(run)
    def call(*args):
        check(*args)
        return run(*args)

    return call


def _refuse_gradient(context, *gradients):
    raise RuntimeError("gemcutter's ops have no gradient: they are for inference; run them under torch.no_grad()")
