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

    def rows(self, *dims: int) -> torch.Tensor:
        """[T, *dims] of the kind, dense."""
        return self.values(self.count, *dims)

    def values(self, *dims: int) -> torch.Tensor:
        """[*dims] of the kind, dense; special elements stand once or less in each first index."""
        x = self._normal(*dims)
        limits = torch.finfo(self.dtype)
        match self.kind:
            case Kind.SMALL:
                x *= 1e-4
            case Kind.LARGE:
                x *= 1e4
            case Kind.HEAVY:  # Cauchy's
                x /= self._normal(*dims)
            case Kind.CONSTANT:
                x.fill_(0.75)
            case Kind.ZEROS:
                x *= 0.0
            case Kind.HUGE:
                self._put(x, limits.max, -(limits.max**0.5))
            case Kind.TIES:
                x.round_()
            case Kind.DENORMAL:
                x *= limits.tiny / 4
            case Kind.INF:
                self._put(x, torch.inf, -torch.inf, 1.0)
            case Kind.NAN:
                self._put(x, torch.nan, 1.0)
        return x.to(self.dtype)

    def token_ids(self, vocabulary: int) -> torch.Tensor:
        """[T] int64."""
        return torch.randint(vocabulary, (self.count,), generator=self.generator, device=self.device)

    def permutation(self, size: int) -> torch.Tensor:
        """[size] int64."""
        return torch.randperm(size, generator=self.generator, device=self.device)

    def weight(self, *dims: int) -> torch.Tensor:
        """[*dims] around 1, some of them negative."""
        return (1.0 + 0.5 * self._normal(*dims)).to(self.dtype)

    def _normal(self, *dims: int) -> torch.Tensor:
        return torch.randn(dims, generator=self.generator, device=self.device)

    def _put(self, x: torch.Tensor, *values: float) -> None:
        """One of the values, in turn, at a random place of every row."""
        if len(x):
            flat, row = x.view(len(x), -1), torch.arange(len(x), device=self.device)
            at = torch.randint(flat.shape[1], (len(x),), generator=self.generator, device=self.device)
            flat[row, at] = torch.tensor(values, device=self.device)[row % len(values)]
