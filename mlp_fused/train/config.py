"""The settings of `mlp-fused train` (`Config`), and the network that they describe (`build_model`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from ..dtypes import DtypeName
from ..engine import settings
from ..errors import UserError, first_line, listed
from ..module import FusedMLP
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
    "flag",
    "shown",
]

OptimizerName = Literal["adam", "sgd"]
LEARNING_RATES: dict[str, float] = {"adam": 1e-3, "sgd": 0.05}
MOMENTUM = 0.9  # SGD's


@dataclass(frozen=True)
class Config:
    """The settings of `mlp-fused train`: one field for each of its flags, with the flags' defaults.

    Attributes:
        data: an npz file with arrays x and y; None for scikit-learn's handwritten digits.
        task: "classification": y holds classes; "regression": y holds numbers, trained with a squared error.
        hidden: widths of the hidden layers; without any the network is linear.
        activation: a name from `mlp_fused.ACTIVATIONS`.
        dropout: probability of dropping an activation of a hidden layer.
        backend: what computes the network, "auto", "triton" or "reference".
        optimizer: "adam", or "sgd" with momentum 0.9.
        lr: learning rate; None for `LEARNING_RATES[optimizer]`.
        epochs: passes over the training rows, in all (those before a resumption included).
        batch_size: rows per step, of all processes together.
        dtype: "fp32"; or the 16-bit type of autocast, "bf16" or "fp16" (which scales the loss).
        validation_fraction: the part of the rows that is kept for validation.
        seed: of the split, the initial parameters, the shuffling and dropout.
        device: a torch device; "auto" for a CUDA GPU where there is one, else the CPU. Of several processes on GPUs,
            each has one of its own.
        workers: processes that load batches; None for 2 with a GPU and 0 (in this process) without.
        checkpoint: a file to write after each epoch; None for no file.
        resume: carry on from `checkpoint`.

    Raises:
        UserError: a value that cannot be used.
    """

    data: str | None = None
    task: TaskName = "classification"
    hidden: tuple[int, ...] = (512, 512)
    activation: str = "gelu"
    dropout: float = 0.0
    backend: settings.Backend = "auto"
    optimizer: OptimizerName = "adam"
    lr: float | None = None
    epochs: int = 15
    batch_size: int = 64
    dtype: DtypeName = "fp32"
    validation_fraction: float = 0.2
    seed: int = 0
    device: str = "auto"
    workers: int | None = None
    checkpoint: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        choices = {"task": TaskName, "optimizer": OptimizerName, "dtype": DtypeName, "backend": settings.Backend}
        for name, names in choices.items():
            if getattr(self, name) not in get_args(names):
                raise UserError(f"--{name} is {getattr(self, name)}; it needs to be one of {listed(get_args(names))}")
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


def flag(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def shown(value: object) -> str:
    """A value as it would be typed."""
    return " ".join(map(str, value)) or "empty" if isinstance(value, list | tuple) else str(value)


def build_model(features: int, outputs: int, config: Config) -> nn.Module:
    """The network: x (M, features) -> (M, outputs).

    Raises:
        UserError: an unknown activation; a network that memory does not hold.
    """
    try:
        model = FusedMLP(
            features,
            [*config.hidden, outputs],
            activation_layer=config.activation,
            dropout=config.dropout,
            backend=config.backend,
        )
    except (TypeError, ValueError) as error:
        raise UserError(str(error).replace("activation_layer is", "--activation is")) from None
    except RuntimeError as error:
        raise UserError(f"--hidden {shown(config.hidden)} makes no network here: {first_line(error)}") from None
    del model[-1]  # the Dropout that torchvision's order puts after the last Linear: dropped outputs would be zeros
    return model


def build_torch_model(features: int, outputs: int, config: Config) -> nn.Module:
    """`build_model`'s modules in a plain nn.Sequential: the same initial parameters, computed by torch."""
    model = build_model(features, outputs, config)
    return nn.Sequential(*model.children())
