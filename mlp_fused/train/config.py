"""The settings of `mlp-fused train` (`Config`), and the network built from them (`build_model`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..checkpoint import build_network
from ..dtypes import DtypeName
from ..engine.recognize import resolve
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
HIGHEST_RATE = 1e36  # Adam divides the rate by 0.1 in its first step, and float32 has to hold the result


@dataclass(frozen=True)
class Config:
    """The settings of `mlp-fused train`. Each field is a command-line flag with a help text.

    `hidden` has the widths of the hidden layers. If it is empty, the network is linear. If `lr` is None, the learning
    rate is `LEARNING_RATES[optimizer]`. `epochs` counts all epochs, including those before a resume.

    Raises:
        UserError: a value has the wrong type or is out of range.
    """

    data: str | None = option(
        None,
        metavar="FILE.npz",
        group="data",
        help="file with x (N, ...), the unscaled features in any numeric dtype, and y (N,), the classes as whole "
        "numbers from 0 or as names; for a regression, y (N,) or (N, k) has numbers. Keras's names also work: x_train "
        "and y_train, with x_test and y_test for validation (default: scikit-learn's 1797 handwritten digits)",
    )
    task: TaskName = option(
        "classification",
        group="data",
        help="classification minimizes the cross-entropy; regression minimizes the mean squared error of y scaled by "
        "its standard deviation, and predicts in the units of y (default: {default})",
    )
    validation_fraction: float = option(
        0.2,
        metavar="FRACTION",
        group="data",
        help="fraction of the rows used for validation, unless the file has x_test and y_test (default: {default})",
    )
    batch_size: int = option(
        64,
        metavar="N",
        group="data",
        help="rows per training step; under torchrun, the total over all processes (default: {default})",
    )
    workers: int | None = option(
        None, metavar="N", group="data", help="worker processes of the DataLoader (default: 2 on a GPU, 0 on a CPU)"
    )
    hidden: tuple[int, ...] = option(
        (512, 512),
        metavar="WIDTH",
        group="network",
        may_be_empty=True,
        help="widths of the hidden layers; none for a linear network (default: {default})",
    )
    activation: str = option(
        "gelu",
        metavar="NAME",
        group="network",
        help=f"activation of the hidden layers: {', '.join(ACTIVATIONS)} (default: {{default}})",
    )
    dropout: float = option(
        0.0, metavar="P", group="network", help="dropout probability after each hidden layer (default: {default})"
    )
    backend: Backend = option(
        "auto",
        group="network",
        help="triton runs the Triton kernels; reference runs plain PyTorch; auto chooses (default: {default})",
    )
    epochs: int = option(
        15,
        metavar="N",
        group="training",
        help="total number of epochs, including those before --resume (default: {default})",
    )
    optimizer: OptimizerName = option(
        "adam", group="training", help=f"sgd has momentum {MOMENTUM} (default: {{default}})"
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
        help="bf16 and fp16 train with autocast; fp16 needs a GPU (default: {default})",
    )
    device: str = option("auto", group="training", help=DEVICE_HELP)
    seed: int = option(
        0,
        metavar="N",
        group="training",
        help="random seed of the split, the initial parameters, the shuffling and the dropout (default: {default})",
    )
    checkpoint: str | None = option(
        None,
        metavar="FILE",
        group="checkpoint",
        help="checkpoint file, written after each epoch (default: no checkpoint)",
    )
    resume: bool = option(
        False,
        group="checkpoint",
        help="resume training from --checkpoint, with the same flags as before; only --epochs, --device, --backend, "
        "--workers and the path of --data may differ (default: start from the beginning)",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "activation", _activation_name(self.activation))
        check_fields(self)
        checks = (
            ("hidden", all(width >= 1 for width in self.hidden), "widths of 1 or more"),
            ("dropout", 0 <= self.dropout <= 1, "a probability, from 0 to 1"),
            ("lr", self.lr is None or 0 < self.lr <= HIGHEST_RATE, "a finite number above 0, at most 1e36"),
            ("epochs", self.epochs >= 1, "1 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("validation_fraction", 0 < self.validation_fraction < 1, "between 0 and 1, both excluded"),
            ("seed", 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
            ("workers", self.workers is None or self.workers >= 0, "0 or more"),
        )
        for name, valid, need in checks:
            if not valid:
                raise UserError(f"{flag(name)} is {shown(getattr(self, name))}; it needs to be {need}")
        if self.resume and self.checkpoint is None:
            raise UserError("--resume needs --checkpoint FILE, the checkpoint to resume from")

    @property
    def learning_rate(self) -> float:
        """`lr`, or the optimizer's default."""
        return LEARNING_RATES[self.optimizer] if self.lr is None else self.lr


def _activation_name(activation: Any) -> str:
    """Return the name of an activation that may be given as a module or a function. A checkpoint stores the name."""
    if isinstance(activation, str):
        return activation
    try:
        known = resolve(activation, "--activation")
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from None
    if known is not (default := ACTIVATIONS[known.name]):
        raise UserError(
            f"--activation is {known}, but a checkpoint stores only a name; it needs its default parameters, {default}"
            ", or a name added with register_activation"
        )
    return known.name


Build = Callable[[int, int, Config], nn.Module]  # (features, outputs, config) -> the network

# Settings that may differ when a run is resumed, because they do not change its results. (The device and the backend
# change only rounding.) The path of the data may differ, because the data themselves are compared.
MAY_CHANGE = {"data", "epochs", "device", "backend", "workers", "checkpoint", "resume"}


def build_model(features: int, outputs: int, config: Config) -> nn.Module:
    """Build the network on the CPU, a `FusedMLP`: x (M, features) -> y (M, outputs).

    Raises:
        UserError: the activation is unknown, or the network does not fit in memory.
    """
    try:
        return build_network(features, outputs, vars(config))
    except (TypeError, ValueError) as error:
        raise UserError(str(error).replace("activation_layer is", "--activation is")) from None
    except RuntimeError as error:
        raise UserError(f"--hidden is {shown(config.hidden)}; cannot build the network: {first_line(error)}") from None


def build_torch_model(features: int, outputs: int, config: Config) -> nn.Module:
    """Build the network of `build_model`, with the same initial parameters, as a plain `nn.Sequential`."""
    model = build_model(features, outputs, config)
    return nn.Sequential(*model.children())
