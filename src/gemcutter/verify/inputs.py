"""What ops are fed: numbers of rows, and kinds of values, from everyday to adversarial, the same on every run."""

from enum import Enum

import torch

ROWS = (0, 1, 2, 3, 7, 16, 64, 255, 256, 257, 1024, 8192)


class Kind(Enum):
    NORMAL = "normal"
    SMALL = "1e-4"
    LARGE = "1e4"
    HEAVY = "heavy tails"
    CONSTANT = "constant"
    ZEROS = "zeros"  # of both signs
    HUGE = "one huge"  # an element whose square overflows, or nearly
    TIES = "ties"
    DENORMAL = "denormal"
    INF = "inf"
    NAN = "nan"


class Draw:
    """Draws an op's arguments, one after the other, from one seed.

    Args:
        rows: tokens, T.
        kind: of the values in rows; weights are normal in all.
    """

    def __init__(self, rows: int, kind: Kind, dtype: torch.dtype, device: torch.device | str) -> None:
        self.count, self.kind, self.dtype, self.device = rows, kind, dtype, torch.device(device)
        self.generator = torch.Generator(self.device)
        self.generator.manual_seed(rows * len(Kind) + list(Kind).index(kind))

    def rows(self, *dims: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[T, *dims], dense."""
        dtype = dtype or self.dtype
        x = self._normal(self.count, *dims)
        limits = torch.finfo(dtype)
        match self.kind:
            case Kind.SMALL:
                x *= 1e-4
            case Kind.LARGE:
                x *= 1e4
            case Kind.HEAVY:  # Cauchy's
                x /= self._normal(self.count, *dims)
            case Kind.CONSTANT:
                x.fill_(0.75)
            case Kind.ZEROS:
                x *= 0.0
            case Kind.HUGE:
                huge = torch.tensor([limits.max, -(limits.max**0.5)], device=self.device)
                self._put(x, huge)
            case Kind.TIES:
                x = x.round_()
            case Kind.DENORMAL:
                x *= limits.tiny / 4
            case Kind.INF:
                self._put(x, torch.tensor([torch.inf, 1.0, -torch.inf], device=self.device))
            case Kind.NAN:
                self._put(x, torch.tensor([torch.nan, 1.0], device=self.device))
        return x.to(dtype)

    def weight(self, *dims: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[*dims] around 1, some of them zero or negative."""
        return (1.0 + 0.5 * self._normal(*dims)).to(dtype or self.dtype)

    def integers(self, high: int, *dims: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """[*dims] in [0, high)."""
        return torch.randint(high, dims, generator=self.generator, device=self.device, dtype=dtype)

    def permutation(self, size: int) -> torch.Tensor:
        """[size] int64."""
        return torch.randperm(size, generator=self.generator, device=self.device)

    def _normal(self, *dims: int) -> torch.Tensor:
        return torch.randn(dims, generator=self.generator, device=self.device)

    def _put(self, x: torch.Tensor, values: torch.Tensor) -> None:
        """One of the values, in turn, at a random place of every row."""
        if self.count:
            flat = x.view(self.count, -1)
            row = torch.arange(self.count, device=self.device)
            flat[row, self.integers(flat.shape[1], self.count)] = values[row % len(values)]
