"""HF with our sum of squares: what remains of a comparison is every other operation and rounding."""

import pytest
import torch
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm

from gemcutter.ops.mean_square import mean_square_reference


@pytest.fixture
def hf_sums_as_we_do(monkeypatch):
    def norm(self, x):
        return x * torch.pow(mean_square_reference(x) + self.eps, -0.5)

    monkeypatch.setattr(Gemma4RMSNorm, "_norm", norm)
