"""Times attention and the q/k/v store on a GPU at real shapes: python bench/attend.py

Decode is bound by memory: its ceiling is the key and value bytes that are in sight, read once. Prefill is bound by
the tensor cores: its ceiling counts the visible (query, key) pairs, 4 * D flops each and head.
"""

import argparse
import json
from functools import partial

import torch
from triton.testing import do_bench

from gemcutter.batch import StepBatch
from gemcutter.ops.attention.attend import attend
from gemcutter.ops.attention.qkv_rope_store import QkvMode, qkv_rope_store
from gemcutter.ops.attention.rope import rope_table
from gemcutter.spec import RopeSpec

PEAK_BYTES = 4.8e12  # H200, per second
PEAK_FLOPS = 989e12  # dense bf16

# q heads, kv heads, head_dim, window
LAYERS = {
    "26B sliding": (16, 8, 256, 1024),
    "26B full": (16, 2, 512, None),
    "12B full": (16, 1, 512, None),
    "31B sliding": (32, 16, 256, 1024),
    "31B full": (32, 4, 512, None),
    "E4B sliding": (8, 2, 256, 512),
}
PAGE = 16
CONTEXT = 262144  # what the page tables are as wide as, for a graph's sake


def make(layer: str, num_seqs: int, query: int, held: int) -> tuple:
    """Arguments of attend: num_seqs sequences of `held` keys, the last `query` of them new; shuffled pages."""
    heads, kv_heads, head_dim, window = LAYERS[layer]
    used = -(-held // PAGE)
    shape = (1 + num_seqs * used, kv_heads, PAGE, head_dim)
    q = torch.randn(num_seqs * query, heads, head_dim, device="cuda", dtype=torch.bfloat16) * 3 / head_dim**0.5
    k_cache, v_cache = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    pages = torch.zeros(num_seqs, CONTEXT // PAGE, dtype=torch.int32, device="cuda")
    pages[:, :used] = 1 + torch.randperm(num_seqs * used, device="cuda").view(num_seqs, used)
    batch = StepBatch(
        token_ids=None,
        positions=None,
        query_start=torch.arange(num_seqs + 1, dtype=torch.int32, device="cuda") * query,
        kv_len=torch.full((num_seqs,), held, dtype=torch.int32, device="cuda"),
        logit_rows=None,
        kinds={},
        num_decodes=num_seqs if query == 1 else 0,
        max_query_len=0 if query == 1 else query,
        max_kv_len=held,
    )
    return q, k_cache, v_cache, batch, pages, window


def graphed(run) -> float:
    """Milliseconds of `run` inside a CUDA graph of 20, as decoding runs it: no launch cost of the host's."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            run()
    return do_bench(graph.replay, warmup=20, rep=100, return_mode="median") / 20


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    results = {}

    def report(name: str, ms: float, amount: float, peak: float, unit: str) -> None:
        rate = amount / ms * 1e3
        results[name] = dict(us=round(ms * 1e3, 1), share_of_peak=round(rate / peak, 3))
        scale = 1e9 if unit == "GB/s" else 1e12
        print(f"{name:44s} {ms * 1e3:9.1f} us {rate / scale:9.1f} {unit} {rate / peak:6.1%} of peak", flush=True)

    for layer, (_, kv_heads, head_dim, window) in LAYERS.items():
        for num_seqs, held in ((1, 1152), (1, 8192), (64, 1152), (64, 8192)):
            run = partial(attend, *make(layer, num_seqs, 1, held))
            # A graph's 20 runs read one cache: below 50 MB it answers from L2, better than in a model.
            read = num_seqs * kv_heads * head_dim * 2 * 2 * min(held, window or held)
            report(f"decode {layer} batch {num_seqs} keys {held}", graphed(run), read, PEAK_BYTES, "GB/s")
            del run  # before the next caches are made
    for layer, (heads, _, head_dim, window) in LAYERS.items():
        for query, held in ((2048, 2048), (8192, 8192), (2048, 8192)):
            run = partial(attend, *make(layer, 1, query, held))
            position = torch.arange(held - query, held)
            pairs = (position + 1).clamp(max=window or held).sum().item()
            flops = 4 * heads * head_dim * pairs
            ms = do_bench(run, return_mode="median")
            report(f"prefill {layer} {query} of {held}", ms, flops, PEAK_FLOPS, "TFLOP/s")
    for layer in ("26B sliding", "26B full"):
        heads, kv_heads, head_dim, window = LAYERS[layer]
        mode, angles = (QkvMode.QKV, 128) if window else (QkvMode.Q_KEQV, 64)
        width = (heads + kv_heads * (2 if window else 1)) * head_dim
        cos, sin = rope_table(RopeSpec(1e4, angles), head_dim, 8192, torch.bfloat16, "cuda")
        for num_tokens in (1, 64, 8192):
            qkv = torch.randn(num_tokens, width, device="cuda", dtype=torch.bfloat16)
            norm = torch.ones(head_dim, device="cuda", dtype=torch.bfloat16)
            k_cache, v_cache = (
                torch.zeros(num_tokens // PAGE + 2, kv_heads, PAGE, head_dim, device="cuda", dtype=torch.bfloat16)
                for _ in range(2)
            )
            where = torch.arange(num_tokens, device="cuda")
            args = (qkv, norm, norm, cos, sin, where, 1e-6, heads, kv_heads, k_cache, v_cache, where + PAGE, mode)
            ms = graphed(partial(qkv_rope_store, *args))
            moved = num_tokens * (width + (heads + 2 * kv_heads) * head_dim) * 2
            report(f"store {layer} tokens {num_tokens}", ms, moved, PEAK_BYTES, "GB/s")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
