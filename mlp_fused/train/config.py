"""The settings of `mlp-fused train` (`Config`), and the network that they describe (`build_model`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..checkpoint import build_network
from ..dtypes import DtypeName
from ..engine.settings import Backend
from ..errors import UserError, first_line
from ..flags import DEVICE_HELP, check_fields, flag, option, shown
from ..kernels.activations import ACTIVATIONS
from .data import TaskName

__all__ = [
    "LEARNING_RATES",
    "MAY_CHANGE",
    "MOMENTUM",
    "Build",
    "Config",
    "OptimizerName",
    "build_model",
    "build_torch_model",
]

OptimizerName = Literal["adam", "sgd"]
LEARNING_RATES: dict[str, float] = {"adam": 1e-3, "sgd": 0.05}
MOMENTUM = 0.9  # SGD's


@dataclass(frozen=True)
class Config:
    """The settings of `mlp-fused train`: each field is a flag, and its help says what it does.

    `hidden` are the widths of the hidden layers; without any the network is linear. `lr` None is
    `LEARNING_RATES[optimizer]`. `epochs` counts all passes, those before a resumption included.

    Raises:
        UserError: a value that cannot be used.
    """

    data: str | None = option(
        None,
        metavar="FILE.npz",
        group="data",
        help="arrays x (N, ...), any numeric dtype, not scaled, and y (N,), whole numbers from 0 or names of classes; "
        "for a regression y (N,) or (N, k), numbers; or x_train and y_train, with x_test and y_test as the rows for "
        "validation, as Keras's data sets have them (default: scikit-learn's 1797 handwritten digits)",
    )
    task: TaskName = option(
        "classification",
        group="data",
        help="classification learns the classes y; regression the numbers y, by a squared error, scaled by their "
        "standard deviation in training and back in predictions (default: {default})",
    )
    validation_fraction: float = option(
        0.2,
        metavar="PART",
        group="data",
        help="rows kept for validation, unless the file has its own (default: {default})",
    )
    batch_size: int = option(
        64,
        metavar="N",
        group="data",
        help="rows per step, of all processes together under torchrun (default: {default})",
    )
    workers: int | None = option(
        None, metavar="N", group="data", help="processes that load batches (default: 2 with a GPU, 0 without)"
    )
    hidden: tuple[int, ...] = option(
        (512, 512),
        metavar="WIDTH",
        group="network",
        may_be_empty=True,
        help="widths of the hidden layers (default: {default})",
    )
    activation: str = option(
        "gelu", metavar="NAME", group="network", help=f"{{default}} by default; one of: {', '.join(ACTIVATIONS)}"
    )
    dropout: float = option(0.0, metavar="P", group="network", help="after each hidden layer (default: {default})")
    backend: Backend = option("auto", group="network", help="what computes it (default: {default})")
    epochs: int = option(15, metavar="N", group="training", help="passes over the data, in all (default: {default})")
    optimizer: OptimizerName = option(
        "adam", group="training", help=f"sgd has momentum {MOMENTUM}; fused on a GPU (default: {{default}})"
    )
    lr: float | None = option(
        None,
        metavar="RATE",
        group="training",
        help=f"learning rate (default: {', '.join(f'{rate} for {name}' for name, rate in LEARNING_RATES.items())})",
    )
    dtype: DtypeName = option(
        "fp32",
        group="training",
        help="bf16, fp16: mixed precision by autocast; fp16 needs a GPU (default: {default})",
    )
    device: str = option("auto", group="training", help=DEVICE_HELP)
    seed: int = option(
        0, metavar="N", group="training", help="of split, parameters, shuffling and dropout (default: {default})"
    )
    checkpoint: str | None = option(
        None, metavar="FILE", group="checkpoint", help="written after each epoch (default: none is written)"
    )
    resume: bool = option(
        False,
        group="checkpoint",
        help="carry on from --checkpoint, with the flags that it was begun with; --epochs, --device, --backend and "
        "--workers may differ (default: begin anew)",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        checks = (
            ("hidden", all(width >= 1 for width in self.hidden), "widths of 1 or more"),
            ("dropout", 0 <= self.dropout <= 1, "a probability, from 0 to 1"),
            ("lr", self.lr is None or 0 < self.lr < math.inf, "a finite number above 0"),
            ("epochs", self.epochs >= 1, "1 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("validation_fraction", 0 < self.validation_fraction < 1, "between 0 and 1, both excluded"),
            ("seed", 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
            ("workers", self.workers is None or self.workers >= 0, "0 or more"),
        )
        for name, holds, need in checks:
            if not holds:
                raise UserError(f"{flag(name)} is {shown(getattr(self, name))}; it needs to be {need}")
        if self.resume and self.checkpoint is None:
            raise UserError("--resume needs --checkpoint FILE, the file to carry on from")

    @property
    def learning_rate(self) -> float:
        """`lr`, or the optimizer's default."""
        return LEARNING_RATES[self.optimizer] if self.lr is None else self.lr


Build = Callable[[int, int, Config], nn.Module]  # features, outputs, configuration -> the network

# A resumed run may be told these anew, since its numbers do not depend on them (the device and the backend only change
# their rounding). The data may lie elsewhere; they are compared themselves.
MAY_CHANGE = {"data", "epochs", "device", "backend", "workers", "checkpoint", "resume"}


def build_model(features: int, outputs: int, config: Config) -> nn.Module:
    """The network: x (M, features) -> (M, outputs).

    Raises:
        UserError: an unknown activation; a network that memory does not hold.
    """
    try:
        return build_network(features, outputs, vars(config))
    except (TypeError, ValueError) as error:
        raise UserError(str(error).replace("activation_layer is", "--activation is")) from None
    except RuntimeError as error:
        raise UserError(f"--hidden {shown(config.hidden)} makes no network here: {first_line(error)}") from None


def build_torch_model(features: int, outputs: int, config: Config) -> nn.Module:
    """`build_model`'s modules in a plain nn.Sequential: the same initial parameters, computed by torch."""
    model = build_model(features, outputs, config)
    return nn.Sequential(*model.children())
