"""Features and targets: read them from a file, check them, describe them, split them.

Features keep their dtype here. `scaling.Scaling` converts them to float32.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, count, first_line, listed

__all__ = [
    "Data",
    "TaskName",
    "load_data",
    "load_features",
    "split",
    "to_classes",
    "to_features",
    "to_labels",
    "to_targets",
]

TaskName = Literal["classification", "regression"]
# The maximum number of classes, unless the data have more rows. A larger label is probably an id, and the network's
# last layer would be too large.
MOST_CLASSES = 2**16
TO_NUMBER_CLASSES = "numpy.unique(y, return_inverse=True)[1] to number the classes"
FOR_NUMBERS = "--task regression to predict numbers"

# The names of the arrays of features and targets. Keras's data sets have the second pair. They may also have arrays for
# validation.
PAIRS = (("x", "y"), ("x_train", "y_train"))
VALIDATION = ("x_test", "y_test")
FEATURES, TARGETS = "one example per row", "one target per row"


@dataclass(frozen=True)
class Data:
    """Features and targets of N rows.

    Attributes:
        name: the name of the file.
        x: the features (N, features), finite; any dtype except uint16 and uint32.
        y: the classes (N,), int64 from 0 to classes - 1; for a regression, the numbers (N, k).
        names: the names of the classes if y was text in the file, else None.
        shape: for a regression, the shape of one row of y in the file, () or (k,); for classes, None.
        validation_rows: the number of rows, at the end, that the file has for validation; 0 if `split` draws them.
    """

    name: str
    x: Tensor
    y: Tensor
    names: tuple[str, ...] | None = None
    shape: tuple[int, ...] | None = None
    validation_rows: int = 0

    @property
    def classes(self) -> int:
        """The number of classes."""
        return int(self.y.max()) + 1 if self.names is None else len(self.names)

    @property
    def outputs(self) -> int:
        """The number of outputs of the network: the number of classes, or k for a regression."""
        return self.classes if self.shape is None else self.y.shape[1]

    @property
    def sizes(self) -> dict[str, int]:
        """The number of rows, of features, and of classes or targets, by name."""
        return {
            "rows": len(self.x),
            "features": self.x.shape[1],
            "classes" if self.shape is None else "targets": self.outputs,
        }

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """Sizes, class names and a digest of all values. Data with the same description are the same."""
        digest = hashlib.sha256()
        for array in (self.x, self.y):
            for rows in array.split(4096):
                digest.update(_canonical(rows).numpy().data)
        return {**self._sizes_and_names, "sha256": digest.hexdigest()}

    @property
    def format_1_description(self) -> dict[str, Any]:
        """The description in checkpoints of format 1. Its digest is computed from the features in float32."""
        digest = hashlib.sha256(self.x.float().numpy().data)
        digest.update(self.y.numpy().data)
        return {**self._sizes_and_names, "sha256": digest.hexdigest()}

    @property
    def _sizes_and_names(self) -> dict[str, Any]:
        names = None if self.names is None else list(self.names)
        described = {**self.sizes, "names": names, "shape": None if self.shape is None else list(self.shape)}
        if self.validation_rows:
            described["validation_rows"] = self.validation_rows
        return described

    def split(self, validation_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
        """Return the row numbers for training and for validation: those of the file, or drawn by `split`."""
        if self.validation_rows:
            training, validation = torch.arange(len(self.x)).tensor_split([len(self.x) - self.validation_rows])
            return training, validation
        return split(len(self.x), validation_fraction, seed)

    def remarks(self) -> list[str]:
        """Return a line about labels that look wrong, or about targets that are all the same; none if all is well."""
        if self.shape is not None:
            constant = (self.y == self.y[:1]).all(dim=0).nonzero().flatten().tolist()
            numbers = f"column{'s' * (len(constant) != 1)} {listed(constant, 5)}, counted from 0"
            return [f"y has only one value ({numbers}), so there is nothing to learn"] * bool(constant)
        rows, classes = len(self.y), self.classes
        occurring = len(self.y.unique())
        if occurring == 1:
            return [f"y has only one class, {self.label(int(self.y[0]))}, so there is nothing to learn"]
        missing = classes - occurring
        problems = [f"{missing} of {classes} classes never occur{'s' * (missing == 1)} in y"] * (missing > 0)
        problems += [f"y has {classes} classes in {count(rows, 'row')}, fewer than two rows per class"] * (
            2 * classes > rows
        )
        if not problems:
            return []
        fix = "make sure that y has class names" if self.names else f"use {TO_NUMBER_CLASSES}, or {FOR_NUMBERS}"
        return [f"{' and '.join(problems)}; {fix}"]

    def label(self, number: int) -> str:
        """Return the name of a class, or its number if it has no name."""
        return str(number) if self.names is None else self.names[number]


def _canonical(rows: Tensor) -> Tensor:
    """Convert rows to float64, so that their digest does not depend on the dtype.

    64-bit integers that float64 cannot represent stay as they are.
    """
    doubles = rows.double()
    if rows.dtype in (torch.int64, torch.uint64) and bool((doubles.abs() >= 2.0**53).any()):
        return rows
    return doubles


def load_data(path: str | None, task: TaskName = "classification") -> Data:
    """Load an npz file. Without a path, load scikit-learn's 1797 handwritten digits of 8 x 8 pixels.

    The file has the arrays x and y, or x_train and y_train. In the second case, x_test and y_test are the validation
    rows, if the file has them.

    Raises:
        UserError: the file or its arrays cannot be used, or scikit-learn is not installed.
    """
    if path is None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise UserError(
                "the default data are the digits of scikit-learn, which is not installed; "
                'install it (pip install "mlp_fused[demo]") or use --data FILE.npz'
            ) from None
        digits = load_digits()
        return _make_data("digits", digits.images, digits.target, task)

    with _open_npz(path, "numpy.savez(file, x=..., y=...)") as file:
        pair = max(PAIRS, key=lambda names: sum(name in file.files for name in names))
        needed = f"{pair[0]} ({FEATURES}) and {pair[1]} ({TARGETS})"
        _check_names(file, path, pair, needed if pair != PAIRS[0] else f"{needed}, or {' and '.join(PAIRS[1])}")
        pairs = [pair, *([VALIDATION] if pair != PAIRS[0] and set(VALIDATION) <= set(file.files) else [])]
        xs, ys = zip(*([_read_array(file, path, name) for name in names] for names in pairs))
    x_names, y_names = zip(*pairs)
    try:
        x, y = _join(x_names, xs), _join(y_names, ys)
        data = _make_data(path, x, y, task, len(xs[1]) if len(xs) > 1 else 0)
        for names, features, targets in zip(pairs, xs, ys):
            _check_lengths(names, len(features), len(targets))
        if len(x) < 2:
            raise UserError("there is only one row; training and validation need at least one row each")
    except UserError as error:
        names_used = f" (x is {', then '.join(x_names)}; y is {', then '.join(y_names)})" if pair != PAIRS[0] else ""
        raise UserError(f"{path}{names_used}: {error}") from None
    return data


def _make_data(name: str, x: np.ndarray, y: np.ndarray, task: TaskName, validation_rows: int = 0) -> Data:
    features = to_features(x)
    if task == "regression":
        return Data(name, features, to_targets(y), shape=y.shape[1:], validation_rows=validation_rows)
    return Data(name, features, *to_classes(y), validation_rows=validation_rows)


def _join(names: Sequence[str], arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenate the rows of all arrays.

    Raises:
        UserError: an array has no rows, its rows differ from the first array's in shape or kind of dtype, or no dtype
            holds the integers of all arrays.
    """
    first, *others = arrays
    for name, other in zip(names[1:], others):
        alike = first.ndim and other.ndim and first.shape[1:] == other.shape[1:] and _kind(first) == _kind(other)
        if not alike:
            raise UserError(
                f"{names[0]} has dtype {first.dtype} and shape {first.shape}, but {name} has dtype {other.dtype} and "
                f"shape {other.shape}; the rows of both need the same shape and kind of dtype"
            )
        for array_name, array in ((names[0], first), (name, other)):
            if not len(array):
                raise UserError(f"{array_name} has no rows; training and validation need at least one row each")
    if all(array.dtype.kind in "biu" for array in arrays) and np.result_type(*arrays).kind == "f":
        arrays = _with_one_integer_dtype(names, arrays)  # NumPy would round signed and unsigned integers to float64
    return np.concatenate(arrays) if others else first


