"""The settings of `mlp-fused tune` (`Config`), and the workloads that it measures."""

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

BATCHES = (64, 1024)  # the default of --batch
DTYPES: tuple[ArithmeticName, ...] = ("fp32", "bf16")  # the default of --dtype


@dataclass(frozen=True)
class Config:
    """The settings of `mlp-fused tune`. Each field is a command-line flag with a help text.

    `dims` has the widths of each network to measure. If it is empty, the grid of the benches is measured.

    Raises:
        UserError: a value has the wrong type or is out of range, or --batch, --dtype or --activation is given without
            --dims.
    """

    dims: tuple[tuple[int, ...], ...] = option(
        (),
        metavar="WIDTH",
        group="networks",
        help="widths of a network, from the input to the output, such as 784 512 10; repeat the flag for several "
        "networks (default: the grid of the benches)",
    )
    batch: tuple[int, ...] | None = option(
        None,
        metavar="N",
        group="networks",
        help=f"batch sizes in rows, for the networks of --dims (default: {' '.join(map(str, BATCHES))})",
    )
    dtype: tuple[ArithmeticName, ...] | None = option(
        None,
        group="networks",
        help="dtypes for the networks of --dims; tf32 is fp32 with PyTorch's TF32 products allowed "
        f"(default: {' '.join(DTYPES)})",
    )
    activation: str | None = option(
        None,
        metavar="NAME",
        group="networks",
        help="activation after every hidden layer of --dims; mlp-fused train --help lists them "
        f"(default: {ACTIVATION})",
    )
    minutes: float = option(10.0, metavar="T", help="approximate time limit in minutes (default: {default})")
    out: str | None = option(
        None,
        metavar="FILE",
        help="table to write; rows in it are kept (default: your own table, ~/.cache/mlp_fused/<gpu>.json, which "
        "mlp_fused reads)",
    )
    readings: str | None = option(
        None,
        metavar="FILE",
        help="file to which the times of all measured tiles and paths are also written, not only of the fastest; times "
        "in it are kept (default: no file)",
    )

    def __post_init__(self) -> None:
        dims: Any = self.dims
        object.__setattr__(self, "dims", () if dims is None else dims)  # None without the flag
        check_fields(self)
        for name in ("batch", "dtype", "activation"):
            if getattr(self, name) is not None and not self.dims:
                raise UserError(f"--{name} is given without --dims; add --dims, or leave it out to measure the grid")
        for widths in self.dims:
            if len(widths) < 2 or min(widths) < 1:
                raise UserError(
                    f"--dims is {shown(widths)}; it needs to be two widths or more, each 1 or more, such as 784 10"
                )
        if self.batch is not None and (not self.batch or min(self.batch) < 1):
            raise UserError(f"--batch is {shown(self.batch)}; it needs to be 1 or more")
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
        family = Family(
            "--dims", self.dims, self.batch or BATCHES, self.dtype or DTYPES, (self.activation or ACTIVATION,)
        )
        return family.workloads
