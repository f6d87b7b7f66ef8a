"""Tokenizer: a checkpoint's own tokenizer.json, between text and token ids. No torch."""

from pathlib import Path

from transformers import PreTrainedTokenizerFast

BYTES_OF_PIECE = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}  # Gemma's pieces for single bytes


class Tokenizer:
    """Reads `tokenizer.json` literally, so no class of transformers rebuilds it and none pulls in torch.

    Attributes:
        special_ids: ids that `skip_special_tokens` leaves out of a text.
        byte_ids: ids of byte pieces (`<0xE2>`); a run of them is decoded as a whole.
        max_chars: characters of text that one token can stand for; None: no bound.
        chat_template: the checkpoint's Jinja source, or None.
    """

    def __init__(self, fast: PreTrainedTokenizerFast) -> None:
        self._fast = fast
        self._core = fast.backend_tokenizer  # the wrapper's own encode and decode cost several times more
        added = self._core.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        found = {self._core.token_to_id(piece): raw for piece, raw in BYTES_OF_PIECE.items()}
        found.pop(None, None)
        self._bytes = found
        self.byte_ids = frozenset(found)
        # With a piece for every byte nothing becomes <unk>, so no token stands for more than the longest piece.
        self.max_chars = max(map(len, self._core.get_vocab())) if len(found) == 256 else None

    @classmethod
    def load(cls, folder: Path | str) -> "Tokenizer | None":
        """The tokenizer of a checkpoint folder; None where it brings none, and then everything works on ids.

        Raises ValueError for a tokenizer that cannot be read.
        """
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            for name in ("tokenizer.model", "tokenizer_config.json"):
                if (folder / name).is_file():
                    raise ValueError(
                        f"{folder} has {name} but no tokenizer.json; save the tokenizer in the fast format"
                    )
            return None
        try:
            fast = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise ValueError(f"cannot read the tokenizer in {folder}: {error}") from error
        return cls(fast)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; `add_special_tokens` puts <bos> in front where the checkpoint asks for it.

        Raises ValueError for text that UTF-8 cannot hold (lone surrogates).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text holds a lone surrogate at character {error.start}; send valid Unicode"
            ) from error
        # A batch, for only that lets other threads run meanwhile: 1 MB takes a second.
        return self._core.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of ids. Ids that the tokenizer does not know have no text; invalid UTF-8 shows as U+FFFD."""
        # A batch, for only that lets other threads run meanwhile.
        return self._core.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0]

    def knows(self, id: int) -> bool:
        return self._core.id_to_token(id) is not None

    def token(self, id: int) -> str:
        """How one token is shown on its own: its text, `<0xE2>` for a byte piece, "" for an unknown id."""
        if id in self._bytes:
            return self._core.id_to_token(id)
        return self.decode([id], skip_special_tokens=False)

    def token_bytes(self, id: int) -> bytes:
        """The token's share of the text's UTF-8; the bytes of a run join up to the run's."""
        raw = self._bytes.get(id)
        return raw if raw is not None else self.decode([id], skip_special_tokens=False).encode()

    @property
    def chat_template(self) -> str | None:
        """Raises ValueError where the checkpoint has several and none is the default."""
        if not self._fast.chat_template:
            return None
        return self._fast.get_chat_template()

    def apply_chat_template(self, messages: list[dict], **kwargs) -> str:
        """The template's text. Jinja runs in transformers' immutable sandbox; errors are the template's own."""
        return self._fast.apply_chat_template(messages, tokenize=False, **kwargs)

    @property
    def special_names(self) -> frozenset[str]:
        """Names such as "bos_token" under which templates see the special tokens."""
        return frozenset(self._fast.special_tokens_map)
