"""The ops of a Gemma 4 layer, each usable alone: `from gemcutter.ops import rms_norm`.

Every one has the bits of its plain PyTorch reference in the file of its name, which also says shapes and sources.
"""

from gemcutter.ops.attention_seam import attention_seam
from gemcutter.ops.layer_seam import Routed, layer_seam
from gemcutter.ops.rms_norm import rms_norm

__all__ = [
    "Routed",
    "attention_seam",
    "layer_seam",
    "rms_norm",
]
