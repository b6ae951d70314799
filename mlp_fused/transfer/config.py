"""`mlp-fused transfer`: its settings, and the measurement that they ask for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import load_checkpoint, make_model
from ..dtypes import DTYPES, DtypeName, pick_device
from ..engine.recognize import resolve
from ..errors import UserError, first_line
from ..files import check_writable
from ..flags import DEVICE_HELP, check_fields, option, shown
from ..module import FusedMLP
from ..timing import SECONDS
from .findings import Transfer
from .measurement import measure

__all__ = ["Config", "run"]

DIMS = (784, 512, 512, 10)
BATCH = (64, 256, 1024)
ACTIVATION = "relu"


@dataclass(frozen=True)
class Config:
    """The settings of `mlp-fused transfer`: each field is a flag, and its help says what it does.

    Raises:
        UserError: a value that cannot be used.
    """

    dims: tuple[int, ...] | None = option(
        None,
        metavar="WIDTH",
        group="network",
        help=f"its widths from the input to the output (default: {' '.join(map(str, DIMS))})",
    )
    checkpoint: str | None = option(
        None,
        metavar="FILE",
        group="network",
        help="that of a checkpoint of mlp-fused train instead (default: that of --dims)",
    )
    activation: str | None = option(
        None,
        metavar="NAME",
        group="network",
        help=f"after every hidden layer of --dims; train --help lists them (default: {ACTIVATION})",
    )
    batch: tuple[int, ...] = option(
        BATCH,
        metavar="N",
        group="what is measured",
        help="batch sizes, rows; the largest is the one that is taken apart (default: {default})",
    )
    dtype: DtypeName = option("fp32", group="what is measured", help="of parameters and inputs (default: {default})")
    inference: bool = option(
        False,
        group="what is measured",
        help="forward and the output copied back (default: forward and backward)",
    )
    device: str = option("auto", group="what is measured", help=DEVICE_HELP)
    json: bool = option(False, group="output", help="print JSON (default: a table)")
    plot: str | None = option(
        None,
        metavar="FILE",
        group="output",
        help="draw time against batch size, into FILE.png or FILE.svg; needs matplotlib (default: none is drawn)",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dims is not None and (len(self.dims) < 2 or min(self.dims) < 1):
            raise UserError(
                f"--dims is {shown(self.dims)}; it needs to be two widths or more, each 1 or more, such as 784 10"
            )
        for name in ("dims", "activation"):
            if self.checkpoint is not None and getattr(self, name) is not None:
                raise UserError(f"--{name} and --checkpoint are two networks; it needs to be one of them")
        if not self.batch or min(self.batch) < 1:
            raise UserError(f"--batch is {shown(self.batch)}; it needs to be 1 or more")
        try:
            resolve(self.activation, "--activation")
        except ValueError as error:
            raise UserError(str(error)) from None


def run(config: Config, *, report: Callable[[str], None] = print, seconds: float = SECONDS) -> Transfer:
    """Measure as configured.

    Args:
        config: what to do.
        report: is given what a user wants to read.
        seconds: spent on one number, about.

    Raises:
        UserError: a mistake that the user can mend.
    """
    path = None if config.plot is None else _check_plot(Path(config.plot))
    device = pick_device(config.device)
    model = _network(config)
    width = next(model.parameters()).shape[1]
    asked = None if config.device == "auto" and device.type == "cpu" else device
    try:
        batch = torch.randn(max(config.batch), width, dtype=DTYPES[config.dtype])
        found = measure(model, batch, sizes=config.batch, training=not config.inference, device=asked, seconds=seconds)
    except (ValueError, RuntimeError) as error:  # of torch: out of memory, a kind of device that is not measured
        raise UserError(first_line(error)) from None
    report(json.dumps(found.as_dict(), indent=2) if config.json else str(found))
    if path is not None:
        from .figure import draw

        try:
            draw(found, path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; what was there before is as it was") from None
        if not config.json:
            report(f"drawn into {path}")
    return found


def _network(config: Config) -> FusedMLP:
    model: Any
    if config.checkpoint is None:
        first, *rest = config.dims or DIMS
        try:
            model = FusedMLP(first, rest, activation_layer=config.activation or ACTIVATION)
        except RuntimeError as error:
            raise UserError(f"--dims {shown(config.dims or DIMS)} makes no network here: {first_line(error)}") from None
    else:
        trained = make_model(config.checkpoint, load_checkpoint(config.checkpoint), backend=None)
        model = trained.get_submodule("network")
    network: FusedMLP = model.to(DTYPES[config.dtype])
    return network


def _check_plot(path: Path) -> Path:
    """Before minutes of measuring rather than after.

    Raises:
        UserError: no plot can be drawn there, or by nothing that is installed.
    """
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"--plot is {path}; it needs to be a name that ends in .png or .svg")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError('--plot needs matplotlib, which is not installed: pip install "mlp_fused[plot]"') from None
    check_writable(path, "--plot")
    return path
