"""A GLM model from prompt to text: its own tokenizer, template, stops and sampling defaults."""

import json

import tiny_models
import tiny_tokenizers
import torch

from gemcutter import LLM, SamplingParams

TEMPLATE = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def test_chats_as_hf_does(tmp_path):
    model = tiny_models.make("glm", vocab_size=288)
    model.save_pretrained(tmp_path)
    tiny_tokenizers.byte_level(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    defaults = {"eos_token_id": [1, 3], "temperature": 0.0, "do_sample": False}
    (tmp_path / "generation_config.json").write_text(json.dumps(defaults))
    text = "[gMASK]<sop><|user|>\nHow are you?<|assistant|>\n"
    with LLM(model=str(tmp_path), device="cpu") as llm:
        [reply] = llm.chat([[{"role": "user", "content": "How are you?"}]], SamplingParams(max_tokens=12))
        [plain] = llm.generate([text], SamplingParams(max_tokens=12))
    assert reply.outputs[0].token_ids == plain.outputs[0].token_ids
    ids = list(reply.prompt_token_ids)
    assert len(ids) == len(text.encode()), "bytes, and no token in front"
    with torch.no_grad():
        for token in reply.outputs[0].token_ids:
            assert int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()) == token
            ids.append(token)
    assert reply.outputs[0].finish_reason == ("stop" if ids[-1] in (1, 3) else "length")
