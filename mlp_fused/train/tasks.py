"""The two tasks of `mlp-fused train`: classes learned by a cross-entropy, numbers learned by a squared error.

A task holds the targets as the loss takes them, and says how good the outputs are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import listed
from ..scaling import LISTED, Scaling, Unscaling
from .data import Data

__all__ = ["Classification", "Epoch", "Regression", "correct", "make_task", "squared_errors"]


@dataclass(frozen=True)
class Epoch:
    """One pass: mean loss while training, then loss and quality on the validation rows.

    Attributes:
        loss, validation_loss: of a regression in units of the targets' variance in the training rows.
        accuracy: from 0 to 1; None for a regression.
        r2: the coefficient of determination, the mean over all targets; None for a classification.
        rmse: the root of the mean squared error of each target, in its own units; empty for a classification.
    """

    loss: float
    validation_loss: float
    accuracy: float | None = None
    r2: float | None = None
    rmse: tuple[float, ...] = ()


def correct(outputs: Tensor, labels: Tensor) -> Tensor:
    """The number of rows (1,) whose largest output is that of their label."""
    return (outputs.argmax(dim=1) == labels).sum(dim=0, keepdim=True).float()


def squared_errors(outputs: Tensor, targets: Tensor) -> Tensor:
    """The sum over rows of each target's squared error, (k,)."""
    return (outputs - targets).square().sum(dim=0)


class Classification:
    """Labels, learned by a cross-entropy and judged by the accuracy, beside that of the largest class alone."""

    unscaling = None

    def __init__(self, data: Data, training: Tensor, validation: Tensor) -> None:
        self.loss_function: nn.Module = nn.CrossEntropyLoss()
        self.measure, self.measures = correct, 1
        self.targets = data.y
        largest = data.y[training].bincount().argmax()
        self._largest = data.label(int(largest))
        self._share = (data.y[validation] == largest).double().mean().item()

    def epoch(self, loss: float, validation_loss: float, measured: Sequence[float]) -> Epoch:
        (accuracy,) = measured
        return Epoch(loss, validation_loss, accuracy)

    def describe(self, epoch: Epoch) -> str:
        return f"accuracy {epoch.accuracy:.4f}"

    def summary(self, epoch: Epoch) -> str:
        return (
            f"validation accuracy: {epoch.accuracy:.4f} "
            f"(class {self._largest}, the largest, is {self._share:.4f} of the validation rows)"
        )


class Regression:
    """Numbers (N, k), learned by a squared error and judged by R² and RMSE, beside those of predicting the mean.

    Args:
        scaling: of the targets, by `Scaling.fit_targets` of the training rows.
    """

    def __init__(self, data: Data, validation: Tensor, scaling: Scaling) -> None:
        self.loss_function: nn.Module = nn.MSELoss()
        self.measure, self.measures = squared_errors, data.outputs
        self.unscaling = Unscaling(scaling.mean, scaling.scale)  # part of the model, so it may move to another device
        self._scale = scaling.scale
        self.targets = scaling.in_parts(data.y)
        validated = self.targets[validation].double()
        self._variance = validated.var(dim=0, correction=0)
        self._mean_alone = self._rmse(validated.square().mean(dim=0))

    def epoch(self, loss: float, validation_loss: float, measured: Sequence[float]) -> Epoch:
        errors = torch.tensor(measured, dtype=torch.float64)
        of_constants = (errors == 0).double()  # as in sklearn.metrics.r2_score
        r2 = torch.where(self._variance > 0, 1 - errors / self._variance, of_constants).mean().item()
        return Epoch(loss, validation_loss, r2=r2, rmse=self._rmse(errors))

    def describe(self, epoch: Epoch) -> str:
        return f"R² {epoch.r2:.4f}  RMSE {_numbers(epoch.rmse)}"

    def summary(self, epoch: Epoch) -> str:
        return (
            f"validation R²: {epoch.r2:.4f}, RMSE: {_numbers(epoch.rmse)} "
            f"(predicting the training rows' mean: RMSE {_numbers(self._mean_alone)})"
        )

    def _rmse(self, errors: Tensor) -> tuple[float, ...]:
        """In the targets' units, from mean squared errors of scaled ones."""
        return tuple((errors.sqrt() * self._scale).tolist())


def _numbers(values: Sequence[float]) -> str:
    return listed((f"{value:,.0f}" if 1e4 <= value < 1e15 else f"{value:.4g}" for value in values), LISTED)


def make_task(data: Data, training: Tensor, validation: Tensor) -> Classification | Regression:
    """The task that the data are of, for those training and validation rows."""
    if data.shape is None:
        return Classification(data, training, validation)
    return Regression(data, validation, Scaling.fit_targets(data.y.index_select(0, training)))
