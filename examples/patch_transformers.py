"""A Gemma 4 model of `transformers` with gemcutter's ops inside: python examples/patch_transformers.py [MODEL]

MODEL is a folder or a hub id; without it carat, the small trained model that ships with gemcutter. Prints what the
patched model answers, and how many of its logits differ from the unpatched model's.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gemcutter
from gemcutter.checkpoint.files import locate

folder = locate(sys.argv[1] if len(sys.argv) > 1 else "carat")
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").to(device)

question = [{"role": "user", "content": "What is 47 + 38?"}]
prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
prompt = prompt.to(device)

with torch.no_grad():
    stock = model(**prompt).logits
    gemcutter.patch(model)
    patched = model(**prompt).logits
    reply = model.generate(**prompt, max_new_tokens=100, do_sample=False)
    gemcutter.unpatch(model)
    again = model(**prompt).logits

print(tokenizer.decode(reply[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
different, size = (stock != patched).sum().item(), (stock.float() - patched.float()).abs().max().item()
print(f"patched: {different} of {stock.numel()} logits differ, at most by {size:.3g}")
print(f"unpatched again: {(stock != again).sum().item()} differ")
