"""heads_fuse: the released heads, and each reason against."""

import pytest

from gemcutter.ops.fused import heads_fuse


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256, 512])
def test_plain_heads_fuse(head_dim):
    assert heads_fuse(head_dim)
    assert not heads_fuse(head_dim, weight_offset=1.0)
    assert not heads_fuse(head_dim, v_scaled=True)


@pytest.mark.parametrize("head_dim", [1, 16, 31, 33, 72, 80, 96, 192, 257, 1024])
def test_other_heads_do_not(head_dim):
    assert not heads_fuse(head_dim)
