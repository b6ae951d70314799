"""The two tasks of `mlp-fused train`: classification by cross-entropy, and regression by mean squared error.

A task has the loss function, the targets for it, and the metrics.
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
    """The losses and metrics of one epoch.

    Attributes:
        loss: the mean loss of the training steps. For a regression, losses are in units of the variance of the targets
            in the training rows.
        validation_loss: the mean loss on the validation rows.
        accuracy: the validation accuracy, from 0 to 1; None for a regression.
        r2: the validation R², averaged over the targets; None for a classification.
        rmse: the validation root mean squared error of each target, in its units; empty for a classification.
    """

    loss: float
    validation_loss: float
    accuracy: float | None = None
    r2: float | None = None
    rmse: tuple[float, ...] = ()


def correct(outputs: Tensor, labels: Tensor) -> Tensor:
    """The number of rows in which the largest output is the label's, (1,)."""
    return (outputs.argmax(dim=1) == labels).sum(dim=0, keepdim=True).float()


def squared_errors(outputs: Tensor, targets: Tensor) -> Tensor:
    """The squared error of each target, summed over the rows: Σ (outputs - targets)², (k,)."""
    return (outputs - targets).square().sum(dim=0)


class Classification:
    """Classification: cross-entropy loss and accuracy.

    The baseline is the accuracy of always predicting the largest class of the training rows.
    """

    unscaling = None

    def __init__(self, data: Data, training: Tensor, validation: Tensor) -> None:
        self.loss_function: nn.Module = nn.CrossEntropyLoss()
        self.measure, self.measures = correct, 1
        self.targets = data.y
        largest = data.y[training].bincount().argmax()
        self._largest = data.label(int(largest))
        self._share = (data.y[validation] == largest).double().mean().item()

    def epoch(self, loss: float, validation_loss: float, metrics: Sequence[float]) -> Epoch:
        """Make the record of an epoch from the losses and the mean of `measure` over the validation rows."""
        (accuracy,) = metrics
        return Epoch(loss, validation_loss, accuracy)

    def describe(self, epoch: Epoch) -> str:
        """Return the metrics of an epoch, for its line of progress."""
        return f"accuracy {epoch.accuracy:.4f}"

    def summary(self, epoch: Epoch) -> str:
        """Return the metrics of the last epoch, with the baseline."""
        return (
            f"validation accuracy: {epoch.accuracy:.4f} "
            f"(always predicting {self._largest}, the largest class: {self._share:.4f})"
        )


class Regression:
    """Regression: mean squared error of standardized targets (N, k), R² and RMSE.

    The baseline is the RMSE of always predicting the mean of the training rows.

    Args:
        scaling: `Scaling.fit_targets` of the training rows.
    """

    def __init__(self, data: Data, validation: Tensor, scaling: Scaling) -> None:
        self.loss_function: nn.Module = nn.MSELoss()
        self.measure, self.measures = squared_errors, data.outputs
        self.unscaling = Unscaling(scaling.mean, scaling.scale)  # part of the model, so it may move to another device
        self._scale = scaling.scale
        self.targets = scaling.in_parts(data.y)
        validation_targets = self.targets[validation].double()
        self._variance = validation_targets.var(dim=0, correction=0)
        self._baseline = self._rmse(validation_targets.square().mean(dim=0))

    def epoch(self, loss: float, validation_loss: float, metrics: Sequence[float]) -> Epoch:
        """Make the record of an epoch from the losses and the mean of `measure` over the validation rows.

        R² = 1 - (mean squared error) / variance, averaged over the targets. For a constant target it is 1 without
        error and 0 with one, as in `sklearn.metrics.r2_score`.
        """
        errors = torch.tensor(metrics, dtype=torch.float64)
        r2 = torch.where(self._variance > 0, 1 - errors / self._variance, (errors == 0).double()).mean().item()
        return Epoch(loss, validation_loss, r2=r2, rmse=self._rmse(errors))

    def describe(self, epoch: Epoch) -> str:
        """Return the metrics of an epoch, for its line of progress."""
        return f"R² {epoch.r2:.4f}  RMSE {_numbers(epoch.rmse)}"

    def summary(self, epoch: Epoch) -> str:
        """Return the metrics of the last epoch, with the baseline."""
        return (
            f"validation R²: {epoch.r2:.4f}, RMSE: {_numbers(epoch.rmse)} "
            f"(always predicting the mean of the training rows: RMSE {_numbers(self._baseline)})"
        )

    def _rmse(self, errors: Tensor) -> tuple[float, ...]:
        """Convert mean squared errors of scaled targets, (k,), to root mean squared errors in the targets' units."""
        return tuple((errors.sqrt() * self._scale).tolist())


def _numbers(values: Sequence[float]) -> str:
    return listed((f"{value:,.0f}" if 1e4 <= value < 1e15 else f"{value:.4g}" for value in values), LISTED)


def make_task(data: Data, training: Tensor, validation: Tensor) -> Classification | Regression:
    """Make the task of the data. `training` and `validation` are row numbers."""
    if data.shape is None:
        return Classification(data, training, validation)
    return Regression(data, validation, Scaling.fit_targets(data.y.index_select(0, training)))
