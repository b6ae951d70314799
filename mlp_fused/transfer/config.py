"""The settings of `mlp-fused transfer` (`Config`), and the command (`run`)."""

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
    """The settings of `mlp-fused transfer`. Each field is a command-line flag with a help text.

    Raises:
        UserError: a value has the wrong type or is out of range.
    """

    dims: tuple[int, ...] | None = option(
        None,
        metavar="WIDTH",
        group="network",
        help=f"widths of the network, from the input to the output (default: {' '.join(map(str, DIMS))})",
    )
    checkpoint: str | None = option(
        None,
        metavar="FILE",
        group="network",
        help="checkpoint of mlp-fused train, whose network is measured instead (default: the network of --dims)",
    )
    activation: str | None = option(
        None,
        metavar="NAME",
        group="network",
        help=f"activation after every hidden layer of --dims; mlp-fused train --help lists them "
        f"(default: {ACTIVATION})",
    )
    batch: tuple[int, ...] = option(
        BATCH,
        metavar="N",
        group="measurement",
        help="batch sizes in rows; the parts of a step are printed for the largest (default: {default})",
    )
    dtype: DtypeName = option("fp32", group="measurement", help="dtype of parameters and inputs (default: {default})")
    inference: bool = option(
        False,
        group="measurement",
        help="measure the forward and the copy of the output to the host (default: forward and backward)",
    )
    device: str = option("auto", group="measurement", help=DEVICE_HELP)
    json: bool = option(False, group="output", help="print JSON (default: a table)")
    plot: str | None = option(
        None,
        metavar="FILE",
        group="output",
        help="plot time against batch size to FILE.png or FILE.svg; needs matplotlib (default: no plot)",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dims is not None and (len(self.dims) < 2 or min(self.dims) < 1):
            raise UserError(
                f"--dims is {shown(self.dims)}; it needs to be two widths or more, each 1 or more, such as 784 10"
            )
        for name in ("dims", "activation"):
            if self.checkpoint is not None and getattr(self, name) is not None:
                raise UserError(
                    f"--{name} and --checkpoint are both given, but each describes a network; leave out one"
                )
        if not self.batch or min(self.batch) < 1:
            raise UserError(f"--batch is {shown(self.batch)}; it needs to be 1 or more")
        try:
            resolve(self.activation, "--activation")
        except ValueError as error:
            raise UserError(str(error)) from None


def run(config: Config, *, report: Callable[[str], None] = print, seconds: float = SECONDS) -> Transfer:
    """Measure a network, report the result and, if `config.plot` is set, plot it.

    Args:
        config: the settings.
        report: called with the text to print.
        seconds: the approximate time spent on each measured number.

    Raises:
        UserError: a mistake that the user can fix.
    """
    path = None if config.plot is None else _check_plot(Path(config.plot))
    device = pick_device(config.device)
    model = _network(config)
    width = next(model.parameters()).shape[1]
    chosen = None if config.device == "auto" and device.type == "cpu" else device
    try:
        batch = _make_batch(max(config.batch), width, config.dtype)
        result = measure(
            model, batch, sizes=config.batch, training=not config.inference, device=chosen, seconds=seconds
        )
    except (ValueError, RuntimeError) as error:  # out of memory, or a device that cannot be measured
        raise UserError(first_line(error)) from None
    report(json.dumps(result.as_dict(), indent=2) if config.json else str(result))
    if path is not None:
        from .figure import draw

        try:
            draw(result, path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; the old file, if any, is unchanged") from None
        if not config.json:
            report(f"wrote the plot to {path}")
    return result


def _make_batch(rows: int, width: int, dtype: DtypeName) -> torch.Tensor:
    try:
        return torch.randn(rows, width, dtype=DTYPES[dtype])
    except RuntimeError as error:
        raise UserError(f"--batch is {rows}; cannot make its input: {first_line(error)}") from None


def _network(config: Config) -> FusedMLP:
    model: Any
    if config.checkpoint is None:
        first, *rest = config.dims or DIMS
        try:
            model = FusedMLP(first, rest, activation_layer=config.activation or ACTIVATION)
        except RuntimeError as error:
            dims = shown(config.dims or DIMS)
            raise UserError(f"--dims is {dims}; cannot build the network: {first_line(error)}") from None
    else:
        trained = make_model(config.checkpoint, load_checkpoint(config.checkpoint), backend=None)
        model = trained.get_submodule("network")
    network: FusedMLP = model.to(DTYPES[config.dtype])
    return network


def _check_plot(path: Path) -> Path:
    """Check, before minutes of measuring, that a plot can be written, and return its path.

    Raises:
        UserError: the suffix is unknown, matplotlib is missing, or the file cannot be written.
    """
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"--plot is {path}; it needs to end in .png or .svg")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            '--plot needs matplotlib, which is not installed; install it (pip install "mlp_fused[plot]")'
        ) from None
    check_writable(path, "--plot")
    return path
