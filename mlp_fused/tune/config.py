"""The settings of `mlp-fused tune`, and what is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..dtypes import ArithmeticName
from ..engine.recognize import resolve
from ..errors import UserError
from ..flags import check_fields, option, shown
from ..grid import ACTIVATION, ANCHORS, GRID, Family, Workload

__all__ = ["Config"]

BATCHES = (64, 1024)  # what --dims is measured with where the flags do not say otherwise
DTYPES: tuple[ArithmeticName, ...] = ("fp32", "bf16")


@dataclass(frozen=True)
class Config:
    """The settings of `mlp-fused tune`: each field is a flag, and its help says what it does.

    `dims` are networks, each by its widths; without any, the benches' grid is measured.

    Raises:
        UserError: a value that cannot be used.
    """

    dims: tuple[tuple[int, ...], ...] = option(
        (),
        metavar="WIDTH",
        group="what is measured",
        help="a network, by its widths from the input to the output, such as 784 512 10; may be given several times "
        "(default: the grid of the benches)",
    )
    batch: tuple[int, ...] | None = option(
        None,
        metavar="N",
        group="what is measured",
        help=f"rows of a batch, with --dims (default: {' '.join(map(str, BATCHES))})",
    )
    dtype: tuple[ArithmeticName, ...] | None = option(
        None,
        group="what is measured",
        help="what is computed in, with --dims; tf32 is fp32 where torch is allowed tf32 "
        f"(default: {' '.join(DTYPES)})",
    )
    activation: str | None = option(
        None,
        metavar="NAME",
        group="what is measured",
        help=f"after every hidden layer, with --dims; train --help lists them (default: {ACTIVATION})",
    )
    minutes: float = option(10.0, metavar="T", help="how long it may take, about (default: {default})")
    out: str | None = option(
        None,
        metavar="FILE",
        help="the table to write, or to add to (default: your own, ~/.cache/mlp_fused/<gpu>.json, which is read)",
    )
    readings: str | None = option(
        None,
        metavar="FILE",
        help="also write the time of every tile and path that is measured, not of the fastest alone, or add them to "
        "those in FILE (default: none are kept)",
    )

    def __post_init__(self) -> None:
        given: Any = self.dims
        object.__setattr__(self, "dims", () if given is None else given)  # the command line gives None
        check_fields(self)
        for name in ("batch", "dtype", "activation"):
            if getattr(self, name) is not None and not self.dims:
                raise UserError(f"--{name} is of networks that --dims gives; without --dims the grid is measured")
        for widths in self.dims:
            if len(widths) < 2 or min(widths) < 1:
                raise UserError(
                    f"--dims is {shown(widths)}; it needs to be two widths or more, each 1 or more, such as 784 10"
                )
        if self.batch is not None and (not self.batch or min(self.batch) < 1):
            raise UserError(f"--batch is {shown(self.batch)}; it needs to be 1 or more")
        if self.readings is not None and self.readings == self.out:
            raise UserError(f"--readings is {self.readings}, as --out is; it needs to be another file")
        if not 0 < self.minutes < math.inf:
            raise UserError(f"--minutes is {self.minutes}; it needs to be a finite number above 0")
        try:
            resolve(self.activation, "--activation")
        except ValueError as error:
            raise UserError(str(error)) from None

    @property
    def workloads(self) -> list[Workload]:
        """The workloads to measure."""
        if not self.dims:
            return [*ANCHORS, *(workload for family in GRID for workload in family.workloads)]
        asked = Family(
            "asked for", self.dims, self.batch or BATCHES, self.dtype or DTYPES, (self.activation or ACTIVATION,)
        )
        return asked.workloads
