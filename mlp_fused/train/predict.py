"""Predictions of a trained network for the rows of a file.

`mlp-fused predict` is `run(Config(...))` with a command line before it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoint import load_checkpoint, make_model
from ..dtypes import autocast, pick_device
from ..errors import UserError, count, first_line, whole_number
from ..files import check_writable, write_whole
from ..flags import DEVICE_HELP, option
from .config import Build, build_model
from .config import Config as Training
from .data import load_features, to_features

__all__ = ["Config", "Predictions", "load_model", "predict", "run"]

ROWS = 4096  # that go through the network at once


@dataclass(frozen=True)
class Config:
    """The settings of `mlp-fused predict`: each field is a flag, and its help says what it does.

    Raises:
        UserError: a value that cannot be used.
    """

    checkpoint: str = option(metavar="FILE", help="what mlp-fused train --checkpoint wrote (no default)")
    data: str = option(
        metavar="FILE.npz",
        help="array x (N, ...) of features as in the training's file, not scaled: the model does that; or x_test where "
        "there is no x (no default)",
    )
    out: str = option(
        metavar="FILE",
        help="FILE.npz with arrays labels, probabilities and classes, for a regression values; or FILE.csv with the "
        "same in columns (no default)",
    )
    device: str = option("auto", help=DEVICE_HELP)

    def __post_init__(self) -> None:
        if Path(self.out).suffix not in (".npz", ".csv"):
            raise UserError(f"--out is {self.out}; it needs to be a name that ends in .npz or .csv")
        for name in ("checkpoint", "data"):
            if Path(self.out).resolve() == Path(getattr(self, name)).resolve():
                raise UserError(
                    f"--out is {self.out}, the file of --{name}, which it would replace; give it another name"
                )


@dataclass(frozen=True)
class Predictions:
    """The predictions of a network for N rows.

    Attributes:
        labels: (N,), each row's likeliest class: its number, or its name where the training's labels were text.
        probabilities: (N, classes) float32.
        classes: (classes,), all that `labels` could be, in the order of the columns of `probabilities`.
        values: of a regression, in the place of the three: float64 of the targets' shape, (N,) or (N, k).
    """

    labels: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    classes: np.ndarray | None = None
    values: np.ndarray | None = None

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that are not None, by name."""
        return {name: array for name, array in vars(self).items() if array is not None}

    def rows(self) -> Iterable[list[object]]:
        """A table with a header: "label" and a column for each class, or "value" (numbered if there are several)."""
        if self.labels is not None:
            assert self.classes is not None
            assert self.probabilities is not None
            yield ["label", *self.classes.tolist()]
            for label, row in zip(self.labels.tolist(), self.probabilities):
                yield [label, *(f"{probability:.9g}" for probability in row)]
        else:
            assert self.values is not None
            columns = self.values.reshape(len(self.values), -1)
            yield ["value"] if self.values.ndim == 1 else [f"value {number}" for number in range(columns.shape[1])]
            yield from columns.tolist()


def predict(
    checkpoint: str | Path, x: np.ndarray | Tensor, device: str = "auto", batch_size: int = ROWS
) -> Predictions:
    """The predictions of a checkpoint of `mlp-fused train` for features x (N, ...), as they are in the data's file.

    `batch_size` rows go through the network at once.

    Raises:
        UserError: a file or rows that cannot be used.
    """
    size = whole_number(batch_size)
    if size is None or size < 1:
        raise UserError(f"batch_size is {batch_size!r}; it needs to be a number of rows, 1 or more")
    loaded = load_checkpoint(checkpoint)
    rows = to_features(x) if isinstance(x, np.ndarray) else x.reshape(len(x), -1)
    data, where = loaded["data"], pick_device(device)
    if rows.shape[1] != data["features"]:
        raise UserError(
            f"x has {count(rows.shape[1], 'feature')} a row, and the network of {checkpoint} takes {data['features']}"
        )
    model = make_model(checkpoint, loaded)
    scaling, network, *unscaling = model.children()
    network.to(where)  # it alone: the rows are here
    dtype = loaded["config"]["dtype"]  # computed as in training, so that the accuracy is the one that was reported
    with torch.inference_mode(), autocast("fp32" if (dtype, where.type) == ("fp16", "cpu") else dtype, where):
        parts = [network(scaling(part).to(where)).float().cpu() for part in rows.split(size)]
    outputs = torch.cat(parts)
    if unscaling:
        return Predictions(values=unscaling[0](outputs).reshape(-1, *data["shape"]).numpy())
    classes = np.arange(data["classes"]) if data["names"] is None else np.array(data["names"])
    return Predictions(classes[outputs.argmax(dim=1).numpy()], outputs.softmax(dim=1).numpy(), classes)


def run(config: Config, *, report: Callable[[str], None] = print) -> Predictions:
    """Predict as configured, and write the file whole or not at all.

    Args:
        config: what to do.
        report: is given what a user wants to read.

    Raises:
        UserError: a mistake that the user can fix; files are as they were.
    """
    path = Path(config.out)
    check_writable(path, "--out")
    x, name = load_features(config.data)
    predictions = predict(config.checkpoint, x, config.device)
    write = _write_csv if path.suffix == ".csv" else _write_npz
    try:
        write_whole(path, lambda file: write(file, predictions))
    except OSError as error:
        raise UserError(
            f"cannot write the predictions {path}: {first_line(error)}; what was there before is as it was"
        ) from error
    of_name = "" if name == "x" else f" of {name}"
    report(f"{config.data}: {count(len(x), 'row')}{of_name}; {', '.join(predictions.arrays)} are in {path}")
    return predictions


def _write_npz(file: IO[bytes], predictions: Predictions) -> None:
    np.savez(file, **predictions.arrays)  # type: ignore[arg-type]


def _write_csv(file: IO[bytes], predictions: Predictions) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    csv.writer(text).writerows(predictions.rows())
    text.detach()  # flushes, and leaves the file open


def load_model(path: str | Path, build: Build = build_model) -> nn.Sequential:
    """The trained model of a checkpoint, on the CPU and in eval mode: `nn.Sequential(scaling, network)`.

    It takes features as they are in the data's file, (M, features) of any dtype, and gives logits (M, classes). A
    regression's has a last module `unscaling`, and gives values (M, k) in the targets' units, in float64.

    Args:
        path: what `--checkpoint` was.
        build: (features, outputs, config) -> the network; what `train` was given.

    Raises:
        UserError: there is no such file, it is not one of ours, or the network is not the one that was trained.
    """
    return make_model(
        path, load_checkpoint(path), lambda features, outputs, told: build(features, outputs, Training(**told))
    )
