"""StepBatch: everything one forward pass sees, as tensors. Written by run/build.py, read by the model."""

from dataclasses import dataclass, replace

import torch

from gemcutter.spec import Kind


@dataclass
class KindBatch:
    """Where the tokens of a step live in the cache of one kind (sliding or full)."""

    pages: torch.Tensor  # [num_seqs, max_pages] int32: page id of logical page j; 0 where nothing is held
    slots: torch.Tensor  # [num_tokens] int64: page id * page_size + offset, where this token's K/V go


@dataclass
class StepBatch:
    """Tokens of all sequences of a step, flattened. Those to decode stand first, with one query token each.

    A request of which several tokens are decoded is as many sequences, on the same pages: each sees the K/V of
    those before it, as a layer writes all K/V before it reads any. Page 0 of every kind is a dump that belongs to
    no sequence: padded rows write there.
    """

    token_ids: torch.Tensor  # [num_tokens] int64
    positions: torch.Tensor  # [num_tokens] int64
    query_start: torch.Tensor  # [num_seqs + 1] int32: tokens of sequence i are query_start[i] : query_start[i+1]
    kv_len: torch.Tensor  # [num_seqs] int32: tokens held after this step, its own included
    logit_rows: torch.Tensor  # [num_sampled] int64: sequences of whose last tokens logits are wanted
    kinds: dict[Kind, KindBatch]
    num_decodes: int  # the first num_decodes sequences are decoded, the others prefilled
    max_query_len: int  # of the other sequences; 0 if there are none
    max_kv_len: int

    @property
    def has_prompts(self) -> bool:
        return self.num_decodes < len(self.kv_len)

    def last_tokens(self) -> tuple[torch.Tensor, "StepBatch"]:
        """The rows of every sequence's last token, and the step of these alone.

        A prompt's stays one to prefill, with the keys before it, and so keeps its bits. All rows of decoding stay,
        so that a decoded sequence has no new keys but theirs, as `attend` wants it. A sequence without tokens, as
        fills up a graph, gets a row, any, that attends to one key, as its `kv_len` says.
        """
        rows = self.query_start[1:] - 1
        alone = replace(
            self,
            token_ids=self.token_ids.index_select(0, rows),
            positions=self.positions.index_select(0, rows),
            query_start=torch.arange(len(rows) + 1, dtype=torch.int32, device=rows.device),
            kinds={k: KindBatch(where.pages, where.slots.index_select(0, rows)) for k, where in self.kinds.items()},
            max_query_len=min(1, self.max_query_len),
        )
        return rows, alone
