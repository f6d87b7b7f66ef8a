"""Runs the attention kernels in Triton's interpreter. A script of its own: TRITON_INTERPRET is read at import."""

import torch
import triton
from attend_cases import alone, as_it_stands_for, error, exact, make_case

from gemcutter.ops.attention import widen_pages
from gemcutter.ops.attention.attend_decode import MAX_SLOTS, SPLIT, launch_decode
from gemcutter.ops.attention.attend_prefill import launch_prefill


def attend_by_kernels(q, k_cache, v_cache, batch, pages, window, scale, kv_scales) -> torch.Tensor:
    """What `attend` does on a GPU."""
    out = torch.full_like(q, float("nan"))
    launch_decode(q, k_cache, v_cache, kv_scales, batch.kv_len, pages, batch.num_decodes, window, scale, out)
    launch_prefill(
        q, k_cache, v_cache, kv_scales, batch.query_start, batch.kv_len, pages,
        batch.num_decodes, batch.max_query_len, batch.max_kv_len, window, scale, out,
    )  # fmt: skip
    return out


def check(lengths, heads, kv_heads, head_dim, page_size, window, dtype, bound, scale=1.0, fp8=False) -> None:
    case = make_case(lengths, heads, kv_heads, head_dim, page_size, window, dtype, scale=scale, fp8=fp8)
    got = attend_by_kernels(*case.args)
    wrong = error(got, exact(case))
    print(f"{heads}/{kv_heads} D{head_dim} window {window} page {page_size} {dtype}: error {wrong:.1e}")
    assert wrong < bound, f"error {wrong}"
    for i in range(len(lengths)):
        args, rows = alone(case, i)
        assert torch.equal(attend_by_kernels(*args), got[rows]), f"sequence {i} differs in a crowd"
    if fp8:
        assert torch.equal(attend_by_kernels(*as_it_stands_for(case).args), got), "the scales are no exact factors"


def check_chunks(dtype) -> None:
    """A prompt prefilled at once and in pieces has the same bits."""
    for window in (None, 50):
        case = make_case([(150, 200)], 4, 2, 32, 16, window, dtype)
        whole = attend_by_kernels(*case.args)
        for begin, end in ((0, 3), (3, 67), (67, 149), (149, 150)):
            case.batch.query_start = torch.tensor([0, end - begin], dtype=torch.int32)
            case.batch.kv_len = torch.tensor([50 + end], dtype=torch.int32)
            case.batch.max_query_len = end - begin
            chunk = attend_by_kernels(case.q[begin:end].clone(), *case.args[1:])
            assert torch.equal(chunk, whole[begin:end]), (window, begin)


def check_many_splits() -> None:
    """More splits than partials: a partial folds several."""
    lengths = [(1, SPLIT * MAX_SLOTS + 3 * SPLIT + 17), (1, SPLIT * MAX_SLOTS), (1, 1)]
    check(lengths, 2, 1, 32, 64, None, torch.float32, 1e-5)


def check_padded_row() -> None:
    case = make_case([(1, 9), (1, 9)], 4, 2, 32, 16, None, torch.float32)
    case.batch.kv_len[1] = 0
    out = attend_by_kernels(*case.args)
    assert out[0].isfinite().all() and torch.equal(out[1], torch.zeros_like(out[1]))


if __name__ == "__main__":
    assert triton.knobs.runtime.interpret, "run with TRITON_INTERPRET=1"
    torch.set_num_threads(1)
    mixed = [(1, 1), (1, 5), (1, 128), (1, 300), (2, 2), (70, 70), (33, 200)]
    check(mixed, 4, 2, 32, 16, 40, torch.float32, 1e-5)
    check(mixed, 4, 1, 64, 64, None, torch.float16, 4e-3)
    check(mixed, 4, 1, 64, 64, 40, torch.bfloat16, 1e-2)
    check(mixed[1:], 6, 2, 32, 8, 1, torch.float16, 4e-3)
    check([(1, 260), (9, 150)], 16, 1, 512, 16, None, torch.float16, 4e-3)
    check([(1, 260), (9, 150)], 2, 1, 256, 16, 128, torch.float32, 1e-5)
    check([(1, 260), (9, 150)], 12, 1, 128, 16, None, torch.float16, 4e-3, scale=128**-0.5)
    check([(1, 260), (9, 150)], 2, 1, 32, 16, 40, torch.float32, 1e-5, scale=3.0)
    check(mixed, 4, 2, 32, 16, 40, torch.float32, 1e-5, fp8=True)
    check(mixed, 4, 2, 64, 8, None, torch.float16, 4e-3, scale=0.3, fp8=True)
    check(mixed, 6, 2, 64, 16, 40, torch.bfloat16, 1e-2, fp8=True)
    widen_pages.TOGETHER = 600  # two prompts a copy, or one
    check([*mixed, (5, 90), (80, 100)], 4, 2, 32, 16, 40, torch.float32, 1e-5, fp8=True)
    check([*mixed, (5, 290)], 4, 2, 32, 128, None, torch.float32, 1e-5, fp8=True)
    check_chunks(torch.float16)
    check_many_splits()
    check_padded_row()