def _with_one_integer_dtype(names: Sequence[str], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    smallest = min(int(array.min(initial=0)) for array in arrays)
    largest = max(int(array.max(initial=0)) for array in arrays)
    if smallest < 0 and largest >= 2**63:
        raise UserError(
            f"{', then '.join(names)} have integers from {smallest} to {largest}, which no 64-bit dtype holds; "
            "use astype(float) for all"
        )
    return [array.astype(np.int64 if smallest < 0 else np.uint64) for array in arrays]


def _kind(array: np.ndarray) -> str:
    """Return the kind of an array's dtype. All real numbers are one kind."""
    return "number" if array.dtype.kind in "biuf" else array.dtype.kind


def _check_lengths(names: Sequence[str], rows: int, targets: int) -> None:
    if rows != targets:
        x, y = names
        raise UserError(f"{x} has {count(rows, 'row')} and {y} has {count(targets, 'target')}; it needs {TARGETS}")


def load_features(path: str) -> tuple[Tensor, str]:
    """Load the array x of an npz file, or x_test if there is no x. Return it as (N, features), and its name.

    Raises:
        UserError: the file or the array cannot be used.
    """
    with _open_npz(path, "numpy.savez(file, x=...)") as file:
        name = next((name for name in ("x", VALIDATION[0]) if name in file.files), "x")
        _check_names(file, path, (name,), f"x ({FEATURES}), or {VALIDATION[0]}")
        x = _read_array(file, path, name)
    try:
        return to_features(x), name
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _open_npz(path: str, example: str) -> Any:
    """Open an npz file without loading pickled objects. `example` is code that writes such a file, for the errors."""
    try:
        file = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or first_line(error)}") from None
    except Exception:  # for a file of another kind, numpy raises many kinds of errors
        raise UserError(f"{path} is not an npz file; write one with {example}") from None
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise UserError(f"{path} has a single array; it needs to be an npz file: write it with {example}")
    return file


