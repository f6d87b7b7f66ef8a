"""Patching: modules of a loaded `transformers` model take a subclass of their own class, whose forward runs ops.

Nothing is added to a module, so weights, hooks, names and copies stay what they were, and a model is freed as
before (a bound method kept in its own module would be a cycle, and hold GPU memory till the next collection).
"""

from typing import TypeVar

from torch import nn
from transformers.models.gemma4 import modeling_gemma4 as gemma4
from transformers.models.gemma4_unified import modeling_gemma4_unified as unified

from gemcutter.hf.attention import Attention
from gemcutter.hf.layer import Layer
from gemcutter.hf.mlp import MLP
from gemcutter.hf.norm import Norm
from gemcutter.hf.router import Router

Model = TypeVar("Model", bound=nn.Module)


class Gemma4RMSNorm(Norm, gemma4.Gemma4RMSNorm):
    pass


class Gemma4TextAttention(Attention, gemma4.Gemma4TextAttention):
    eager = staticmethod(gemma4.eager_attention_forward)


class Gemma4TextMLP(MLP, gemma4.Gemma4TextMLP):
    pass


class Gemma4TextRouter(Router, gemma4.Gemma4TextRouter):
    pass


class Gemma4TextDecoderLayer(Layer, gemma4.Gemma4TextDecoderLayer):
    pass


class Gemma4UnifiedRMSNorm(Norm, unified.Gemma4UnifiedRMSNorm):
    pass


class Gemma4UnifiedTextAttention(Attention, unified.Gemma4UnifiedTextAttention):
    eager = staticmethod(unified.eager_attention_forward)


class Gemma4UnifiedTextMLP(MLP, unified.Gemma4UnifiedTextMLP):
    pass


class Gemma4UnifiedTextDecoderLayer(Layer, unified.Gemma4UnifiedTextDecoderLayer):
    pass


TEXT_MODELS = (gemma4.Gemma4TextModel, unified.Gemma4UnifiedTextModel)
OURS = {
    ours.__mro__[2]: ours
    for ours in (
        Gemma4RMSNorm, Gemma4TextAttention, Gemma4TextMLP, Gemma4TextRouter, Gemma4TextDecoderLayer,
        Gemma4UnifiedRMSNorm, Gemma4UnifiedTextAttention, Gemma4UnifiedTextMLP, Gemma4UnifiedTextDecoderLayer,
    )
}  # fmt: skip
HFS = {ours: hfs for hfs, ours in OURS.items()}


def patch(model: Model) -> Model:
    """Let a Gemma 4 model's text layers run gemcutter's ops, in place.

    Norms, the attention's way in (head norms and rotary embedding), the choice of experts, GeGLU and the residual
    seams become ops; projections, attention, experts, caches and `generate` stay HF's. Every op has HF eager's
    rounding points, and its bits but for the order in which a norm adds its squares. A module runs HF's own
    forward in training, where gradients are recorded (so call the model under `torch.no_grad()`, as `generate`
    does), under autocast, and where a hook or wrapper watches a step that an op would take over.

    Embeddings, the final soft cap and the per-layer inputs' context are left to HF too: they run once a step, and
    no module's border holds them whole.

    Args:
        model: a Gemma 4 model of `transformers`, or any module that holds one; its towers for images and sound are
            left alone. Patching again changes nothing.

    Returns:
        The model itself.

    Raises:
        TypeError: if there is no Gemma 4 text model in it.
        RuntimeError: if one of the modules has a forward of its own, as accelerate's dispatch over several devices
            leaves it. Nothing is patched then.
    """
    modules = _text_modules(model)
    for name, module in modules.items():
        if type(module) in OURS and "forward" in vars(module):
            raise RuntimeError(
                f"{name} has a forward of its own, which a patch would not reach: {vars(module)['forward']!r}."
                " If it is accelerate's, load the model onto one device, as with device_map={'': 'cuda:0'}"
            )
    for module in modules.values():
        module.__class__ = OURS.get(type(module), type(module))
    return model


def unpatch(model: Model) -> Model:
    """Take `patch` back: every module gets its own class again. A model that was not patched stays as it is.

    Returns:
        The model itself.

    Raises:
        TypeError: as `patch`.
    """
    for module in _text_modules(model).values():
        module.__class__ = HFS.get(type(module), type(module))
    return model


def _text_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of all Gemma 4 text models in a model, by name."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: a loaded Gemma 4 model of transformers is needed")
    roots = {name: each for name, each in model.named_modules() if isinstance(each, TEXT_MODELS)}
    if not roots:
        wanted = "Gemma4ForCausalLM, Gemma4ForConditionalGeneration, or their Gemma4Unified counterparts"
        raise TypeError(f"model is a {type(model).__name__} and holds no Gemma 4 text model: {wanted} are taken")
    return {
        f"{root}.{name}" if root else name: module
        for root, text in roots.items()
        for name, module in text.named_modules()
    }
