"""Small tokenizers for tests, one of each decoder that a checkpoint may bring, written as checkpoint folders."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"]
PIECES = ["▁", "a", "b", "c", "ab", "▁ab", "bc", "abc", "€", "😀", "�", "\n", ".", "▁▁", "e\u0301", "\u200d"]


def write(tokenizer: Tokenizer, folder: Path, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>")
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, **config}))
    return folder


def byte_fallback(folder: Path, **config) -> Path:
    """Gemma's kind: pieces, and <0x..> for every byte. 6 specials, 256 bytes, the pieces, 2 ids without text."""
    vocab = {name: i for i, name in enumerate(SPECIAL)}
    for name in [f"<0x{byte:02X}>" for byte in range(256)] + PIECES:
        vocab.setdefault(name, len(vocab))
    merges = [("a", "b"), ("▁", "ab"), ("b", "c")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return write(tokenizer, folder, tokenizer_class="GemmaTokenizer", **config)


def byte_level(folder: Path) -> Path:
    """GPT-2's kind: every token is a string of bytes, characters may end anywhere."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {name: i for i, name in enumerate(SPECIAL + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return write(tokenizer, folder)


def word_level(folder: Path) -> Path:
    """No decoder at all: words joined with spaces."""
    vocab = {name: i for i, name in enumerate(SPECIAL + [f"t{i}" for i in range(6, 64)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    return write(tokenizer, folder)


def metaspace(folder: Path) -> Path:
    """Llama's kind: the first space of a text is stripped."""
    vocab = {name: i for i, name in enumerate(SPECIAL + PIECES)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.add_special_tokens(SPECIAL)
    return write(tokenizer, folder)


KINDS = {"byte_fallback": byte_fallback, "byte_level": byte_level, "word_level": word_level, "metaspace": metaspace}
