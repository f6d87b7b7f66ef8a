"""Exact match on held-out problems, by HF in bf16 with greedy decoding.

Eager attention and eager experts: the arithmetic that gemcutter's own engine
is held to. Prints a table, then one line of JSON.

    python training/evaluate.py src/gemcutter/models/carat
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from problems import KINDS, Problem, extract_answer, held_out


def replies(model, tokenizer, problems: list[Problem], batch: int, max_new_tokens: int) -> list[str]:
    """Greedy replies, in the order of the problems; batches hold prompts of like length."""
    prompts = [
        tokenizer.apply_chat_template(p.messages, tokenize=False, add_generation_prompt=True) for p in problems
    ]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    said = [""] * len(prompts)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        texts = [prompts[i] for i in chosen]
        inputs = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
        inputs = inputs.to(model.device)
        with torch.no_grad():
            out = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        new = out[:, inputs["input_ids"].shape[1] :]
        for i, text in zip(chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            said[i] = text
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mixed", type=int, default=1000)
    parser.add_argument("--plain", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--max-new-tokens", type=int, default=320)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--show", type=int, default=0, help="print this many wrong replies")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    model = AutoModelForCausalLM.from_pretrained(
        args.folder, dtype=torch.bfloat16, attn_implementation="eager", experts_implementation="eager"
    ).to(args.device)
    sets = {"mixed": held_out(args.mixed), "plain sums": held_out(args.plain, "plain")}
    figures = {"model": args.folder.name}
    for title, problems in sets.items():
        by_kind = defaultdict(list)
        said = replies(model, tokenizer, problems, args.batch, args.max_new_tokens)
        for problem, reply in zip(problems, said, strict=True):
            right = extract_answer(reply) == problem.answer
            by_kind[problem.kind].append(right)
            if not right and args.show > 0:
                args.show -= 1
                print(f"wrong: {problem.text}\n  said:   {reply!r}\n  wanted: {problem.solution!r}")
        print(f"{title:12s} right    of")
        for kind in (kind for kind in KINDS if by_kind[kind]):
            print(f"  {kind:10s} {sum(by_kind[kind]):5d} {len(by_kind[kind]):5d}")
        right = sum(sum(marks) for marks in by_kind.values())
        print(f"  {'all':10s} {right:5d} {len(problems):5d}  {right / len(problems):.1%}")
        figures[title] = {"right": right, "of": len(problems)}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
