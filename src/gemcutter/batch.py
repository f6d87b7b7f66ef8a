"""StepBatch: everything one forward pass sees, as tensors. Written by run/build.py, read by the model."""

from dataclasses import dataclass

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
    logit_rows: torch.Tensor  # [num_sampled] int64: tokens whose logits are wanted
    kinds: dict[Kind, KindBatch]
    num_decodes: int  # the first num_decodes sequences are decoded, the others prefilled
    max_query_len: int  # of the other sequences; 0 if there are none
    max_kv_len: int
