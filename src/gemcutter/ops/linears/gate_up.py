"""The MLP's first half: gelu_tanh(x @ gate.T) * (x @ up.T), and a router's logits beside it.

The bits are those of `geglu(linear(x, weight))` and of `linear(router_x, router)`, whatever the number of rows:
the products keep the one order of summation that `linear.py` describes. Few tokens take one launch on Hopper,
others the ops one by one.
Source: HF `Gemma4TextMLP`, and `Gemma4TextRouter`'s projection.
"""

import torch

from gemcutter.ops.activations.geglu import geglu_launch, geglu_reference
from gemcutter.ops.activations.geglu_fp8 import geglu_fp8
from gemcutter.ops.arguments import check_matrix
from gemcutter.ops.library import define
from gemcutter.ops.linears.gate_up_fp8_hopper import stream_gate_up_fp8, streams_gate_up_fp8
from gemcutter.ops.linears.gate_up_hopper import MOST_TOKENS, stream_gate_up, streams_gate_up
from gemcutter.ops.linears.linear import check_linear, linear, linear_launch, linear_reference
from gemcutter.ops.linears.linear_fp8 import check_linear_fp8, dtype_of, linear_fp8_launch, linear_fp8_reference
from gemcutter.ops.quantize_fp8 import Quantized, read_as_pair


def gate_up(
    x: torch.Tensor | Quantized,
    weight: torch.Tensor | Quantized,
    router_x: torch.Tensor | None = None,
    router: torch.Tensor | None = None,
    reader: torch.Tensor | Quantized | None = None,
) -> tuple[torch.Tensor | Quantized, torch.Tensor | None]:
    """Activate the MLP, and score the experts that stand beside it.

    Args:
        x: [T, K] of float32, bfloat16 or float16; dense rows, row stride free. T may be 0. Or its `quantize_fp8`,
            as for `linear`.
        weight: [2I, K] of x's dtype, dense, gate's rows then up's; or in FP8.
        router_x: [T, K], of x's dtype, dense rows; None without experts.
        router: [E, K] of x's dtype, dense; given if router_x is.
        reader: the weight of the linear that takes the result: in FP8, it may be quantised here.

    Returns:
        [T, I] of x's dtype, or its `quantize_fp8`; and the logits [T, E] or None. All contiguous, a row's bits a
        function of that row.

    Raises:
        TypeError, ValueError: on other dtypes, shapes and strides.
    """
    values, scale = x if isinstance(x, Quantized) else (x, None)
    if len(values) > MOST_TOKENS and read_as_pair(reader, dtype_of(values)):
        # Ops one by one, one of which can also quantise. For few tokens one launch leaves that to the reader.
        return geglu_fp8(linear(x, weight)), None if router is None else linear(router_x, router)
    if isinstance(weight, Quantized):
        out = _gate_up_fp8(values, scale, *weight, router_x, router)
    else:
        out = _gate_up(x, weight, router_x, router)
    return out[0], out[1] if router is not None else None


def check_gate_up(x, weight, router_x, router) -> None:
    check_linear(x, weight)
    _check_halves(weight)
    if _has_router(router_x, router):
        check_matrix("router_x", router_x, like=x)
        check_linear(router_x, router)


def check_gate_up_fp8(x, scale, weight, weight_scale, router_x, router) -> None:
    check_linear_fp8(x, scale, weight, weight_scale, None)
    _check_halves(weight)
    if _has_router(router_x, router):
        check_matrix("router_x", router_x, width=x.shape[1])
        if len(router_x) != len(x) or router_x.dtype != dtype_of(x):
            got = f"router_x has {len(router_x)} rows of {router_x.dtype}"
            raise ValueError(f"{got}: {len(x)} of {dtype_of(x)}, in which x is multiplied, are needed")
        check_linear(router_x, router)


def _check_halves(weight) -> None:
    if len(weight) % 2:
        raise ValueError(f"weight has {len(weight)} rows: gate and up are its halves, so an even number")


def _has_router(router_x, router) -> bool:
    if (router_x is None) != (router is None):
        raise ValueError("router_x and router belong together: give both or neither")
    return router is not None


def gate_up_reference(x, weight, router_x, router) -> list[torch.Tensor]:
    hidden = geglu_reference(linear_reference(x, weight))
    return [hidden] if router is None else [hidden, linear_reference(router_x, router)]


def gate_up_launch(x, weight, router_x, router) -> list[torch.Tensor]:
    if not streams_gate_up(x, weight, router_x, router):
        hidden = geglu_launch(linear_launch(x, weight))
        return [hidden] if router is None else [hidden, linear_launch(router_x, router)]
    out = gate_up_fake(x, weight, router_x, router)
    stream_gate_up(x, weight, router_x, router, out[0], out[1] if router is not None else None)
    return out


def gate_up_fake(x, weight, router_x, router) -> list[torch.Tensor]:
    hidden = x.new_empty(len(x), len(weight) // 2)
    return [hidden] if router is None else [hidden, x.new_empty(len(x), len(router))]


_gate_up = define(
    "gate_up(Tensor x, Tensor weight, Tensor? router_x, Tensor? router) -> Tensor[]",
    check=check_gate_up, reference=gate_up_reference, launch=gate_up_launch, fake=gate_up_fake,
)  # fmt: skip


def gate_up_fp8_reference(x, scale, weight, weight_scale, router_x, router) -> list[torch.Tensor]:
    hidden = geglu_reference(linear_fp8_reference(x, scale, weight, weight_scale, None))
    return [hidden] if router is None else [hidden, linear_reference(router_x, router)]


def gate_up_fp8_launch(x, scale, weight, weight_scale, router_x, router) -> list[torch.Tensor]:
    if scale is None or not streams_gate_up_fp8(x, weight, router_x, router):
        hidden = geglu_launch(linear_fp8_launch(x, scale, weight, weight_scale, None))
        return [hidden] if router is None else [hidden, linear_launch(router_x, router)]
    out = gate_up_fp8_fake(x, scale, weight, weight_scale, router_x, router)
    stream_gate_up_fp8(x, scale, weight, weight_scale, router_x, router, out[0], *(out[1:] or [None]))
    return out


def gate_up_fp8_fake(x, scale, weight, weight_scale, router_x, router) -> list[torch.Tensor]:
    hidden = x.new_empty(len(x), len(weight) // 2, dtype=dtype_of(x))
    return [hidden] if router is None else [hidden, router_x.new_empty(len(x), len(router))]


_gate_up_fp8 = define(
    "gate_up_fp8(Tensor x, Tensor? scale, Tensor weight, Tensor weight_scale, Tensor? router_x, Tensor? router)"
    " -> Tensor[]",
    check=check_gate_up_fp8, reference=gate_up_fp8_reference, launch=gate_up_fp8_launch, fake=gate_up_fp8_fake,
)  # fmt: skip