def _check_names(file: Any, path: str, names: Sequence[str], needed: str) -> None:
    missing = [name for name in names if name not in file.files]
    if missing:
        raise UserError(
            f"{path} has no array {' and no array '.join(missing)}; it has {listed(file.files)}, but needs {needed}"
        )


def _read_array(file: Any, path: str, name: str) -> np.ndarray:
    try:
        array: np.ndarray = file[name]
        return array
    except Exception as error:  # for a damaged or pickled array, zipfile, zlib and numpy raise many kinds of errors
        if "Object arrays" in str(error):
            fix = f"{name}.astype(float)"
            if name.startswith("y"):
                fix = f"{name}.astype(str) or {fix}"
            raise UserError(
                f"{path}: {name} is an array of Python objects, and loading it could run code; save {fix} instead"
            ) from None
        raise UserError(f"cannot read array {name} of {path}: {first_line(error)}") from None


def to_features(x: np.ndarray) -> Tensor:
    """Reshape x (N, ...), of any real dtype, to (N, features). The values stay the same.

    Raises:
        UserError: x is empty, has no real dtype (complex numbers, text, objects or dates), or has values that are NaN,
            infinite or beyond float32.
    """
    if x.ndim == 0 or x.size == 0:
        raise UserError(
            f"x has the shape {x.shape}, {'a single number' if x.ndim == 0 else 'and is empty'}; it needs rows of data"
        )
    return _numbers("x", x)


def to_targets(y: np.ndarray) -> Tensor:
    """Reshape y (N,) or (N, k), of any real dtype, to (N, k). The values stay the same.

    Raises:
        UserError: y has another shape, has no real dtype (complex numbers, text, objects or dates), or has values that
            are NaN, infinite or beyond float32.
    """
    if y.ndim not in (1, 2) or 0 in y.shape[1:]:
        raise UserError(f"y has the shape {y.shape}; it needs one number per row, (N,), or k numbers per row, (N, k)")
    return _numbers("y", y)


