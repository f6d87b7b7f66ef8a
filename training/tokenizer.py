"""carat's tokenizer: small, built like Gemma's, with Gemma 4's control tokens.

Byte-pair encoding over text whose spaces have become ▁, with byte fallback so
that any UTF-8 round-trips, and every digit a token of its own. The control
tokens keep Gemma 4's own ids; the ids between them stay unused.

    python training/tokenizer.py OUT_DIR
"""

import argparse
import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from problems import training
from smalltalk import EXCHANGES, SYSTEM

VOCABULARY = 1024
SEED = 1
CONTROL = {
    "<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4,
    "<|tool>": 46, "<tool|>": 47, "<|tool_call>": 48, "<tool_call|>": 49,
    "<|tool_response>": 50, "<tool_response|>": 51, '<|"|>': 52,
    "<|think|>": 98, "<|channel>": 100, "<channel|>": 101, "<|turn>": 105, "<turn|>": 106,
}  # fmt: skip
FIRST_BYTE = 107
FIRST_PIECE = FIRST_BYTE + 256
EOS = [CONTROL["<eos>"], CONTROL["<turn|>"], CONTROL["<|tool_response>"]]
TEMPLATE = Path(__file__).with_name("chat_template.jinja")

# Pieces never join a digit to anything, nor a word to the punctuation after it.
PIECES = Regex(r"▁?[A-Za-z]+|▁?[^\sA-Za-z0-9▁]|\d|▁|\n")


def build(texts) -> Tokenizer:
    """Learn the merges from texts and lay the vocabulary out as Gemma does."""
    pieces = Tokenizer(models.BPE())
    pieces.normalizer = normalizers.Replace(" ", "▁")
    pieces.pre_tokenizer = pre_tokenizers.Split(PIECES, behavior="isolated")
    alphabet = [chr(c) for c in range(33, 127)] + ["\n", "▁", "×", "÷"]
    size = VOCABULARY - FIRST_PIECE
    pieces.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    learned = json.loads(pieces.to_str())["model"]

    vocab = {f"<unused{i}>": i for i in range(FIRST_BYTE) if i not in CONTROL.values()}
    vocab |= CONTROL | {f"<0x{byte:02X}>": FIRST_BYTE + byte for byte in range(256)}
    ordered = sorted(learned["vocab"], key=learned["vocab"].get)
    vocab |= {piece: FIRST_PIECE + i for i, piece in enumerate(ordered)}
    if len(vocab) != VOCABULARY:
        raise ValueError(f"the texts gave {len(vocab)} tokens, wanted {VOCABULARY}; give more varied texts")

    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", CONTROL["<bos>"])]
    )
    return tokenizer


def texts(count: int = 20_000):
    """A sample of what the model will read, for learning the merges."""
    stream = training(SEED)
    for _ in range(count):
        drawn = next(stream)
        yield from (message["content"] for message in drawn.messages)
        yield drawn.solution
    for remarks, reply in EXCHANGES:
        yield from 100 * (*remarks, reply, *SYSTEM)
    yield from 4000 * ("user\n", "model\n", "system\n", "thought\n")


def save(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    folder.mkdir(parents=True, exist_ok=True)
    build(texts()).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "GemmaTokenizer",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        "add_bos_token": True,
        "add_eos_token": False,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(TEMPLATE.read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    save(parser.parse_args().folder)
