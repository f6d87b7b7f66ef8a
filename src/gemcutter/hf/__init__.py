"""gemcutter's ops inside a loaded `transformers` model: `gemcutter.patch(model)`, `gemcutter.unpatch(model)`."""

from gemcutter.hf.patch import patch, unpatch

__all__ = ["patch", "unpatch"]
