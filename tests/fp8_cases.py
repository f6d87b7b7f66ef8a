"""What the FP8 ops are fed, and how their results are compared."""

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def fp8_rows(width: int, dtype: torch.dtype, seed: int = 0, device="cpu") -> torch.Tensor:
    """[16, width]: normal rows between rows of every other kind; the row stride is wider, what lies between NaN."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.full((16, width + 24), torch.nan)
    x = wide[:, 8 : 8 + width]
    x.copy_(torch.randn(16, width, generator=generator))
    x[1] = 0.0
    x[2] = -0.0
    x[3] *= 1e4
    x[4] *= 1e-4
    x[5] = x[5] ** 5
    x[6] = 0.37
    x[7, width // 2] = 6e4  # all others far below it: e4m3's denormals and zeros
    x[8, width - 1] = -torch.inf
    x[9, 0] = torch.nan
    x[10, [0, width - 1]] = torch.tensor([torch.inf, torch.nan])
    x[11] *= 1e-7  # denormal in float16
    x[12] *= 1e-39  # denormal in the others, and below the floor
    x[13] = (x[13] * 64).round() / 2  # few values, many midpoints
    x[13, 0] = 448.0
    x[14] = x[14].sign() * torch.finfo(dtype).max
    return wide.to(device, dtype)[:, 8 : 8 + width]


def same_bits(got, want) -> None:
    """Every output in order; NaN counts as one value, but in q, where it is 0x7F."""
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert (g.dtype, g.shape) == (w.dtype, w.shape) and g.is_contiguous() and w.is_contiguous(), f"output {i}"
        if g.dtype == torch.float8_e4m3fn:
            wrong = g.view(torch.uint8) != w.view(torch.uint8)
        else:
            bits = {2: torch.int16, 4: torch.int32}[g.itemsize]
            wrong = (g.view(bits) != w.view(bits)) & ~(g.isnan() & w.isnan())
        rows = wrong.any(-1).nonzero().squeeze(1).tolist()
        assert not rows, f"output {i}: {wrong.sum()} of {g.numel()} differ, in rows {rows}"
