"""Modules that scale features and targets, column by column. They are saved with the network.

`nn.Sequential(scaling, network)` takes features as they are in the file. For regression, an `Unscaling` at the end
gives values in the units of the targets. Scaling is computed in float64: float32 rounds a time in unix seconds to
within 64 seconds, and a network would only see the rounded times.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .errors import count, listed

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Scaling", "Unscaling", "collapsed", "column_remarks", "constant", "join_modules"]

SAMPLE = 4096  # rows in which `collapsed` counts different values
SMALLEST = 5e-324  # the smallest positive float64, whose quarter is 0
LISTED = 5  # columns that a sentence names


class _Float64(nn.Module):
    """A module whose buffers stay float64 when it is cast, for example by half() or to(torch.bfloat16).

    If a device has no float64, such as MPS, they stay on the CPU. Only the buffer `like` follows casts.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for name, buffer in self._buffers.items():
            assert buffer is not None
            self._buffers[name] = fn(buffer) if name == "like" else _without_cast(fn, buffer)
        return self


def _without_cast(fn: Callable[[Tensor], Tensor], buffer: Tensor) -> Tensor:
    try:
        applied = fn(buffer)
        return applied if applied.dtype == buffer.dtype else buffer.to(applied.device)
    except TypeError:  # torch's answer where a device has no float64
        return buffer


