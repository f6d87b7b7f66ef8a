"""The table of names: HF's own names and shapes, each weight filled exactly once."""

import pytest
import tiny_models
import torch
from test_checkpoint_config import COMMON, RELEASED, hf_config, write
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextModel
from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedTextModel

from gemcutter.checkpoint.config import read_spec
from gemcutter.checkpoint.linears import NESTED, TEXT_ONLY
from gemcutter.checkpoint.table import empty_weights, is_ignored, pieces


def table(spec, prefix, device="meta"):
    return pieces(spec, empty_weights(spec, torch.device(device), torch.float32), prefix)


@pytest.mark.parametrize("prefix", [NESTED, TEXT_ONLY])
@pytest.mark.parametrize("name", RELEASED)
def test_names_and_shapes_of_released_models_are_hfs(name, prefix, tmp_path):
    config = RELEASED[name]
    with torch.device("meta"):
        model = (Gemma4UnifiedTextModel if name == "12b" else Gemma4TextModel)(hf_config(config))
    ours = {key: tuple(view.shape) for key, view in table(read_spec(write(tmp_path, config)), prefix).items()}
    assert ours == {prefix + key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


# Billions of parameters of the text models as published, which HF's classes do not decide
@pytest.mark.parametrize("name, billions", [("12b", 11.9), ("26b", 25.2), ("31b", 30.7)])
def test_published_sizes(name, billions, tmp_path):
    views = table(read_spec(write(tmp_path, RELEASED[name])), TEXT_ONLY).values()
    assert sum(view.numel() for view in views) / 1e9 == pytest.approx(billions, abs=0.05)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", tiny_models.GEMMA)
def test_table_covers_every_weight_exactly_once(kind, tied, tmp_path):
    """Each view numbers its own elements; together they must leave no element unwritten, and write none twice."""
    config = COMMON | tiny_models.GEMMA[kind] | {"tie_word_embeddings": tied}
    spec = read_spec(write(tmp_path, config))
    weights = empty_weights(spec, torch.device("cpu"), torch.float32)
    unique = {tensor.data_ptr(): tensor for tensor in all_tensors(weights)}
    for tensor in unique.values():
        tensor.fill_(0)
    for view in pieces(spec, weights, TEXT_ONLY).values():
        assert view.is_contiguous()
        view += 1
    assert all(tensor.eq(1).all() for tensor in unique.values())


def all_tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    children = value if isinstance(value, list) else vars(value).values() if value is not None else []
    return [tensor for child in children for tensor in all_tensors(child)]


def test_ignored_names_are_exactly_those_listed(tmp_path):
    spec = read_spec(write(tmp_path, COMMON | tiny_models.GEMMA["ple_shared"]))  # layers 4, 5, 6 share
    for prefix in (NESTED, TEXT_ONLY):
        ignored = is_ignored(spec, prefix)
        for layer in range(7):
            for module in ("k_proj", "v_proj", "k_norm", "v_norm"):
                assert ignored(f"{prefix}layers.{layer}.self_attn.{module}.weight") == (layer >= 4)
                assert not ignored(f"{prefix}layers.{layer}.self_attn.{module}.bias")
            assert not ignored(f"{prefix}layers.{layer}.self_attn.q_proj.weight")
        for tower in ("vision_tower", "vision_embedder", "embed_vision", "audio_tower", "embed_audio"):
            assert ignored(f"model.{tower}.x.weight") == (prefix == NESTED)
            assert not ignored(f"{tower}.x.weight") and not ignored(f"model.{tower}x.weight")
