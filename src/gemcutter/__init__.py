"""gemcutter: exact, fast inference for Google's Gemma 4."""

from importlib import import_module
from typing import TYPE_CHECKING

from gemcutter.config import EngineConfig
from gemcutter.params import SamplingParams

if TYPE_CHECKING:
    from gemcutter.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "EngineConfig", "SamplingParams", "__version__"]


def __getattr__(name: str):
    """LLM on first use: it brings torch, which takes seconds to import."""
    if name == "LLM":
        return import_module("gemcutter.llm").LLM
    raise AttributeError(f"module 'gemcutter' has no attribute {name!r}")
