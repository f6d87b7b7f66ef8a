"""Time the expert layer at 26B-A4B shapes against what the GPU could do: `python bench/experts.py`.

The floor is the larger of bytes / 4.8 TB/s (weights of the experts hit, each once, and x, ids and out) and
flops / 989 TFLOP/s (H200, bf16). Calls run inside a CUDA graph, over several routings in turn, so that weights
come from memory and not from the L2 cache.
"""

import json
from functools import partial

import torch

from gemcutter.ops.activations.geglu import geglu
from gemcutter.ops.moe.experts import experts, experts_reference
from gemcutter.ops.moe.experts_tiles import plan_for
from gemcutter.ops.norms.rms_norm import rms_norm

E, TOP_K, H, N = 128, 8, 2816, 704
BYTES_PER_S, FLOPS_PER_S = 4.8e12, 989e12


def microseconds(calls, repeats: int) -> float:
    """Mean time of one call: all `calls` captured in one graph, replayed `repeats` times."""
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        graph.replay()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) * 1e3 / (repeats * len(calls))


def main() -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(E, 2 * N, H, device="cuda", dtype=torch.bfloat16) * H**-0.5
    down = torch.randn(E, H, N, device="cuda", dtype=torch.bfloat16) * N**-0.5
    rows = []
    print(f"{torch.cuda.get_device_name()}; experts E={E} k={TOP_K} N={N} H={H} bf16")
    print(f"{'T':>6} {'floor us':>9} {'us':>9} {'of floor':>9} {'GB/s':>8} {'TFLOP/s':>8}  tiles of up, of down")
    for tokens in (1, 8, 64, 128, 512, 2048, 8192):
        calls, hits = [], 0
        for _ in range(8 if tokens <= 64 else 2):
            x = torch.randn(tokens, H, device="cuda", dtype=torch.bfloat16)
            ids = torch.rand(tokens, E, device="cuda").topk(TOP_K, -1).indices
            hits += ids.unique().numel()
            calls.append(partial(experts, x, ids, gate_up, down))
        got, want = calls[-1](), experts_reference(x, ids, gate_up, down)
        relative = ((got.double() - want.double()).norm() / want.double().norm()).item()
        assert relative < 0.01, f"T={tokens}: off the reference by {relative}; no timing of wrong results"
        moved = hits / len(calls) * 3 * N * H * 2 + tokens * ((1 + TOP_K) * H * 2 + TOP_K * 8)
        flops = 6.0 * tokens * TOP_K * N * H
        floor = max(moved / BYTES_PER_S, flops / FLOPS_PER_S) * 1e6
        us = microseconds(calls, 50 if tokens <= 512 else 10)
        kernel, *tiles = plan_for(x, TOP_K, gate_up, down)
        rows.append({"tokens": tokens, "us": us, "floor_us": floor})
        print(
            f"{tokens:6d} {floor:9.1f} {us:9.1f} {floor / us:9.0%} {moved / us / 1e3:8.0f} "
            f"{flops / us / 1e6:8.1f}  {kernel} {[tuple(tile) for tile in tiles if tile]}"
        )
    for tokens in (1, 64, 8192):
        x = torch.randn(tokens, H, device="cuda", dtype=torch.bfloat16)
        wide = torch.randn(tokens, 2 * 2112, device="cuda", dtype=torch.bfloat16)
        weight = torch.ones(H, device="cuda", dtype=torch.bfloat16)
        norm = microseconds([partial(rms_norm, x, weight, 1e-6)] * 20, 20)
        gate = microseconds([partial(geglu, wide)] * 20, 20)
        print(f"T={tokens}: rms_norm {norm:.1f} us, geglu of the dense MLP {gate:.1f} us")
        rows.append({"tokens": tokens, "rms_norm_us": norm, "geglu_us": gate})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