def _numbers(name: str, array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "biuf":
        fix = "; use --task classification for class names" if name == "y" and array.dtype.kind in "SUT" else ""
        if array.dtype == object:
            fix = f"; use {name}.astype(float)"
        raise UserError(f"{name} has dtype {array.dtype}; it needs real numbers (integer, float or bool){fix}")
    with np.errstate(over="ignore", invalid="ignore"):
        rows = torch.from_numpy(
            np.ascontiguousarray(array.reshape(len(array), math.prod(array.shape[1:])), dtype=_dtype(array))
        )
    if rows.is_floating_point():
        bad = ~(rows.abs() <= torch.finfo(torch.float32).max) if rows.dtype == torch.float64 else ~rows.isfinite()
        if bad.any():
            first = int(bad.any(dim=1).nonzero()[0])
            raise UserError(
                f"{name} has {count(int(bad.sum()), 'value')} that {'is' if bad.sum() == 1 else 'are'} NaN, infinite "
                f"or beyond float32, the first in row {first} (counted from 0); fix or remove these rows"
            )
    return rows


def _dtype(array: np.ndarray) -> np.dtype:
    """Return a dtype that has these values and that PyTorch's operators support."""
    if array.dtype.kind == "f":
        return np.dtype(f"f{min(array.dtype.itemsize, 8)}")
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        fits = array.dtype.itemsize < 8 or not array.size or int(array.max()) < 2**63
        return np.dtype(f"i{min(2 * array.dtype.itemsize, 8)}" if fits else "u8")
    native: np.dtype = array.dtype.newbyteorder("=")
    return native


def to_classes(y: np.ndarray) -> tuple[Tensor, tuple[str, ...] | None]:
    """Convert labels (N,) or (N, 1) to int64 (N,). If they are text, also return the sorted names of the classes.

    Raises:
        UserError: the labels are neither text nor whole numbers, or there is not one per row.
    """
    y = _one_per_row(y)
    if y.dtype.kind not in "SUT":
        return to_labels(y), None
    if y.dtype.kind == "S":
        try:
            y = np.char.decode(y, "utf-8")
        except UnicodeDecodeError:
            raise UserError("y has bytes that are not UTF-8; save text instead, such as y.astype(str)") from None
    names, labels = np.unique(y, return_inverse=True)
    return torch.from_numpy(labels.astype(np.int64)), tuple(map(str, names))


def to_labels(y: np.ndarray) -> Tensor:
    """Convert y (N,) or (N, 1), whole numbers of any real dtype, to int64 (N,).

    Raises:
        UserError: a label is not a number, not whole, negative, or too large for a class.
    """
    y = _one_per_row(y)
    if y.dtype.kind not in "biuf":
        raise UserError(
            f"y has dtype {y.dtype}; labels need to be whole numbers or text; use {TO_NUMBER_CLASSES}, or y.astype(str)"
        )
    if y.dtype.kind == "f":
        y = y.astype(np.float64)
        bad = ~np.isfinite(y) | (y != np.floor(y))
        _refuse_labels(y, bad, "that is not a whole number" if bad.sum() == 1 else "that are not whole numbers")
    limit = max(MOST_CLASSES, len(y))
    _refuse_labels(y, (y < 0) | (y >= limit), f"outside 0 ... {limit - 1}")
    return torch.from_numpy(np.ascontiguousarray(y, dtype=np.int64))


def _one_per_row(y: np.ndarray) -> np.ndarray:
    if y.ndim == 2 and y.shape[1] == 1:
        return y[:, 0]
    if y.ndim != 1:
        raise UserError(
            f"y has the shape {y.shape}; it needs one label per row; use numpy.argmax(y, axis=1) for one-hot rows, or "
            f"{FOR_NUMBERS}"
        )
    return y


def _refuse_labels(y: np.ndarray, bad: np.ndarray, problem: str) -> None:
    """Raise a UserError about the labels in the mask `bad`, if there are any."""
    if bad.any():
        first = int(bad.argmax())
        raise UserError(
            f"y has {count(int(bad.sum()), 'label')} {problem}, the first in row {first} (counted from 0): "
            f"{y[first]}; labels need to be 0, 1, ..., classes - 1; use {TO_NUMBER_CLASSES}, or {FOR_NUMBERS}"
        )


def split(rows: int, validation_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return random row numbers for training and for validation, at least one each. They depend only on the seed."""
    shuffled = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    validation = min(max(1, round(rows * validation_fraction)), rows - 1)
    return shuffled[validation:], shuffled[:validation]
