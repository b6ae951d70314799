"""Predict with a trained network for the rows of a file.

`mlp-fused predict` parses the command line into a `Config` and calls `run`.
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
from ..files import check_writable, resolved, write_whole
from ..flags import DEVICE_HELP, check_fields, flag, option
from .config import Build, build_model
from .config import Config as Training
from .data import load_features, to_features

__all__ = ["Config", "Predictions", "load_model", "predict", "run"]

ROWS = 4096  # the batch size


@dataclass(frozen=True)
class Config:
    """The settings of `mlp-fused predict`. Each field is a command-line flag with a help text.

    Raises:
        UserError: a value has the wrong type, or --out has another suffix than .npz and .csv, or is also an input file.
    """

    checkpoint: str = option(metavar="FILE", help="checkpoint file of mlp-fused train (required)")
    data: str = option(
        metavar="FILE.npz",
        help="file with the array x (N, ...), unscaled features as in the training's file; if it has no x, x_test is "
        "used (required)",
    )
    out: str = option(
        metavar="FILE",
        help="file to write: FILE.npz with the arrays labels, probabilities and classes, or for a regression the array "
        "values; or FILE.csv with the same in columns (required)",
    )
    device: str = option("auto", help=DEVICE_HELP)

    def __post_init__(self) -> None:
        check_fields(self)
        if Path(self.out).suffix not in (".npz", ".csv"):
            raise UserError(f"--out is {self.out}; it needs to end in .npz or .csv")
        for name in ("checkpoint", "data"):
            if resolved(self.out, "--out") == resolved(getattr(self, name), flag(name)):
                raise UserError(
                    f"--out is {self.out}, which is also --{name} and would be replaced; give --out another name"
                )


@dataclass(frozen=True)
class Predictions:
    """The predictions of a network for N rows. A classification has the first three arrays, a regression the last.

    Attributes:
        labels: (N,), the most likely class of each row: its number, or its name if the training labels were text.
        probabilities: (N, classes), softmax(outputs) in float32.
        classes: (classes,), the class of each column of `probabilities`.
        values: (N,) or (N, k), as in the training file; float64, in the units of the targets.
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
        """Yield the header and rows of a table: label and the classes, or value (several: value 0, value 1 …)."""
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
    """Predict for features x (N, ...) with the network of a checkpoint of `mlp-fused train`.

    Args:
        checkpoint: the file.
        x: the features, unscaled, as in the training file.
        device: "auto", "cpu", "cuda", "cuda:1" …
        batch_size: the number of rows that the network computes at once.

    Raises:
        UserError: the checkpoint, the features, the device or the batch size cannot be used, or outputs of the network
            are NaN or infinite.
    """
    size = whole_number(batch_size)
    if size is None or size < 1:
        raise UserError(f"batch_size is {batch_size!r}; it needs to be a whole number of rows, 1 or more")
    loaded = load_checkpoint(checkpoint)
    rows = to_features(x if isinstance(x, np.ndarray) else _to_array(x))
    data, where = loaded["data"], pick_device(device)
    if rows.shape[1] != data["features"]:
        raise UserError(
            f"x has {count(rows.shape[1], 'feature')} per row; the network of {checkpoint} needs {data['features']}"
        )
    model = make_model(checkpoint, loaded)
    scaling, network, *unscaling = model.children()
    network.to(where)  # scaling and unscaling stay on the CPU, where the rows are
    dtype = loaded["config"]["dtype"]  # autocast as in training, so that the accuracy is the reported one
    with torch.inference_mode(), autocast("fp32" if (dtype, where.type) == ("fp16", "cpu") else dtype, where):
        parts = [network(scaling(part).to(where)).float().cpu() for part in rows.split(size)]
    outputs = torch.cat(parts)
    _check_outputs(outputs, network, checkpoint)
    if unscaling:
        return Predictions(values=unscaling[0](outputs).reshape(-1, *data["shape"]).numpy())
    classes = np.arange(data["classes"]) if data["names"] is None else np.array(data["names"])
    return Predictions(classes[outputs.argmax(dim=1).numpy()], outputs.softmax(dim=1).numpy(), classes)


def _to_array(x: Tensor) -> np.ndarray:
    narrow = x.is_floating_point() and x.element_size() < 4  # NumPy has no bfloat16; float32 has the same values
    return (x.float() if narrow else x).numpy(force=True)


def _check_outputs(outputs: Tensor, network: nn.Module, checkpoint: str | Path) -> None:
    bad = ~outputs.isfinite().all(dim=1)
    if not bad.any():
        return
    if not all(parameter.isfinite().all() for parameter in network.parameters()):
        raise UserError(
            f"the network of {checkpoint} has parameters that are NaN or infinite; train it again, with a smaller --lr "
            "if its loss grew"
        )
    raise UserError(
        f"the network of {checkpoint} gives NaN or infinite outputs for {count(int(bad.sum()), 'row')}, the first of "
        f"them row {int(bad.nonzero()[0])} (counted from 0); their features are too far from those of the training; "
        "fix or remove these rows"
    )


def run(config: Config, *, report: Callable[[str], None] = print) -> Predictions:
    """Predict, and write the predictions to `config.out` atomically.

    Args:
        config: the settings.
        report: called with a line about the result.

    Raises:
        UserError: a mistake that the user can fix. No file is then changed.
    """
    path = Path(config.out)
    check_writable(path, "--out")
    x, name = load_features(config.data)
    predictions = predict(config.checkpoint, x, config.device)
    write = _write_csv if path.suffix == ".csv" else _write_npz
    try:
        write_whole(path, lambda file: write(file, predictions))
    except UnicodeEncodeError as error:
        raise UserError(
            f"a class name has {error.object[error.start]!r}, which UTF-8 cannot encode; use --out FILE.npz instead of "
            f"{path}"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot write the predictions to {path}: {first_line(error)}; the old file, if any, is unchanged"
        ) from error
    array = "" if name == "x" else f" of {name}"
    report(f"{config.data}: {count(len(x), 'row')}{array}; wrote {', '.join(predictions.arrays)} to {path}")
    return predictions


def _write_npz(file: IO[bytes], predictions: Predictions) -> None:
    np.savez(file, **predictions.arrays)  # type: ignore[arg-type]


def _write_csv(file: IO[bytes], predictions: Predictions) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    csv.writer(text).writerows(predictions.rows())
    text.detach()  # flushes the text without closing the file


def load_model(path: str | Path, build: Build = build_model) -> nn.Sequential:
    """Load the trained model of a checkpoint, on the CPU and in eval mode.

    A classification's is `nn.Sequential(scaling, network)`: unscaled features (M, features) of any dtype -> logits
    (M, classes). A regression's is `nn.Sequential(scaling, network, unscaling)`: unscaled features -> values (M, k) in
    float64, in the units of the targets.

    Args:
        path: the checkpoint file.
        build: a function (features, outputs, config) -> network, the same as for `train`.

    Raises:
        UserError: there is no such file, it is not a checkpoint of `mlp-fused train`, or `build` makes another network.
    """
    return make_model(
        path,
        load_checkpoint(path),
        lambda features, outputs, settings: build(features, outputs, Training(**settings)),
    )
