"""Which class computes which family."""

from gemcutter.model.gemma4 import Gemma4
from gemcutter.model.glm4_moe import Glm4Moe
from gemcutter.spec import Family

Model = Gemma4 | Glm4Moe
MODELS: dict[Family, type[Model]] = {Family.GEMMA4: Gemma4, Family.GLM4_MOE: Glm4Moe}