class Scaling(_Float64):
    """y = (x - mean) / scale, column by column, computed in float64. x may have any dtype; 64-bit integers are exact.

    `Scaling.fit(x)` uses the mean, and a quarter of the range as the scale. For a bell-shaped column this is about the
    standard deviation. The standard deviation itself would give huge values in columns that are nearly constant, such
    as the pixels at an image's border: with it, the accuracy on the digits is 0.6 percentage points lower.

    Args:
        mean, scale: (features,).
        remainder: (features,), the part of the mean that float64 cannot hold. It matters for integers of 2^53 and more.
        rounding: a dtype that x is rounded to first. It is float32 in checkpoints of format 1, whose networks were
            trained with it.

    Shape:
        x (..., features) -> (..., features), in the dtype that the module was cast to, by default float32.
    """

    mean: Tensor
    scale: Tensor
    remainder: Tensor
    like: Tensor

    def __init__(
        self, mean: Tensor, scale: Tensor, remainder: Tensor | None = None, rounding: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.rounding = rounding
        self.register_buffer("mean", mean.double())
        self.register_buffer("scale", scale.double())
        self.register_buffer("remainder", torch.zeros_like(self.mean) if remainder is None else remainder.double())
        self.register_buffer("like", torch.empty(0), persistent=False)  # follows casts, so its dtype is the output's

    @classmethod
    def fit(cls, x: Tensor) -> Scaling:
        """The scaling of features x (N, features), N > 0. A constant column is only centred."""
        mean, remainder, moved = _centre(x)
        span = moved.amax(dim=0) - moved.amin(dim=0)
        return cls(mean, torch.where(span > 0, (span / 4).clamp(min=SMALLEST), 1.0), remainder)

    @classmethod
    def fit_targets(cls, y: Tensor) -> Scaling:
        """The scaling of targets y (N, k), N > 0, by the standard deviation, so that predicting the mean has loss 1."""
        mean, remainder, moved = _centre(y)
        span = moved.amax(dim=0) - moved.amin(dim=0)
        deviation = span * (moved / span).std(dim=0, correction=0)  # the square of a tiny number would be 0
        return cls(mean, torch.where(span > 0, deviation.clamp(min=SMALLEST), 1.0), remainder)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != self.mean.shape:
            raise RuntimeError(
                f"x is of shape {tuple(x.shape)}; it needs {count(len(self.mean), 'feature')} in its last dimension"
            )
        rounded = x if self.rounding is None else x.to(self.rounding)
        centred = _minus(rounded.to(self.mean.device), self.mean, self.remainder)
        return (centred / self.scale).to(x.device, self.like.dtype)

    def in_parts(self, x: Tensor, rows: int = 2**16) -> Tensor:
        """Return `self(x)`, computed for `rows` rows at a time, so that it needs float64 memory for these alone."""
        return torch.cat([self(part) for part in x.split(rows)])

    def extra_repr(self) -> str:
        return f"{len(self.mean)}" + (f", rounding={self.rounding}" if self.rounding else "")


class Unscaling(_Float64):
    """x = y · scale + mean, column by column, in float64: the inverse of `Scaling(mean, scale)`.

    Shape:
        y (..., k) -> (..., k), always float64: float32 would round large targets, such as a time in unix seconds.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.double())
        self.register_buffer("scale", scale.double())

    def forward(self, y: Tensor) -> Tensor:
        return y.to(self.mean.device).double() * self.scale + self.mean

    def extra_repr(self) -> str:
        return f"{len(self.mean)}"


def join_modules(scaling: Scaling, network: nn.Module, unscaling: Unscaling | None = None) -> nn.Sequential:
    """The model that a checkpoint holds: Sequential(scaling, network), and for regression the unscaling."""
    modules: dict[str, nn.Module] = {"scaling": scaling, "network": network}
    if unscaling is not None:
        modules["unscaling"] = unscaling
    return nn.Sequential(OrderedDict(modules))


def _centre(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mean of x (N, k), the part of the mean that float64 cannot hold, x minus its first row).

    The mean is computed from these differences, because a large mean cancels in them.
    """
    zero = torch.zeros(x.shape[1], dtype=torch.float64)
    first = x[0].double()
    rest = _minus(x[0], first, zero)  # a 64-bit integer's last bits
    differences = _minus(x, first, rest)
    correction = rest + differences.mean(dim=0)
    mean = first + correction
    added = mean - first
    remainder = (first - (mean - added)) + (correction - added)  # the exact error of that sum (Knuth's TwoSum)
    return mean, remainder, differences


def _minus(x: Tensor, mean: Tensor, remainder: Tensor) -> Tensor:
    """x - (mean + remainder) in float64. For 64-bit integers no bit is lost."""
    if x.dtype not in (torch.int64, torch.uint64):
        return x.double() - mean - remainder
    bits = x.view(torch.int64)
    high = (bits >> 32).double() if x.dtype == torch.int64 else ((bits >> 32) & 0xFFFFFFFF).double()
    low = (bits & 0xFFFFFFFF).double()
    integer = mean.round()
    integer_high = (integer / 2**32).floor()
    integer_low = integer - integer_high * 2**32
    difference = (high - integer_high) * 2**32 + (low - integer_low)  # of integers: each product and term is exact
    return difference - (mean - integer) - remainder


def column_remarks(x: Tensor, scaled: Tensor) -> list[str]:
    """A line about the constant columns of features x (N, features), and one about columns that `collapsed` finds."""
    remarks = []
    if columns := constant(x):
        remarks.append(f"constant in the training rows: {_name(columns, x)}")
    if columns := collapsed(x, scaled):
        remarks.append(
            f"stretched by outliers, so that most of their values become equal in float32: {_name(columns, x)}; "
            "clip the outliers or take logarithms"
        )
    return remarks


def _name(columns: list[int], x: Tensor) -> str:
    numbers = f"column{'s' * (len(columns) != 1)} {listed(columns, LISTED)}, counted from 0"
    return f"{len(columns)} of {count(x.shape[1], 'feature')} ({numbers})"


def constant(x: Tensor) -> list[int]:
    """The columns of x (N, features) that have a single value."""
    return (x == x[:1]).all(dim=0).nonzero().flatten().tolist()


def collapsed(x: Tensor, scaled: Tensor) -> list[int]:
    """The columns of x (N, features) that lose more than half of their different values in `scaled`.

    Outliers cause this: after a scaling by 10^9, float32 cannot tell 0.1 from 0.2. The values are counted in some
    thousand rows, evenly spaced.
    """
    step = -(-len(x) // SAMPLE)
    before, after = (_different(rows[::step]) for rows in (x, scaled))
    return (2 * after < before).nonzero().flatten().tolist()


def _different(x: Tensor) -> Tensor:
    ordered = x.sort(dim=0).values
    return 1 + (ordered[1:] != ordered[:-1]).sum(dim=0)
