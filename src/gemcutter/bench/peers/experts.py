"""Counterparts of the router's selection and of the sort by expert."""

import torch
import triton

from gemcutter.bench.peers.packages import sgl_kernel, sglang_gemma4, vllm_ops, vllm_router
from gemcutter.bench.peers.peer import Peer


def _sglang_select(logits, scale, top_k):
    def call():
        weights, ids = sglang_gemma4().gemma4_fused_routing(logits, scale, top_k)
        return [ids, weights]

    return call


def _vllm_select(logits, scale, top_k):
    route = vllm_router()

    def call():
        weights, ids = route(logits, top_k, scale)
        return [ids, weights]

    return call


def _sgl_select(logits, scale, top_k):
    if logits.shape[1] > 256:
        return None  # beyond, topk_softmax needs a workspace of another path

    def call():
        weights = torch.empty(len(logits), top_k, dtype=torch.float32, device=logits.device)
        ids = torch.empty(len(logits), top_k, dtype=torch.int32, device=logits.device)
        sgl_kernel().topk_softmax(weights, ids, logits, True, 0.0, None)
        return [ids, weights * scale[ids]]

    return call


def _aligned(ids: torch.Tensor, experts: int, block: int) -> list[torch.Tensor]:
    """Room for slots padded to whole blocks, an expert a block, and how many slots that made."""
    most = ids.numel() * block if ids.numel() < experts else ids.numel() + experts * (block - 1)
    sizes = most, triton.cdiv(most, block), 1
    return [torch.empty(size, dtype=torch.int32, device=ids.device) for size in sizes]


def _block_rows(ids: torch.Tensor) -> int:
    """Rows of a tile of the grouped product, as the engines' tables choose them by the number of tokens."""
    return 16 if len(ids) <= 64 else 64


def _sgl_sort(ids, num_experts):
    if num_experts >= 1024:  # with its one more, past what it has room for: an illegal access on an H200
        return None
    ids, block = ids.to(torch.int32), _block_rows(ids)

    def call():
        room = _aligned(ids, num_experts + 1, block)
        sums = torch.empty(num_experts + 2, dtype=torch.int32, device=ids.device)
        sgl_kernel().moe_align_block_size(ids, num_experts + 1, block, *room, sums, True, False)
        return [None, None]

    return call


def _vllm_sort(ids, num_experts):
    ids, block = ids.to(torch.int32), _block_rows(ids)

    def call():
        vllm_ops()[1].moe_align_block_size(ids, num_experts, block, *_aligned(ids, num_experts, block), None)
        return [None, None]

    return call


EXPERTS = {
    "select_experts": [
        Peer("SGLang gemma4_fused_routing", ("sglang",), _sglang_select),
        Peer("vLLM gemma4 routing", ("vllm",), _vllm_select),
        Peer("sgl_kernel topk_softmax, torch gather and mul", ("sgl_kernel",), _sgl_select),
    ],
    "sort_by_expert": [
        Peer("sgl_kernel moe_align_block_size", ("sgl_kernel",), _sgl_sort),
        Peer("vLLM moe_align_block_size", ("vllm",), _vllm_sort),
    ],
}
