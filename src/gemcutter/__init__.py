"""gemcutter: exact, fast inference for Google's Gemma 4."""

from importlib import import_module
from typing import TYPE_CHECKING

from gemcutter.config import EngineConfig
from gemcutter.params import SamplingParams

if TYPE_CHECKING:
    from gemcutter.hf import patch, unpatch
    from gemcutter.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "EngineConfig", "SamplingParams", "__version__", "patch", "unpatch"]

# Imported on first use: they bring torch, which takes seconds.
_LAZY = {"LLM": "gemcutter.llm", "patch": "gemcutter.hf", "unpatch": "gemcutter.hf"}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'gemcutter' has no attribute {name!r}")
