"""Rows of features with their targets: read from a file, checked, described, split.

Features keep their dtype here; `scaling.Scaling` turns them into float32.
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
MOST_CLASSES = 2**16  # of data with fewer rows than that; a label beyond is no class but an id, and a network too large
NUMBER_CLASSES = "numpy.unique(y, return_inverse=True)[1] numbers the classes that occur"
AS_NUMBERS = "--task regression takes y as numbers"

# The arrays of a file with features and targets, by name; the second form is that of Keras's data sets, which have a
# part of their own for validation, or none.
PAIRS = (("x", "y"), ("x_train", "y_train"))
VALIDATION = ("x_test", "y_test")
FEATURES, TARGETS = "a row an example", "a target a row"


@dataclass(frozen=True)
class Data:
    """Rows with their targets.

    Attributes:
        name: the file's.
        x: (N, features), finite, of any dtype but 16-bit and 32-bit unsigned integers.
        y: classes (N,) int64 in 0 ... classes - 1, or for regression numbers (N, k).
        names: the classes' names, where y was text.
        shape: of a row's numbers in the file: () or (k,); None for classes.
        validation_rows: the number of last rows that the file has for validation; 0 if a part is to be drawn.
    """

    name: str
    x: Tensor
    y: Tensor
    names: tuple[str, ...] | None = None
    shape: tuple[int, ...] | None = None
    validation_rows: int = 0

    @property
    def classes(self) -> int:
        return int(self.y.max()) + 1 if self.names is None else len(self.names)

    @property
    def outputs(self) -> int:
        """The network's outputs: the classes, or the numbers of a row."""
        return self.classes if self.shape is None else self.y.shape[1]

    @property
    def sizes(self) -> dict[str, int]:
        return {
            "rows": len(self.x),
            "features": self.x.shape[1],
            "classes" if self.shape is None else "targets": self.outputs,
        }

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """Sizes, names, and a digest of every value, which tell these data from others."""
        digest = hashlib.sha256()
        for array in (self.x, self.y):
            for rows in array.split(4096):
                digest.update(_canonical(rows).numpy().data)
        return {**self._sizes_and_names, "sha256": digest.hexdigest()}

    @property
    def description_of_format_1(self) -> dict[str, Any]:
        """The same with the digest that checkpoints of format 1 have, of features in float32."""
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
        """Row numbers for training and for validation: the file's own parts, or else drawn by `split`."""
        if self.validation_rows:
            training, validation = torch.arange(len(self.x)).tensor_split([len(self.x) - self.validation_rows])
            return training, validation
        return split(len(self.x), validation_fraction, seed)

    def remarks(self) -> list[str]:
        """A line for classes that look as if they were none, or numbers that are all the same."""
        if self.shape is not None:
            constant = (self.y == self.y[:1]).all(dim=0).nonzero().flatten().tolist()
            numbers = f"column{'s' * (len(constant) != 1)} {listed(constant, 5)}, counted from 0"
            return [f"y has only one value ({numbers}), so there is nothing to learn"] * bool(constant)
        rows, classes = len(self.y), self.classes
        occurring = len(self.y.unique())
        if occurring == 1:
            return [f"y has only one class, {self.label(int(self.y[0]))}, so there is nothing to learn"]
        missing = classes - occurring
        found = [f"{missing} of {classes} classes never occur{'s' * (missing == 1)} in y"] * (missing > 0)
        found += [f"y has {classes} classes in {count(rows, 'row')}, fewer than two rows a class"] * (
            2 * classes > rows
        )
        if not found:
            return []
        fix = "a class needs a name that recurs" if self.names else f"{NUMBER_CLASSES}, {AS_NUMBERS}"
        return [f"{' and '.join(found)}; {fix}"]

    def label(self, number: int) -> str:
        """A class's name, or its number."""
        return str(number) if self.names is None else self.names[number]


def _canonical(rows: Tensor) -> Tensor:
    """The values in float64, so that a dtype changes no digest; 64-bit integers that it cannot hold as they are."""
    doubles = rows.double()
    if rows.dtype in (torch.int64, torch.uint64) and bool((doubles.abs() >= 2.0**53).any()):
        return rows
    return doubles


def load_data(path: str | None, task: TaskName = "classification") -> Data:
    """The arrays of an npz file, or scikit-learn's 1797 handwritten digits of 8 x 8 pixels.

    The file has x and y; or x_train and y_train, and if it also has x_test and y_test, they are for validation.

    Raises:
        UserError: the file or its arrays cannot be used; scikit-learn is not installed.
    """
    if path is None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise UserError(
                "the default data are scikit-learn's digits, and scikit-learn is not installed: "
                'pip install "mlp_fused[demo]", or give data of your own with --data FILE.npz'
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
            raise UserError("there is one row; training and validation need one each at the least")
    except UserError as error:
        about = f" (x is {', then '.join(x_names)}; y is {', then '.join(y_names)})" if pair != PAIRS[0] else ""
        raise UserError(f"{path}{about}: {error}") from None
    return data


def _make_data(name: str, x: np.ndarray, y: np.ndarray, task: TaskName, validation_rows: int = 0) -> Data:
    features = to_features(x)
    if task == "regression":
        return Data(name, features, to_targets(y), shape=y.shape[1:], validation_rows=validation_rows)
    return Data(name, features, *to_classes(y), validation_rows=validation_rows)


def _join(names: Sequence[str], arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The rows of all arrays, one array's after the other's.

    Raises:
        UserError: an array has no rows, or its rows are not like the first one's.
    """
    first, *others = arrays
    for name, other in zip(names[1:], others):
        alike = first.ndim and other.ndim and first.shape[1:] == other.shape[1:] and _kind(first) == _kind(other)
        if not alike:
            raise UserError(
                f"{names[0]} is {first.dtype} of shape {first.shape} and {name} {other.dtype} of shape {other.shape}; "
                "the rows of both need to be alike"
            )
        for each, array in ((names[0], first), (name, other)):
            if not len(array):
                raise UserError(f"{each} has no rows; training and validation need one each at the least")
    return np.concatenate(arrays) if others else first


def _kind(array: np.ndarray) -> str:
    """The kind of an array's dtype; one kind for all real numbers."""
    return "number" if array.dtype.kind in "biuf" else array.dtype.kind


def _check_lengths(names: Sequence[str], rows: int, labels: int) -> None:
    if rows != labels:
        x, y = names
        raise UserError(
            f"{x} has {count(rows, 'row')} and {y} has {count(labels, 'label')}; there needs to be one label a row"
        )


def load_features(path: str) -> tuple[Tensor, str]:
    """The array x of an npz file as (N, features), or x_test if it has no x; and the array's name.

    Raises:
        UserError: the file or the array cannot be used.
    """
    with _open_npz(path, "numpy.savez(file, x=...)") as file:
        name = next((each for each in ("x", VALIDATION[0]) if each in file.files), "x")
        _check_names(file, path, (name,), f"x ({FEATURES}), or {VALIDATION[0]}")
        x = _read_array(file, path, name)
    try:
        return to_features(x), name
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _open_npz(path: str, example: str) -> Any:
    """The file, nothing pickled in which is loaded. `example` writes such a file."""
    try:
        file = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or first_line(error)}") from None
    except Exception:  # numpy answers a file of another kind with errors of every class
        raise UserError(f"{path} is not an npz file; {example} writes one") from None
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise UserError(f"{path} holds one array; it needs to be an npz file: {example}")
    return file


def _check_names(file: Any, path: str, names: Sequence[str], needed: str) -> None:
    missing = [name for name in names if name not in file.files]
    if missing:
        raise UserError(
            f"{path} has no array {' and no array '.join(missing)}; it has {listed(file.files)}, and needs {needed}"
        )


def _read_array(file: Any, path: str, name: str) -> np.ndarray:
    try:
        array: np.ndarray = file[name]
        return array
    except Exception as error:  # a damaged or a pickled member: zipfile's, zlib's and numpy's errors
        if "Object arrays" in str(error):
            fix = f"{name}.astype(float)"
            if name.startswith("y"):
                fix = f"{name}.astype(str) or {fix}"
            raise UserError(
                f"{path}: {name} is an array of Python objects, and loading those can run code; save {fix} in its place"
            ) from None
        raise UserError(f"cannot read array {name} of {path}: {first_line(error)}") from None


def to_features(x: np.ndarray) -> Tensor:
    """x (N, ...) of any real numeric dtype as (N, features), its values unchanged.

    Raises:
        UserError: no data; complex numbers, text, objects, dates; NaN, infinity or numbers beyond float32.
    """
    if x.ndim == 0 or x.size == 0:
        raise UserError(
            f"x is of shape {x.shape}, {'a single number' if x.ndim == 0 else 'empty'}; it needs rows of data"
        )
    return _numbers("x", x)


def to_targets(y: np.ndarray) -> Tensor:
    """y (N,) or (N, k) of any real numeric dtype as (N, k), its values unchanged.

    Raises:
        UserError: another shape; complex numbers, text, objects, dates; NaN, infinity or numbers beyond float32.
    """
    if y.ndim not in (1, 2) or 0 in y.shape[1:]:
        raise UserError(f"y is of shape {y.shape}; it needs a number a row, (N,), or k numbers a row, (N, k)")
    return _numbers("y", y)


def _numbers(name: str, array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "biuf":
        fix = "; --task classification takes names of classes" if name == "y" and array.dtype.kind in "SUT" else ""
        if array.dtype == object:
            fix = f"; {name}.astype(float) makes numbers of them"
        raise UserError(f"{name} is of dtype {array.dtype}; it needs to be real numbers (integer, float or bool){fix}")
    with np.errstate(over="ignore", invalid="ignore"):
        rows = torch.from_numpy(
            np.ascontiguousarray(array.reshape(len(array), math.prod(array.shape[1:])), dtype=_dtype(array))
        )
    if rows.is_floating_point():
        bad = ~(rows.abs() <= torch.finfo(torch.float32).max) if rows.dtype == torch.float64 else ~rows.isfinite()
        if bad.any():
            first = int(bad.any(dim=1).nonzero()[0])
            raise UserError(
                f"{name} has {count(int(bad.sum()), 'value')} NaN, infinite or beyond float32, the first in row "
                f"{first} (counted from 0); mend or leave out those rows"
            )
    return rows


def _dtype(array: np.ndarray) -> np.dtype:
    """The dtype in which torch has those values, and operators for it."""
    if array.dtype.kind == "f":
        return np.dtype(f"f{min(array.dtype.itemsize, 8)}")
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        fits = array.dtype.itemsize < 8 or not array.size or int(array.max()) < 2**63
        return np.dtype(f"i{min(2 * array.dtype.itemsize, 8)}" if fits else "u8")
    native: np.dtype = array.dtype.newbyteorder("=")
    return native


def to_classes(y: np.ndarray) -> tuple[Tensor, tuple[str, ...] | None]:
    """Labels (N,) or (N, 1) as int64 (N,), and the classes' names in alphabetical order if the labels are text.

    Raises:
        UserError: labels that are neither text nor whole numbers, or not one a row.
    """
    y = _one_a_row(y)
    if y.dtype.kind not in "SUT":
        return to_labels(y), None
    if y.dtype.kind == "S":
        try:
            y = np.char.decode(y, "utf-8")
        except UnicodeDecodeError:
            raise UserError("y has bytes that are not UTF-8; save text in their place, such as y.astype(str)") from None
    names, labels = np.unique(y, return_inverse=True)
    return torch.from_numpy(labels.astype(np.int64)), tuple(map(str, names))


def to_labels(y: np.ndarray) -> Tensor:
    """y (N,) or (N, 1), whole numbers of any real dtype, as int64 (N,).

    Raises:
        UserError: labels that are no numbers, not whole, negative, or too large to be classes.
    """
    y = _one_a_row(y)
    if y.dtype.kind not in "biuf":
        raise UserError(
            f"y is of dtype {y.dtype}; labels need to be whole numbers "
            "(numpy.unique(y, return_inverse=True)[1]) or text (y.astype(str))"
        )
    if y.dtype.kind == "f":
        y = y.astype(np.float64)
        bad = ~np.isfinite(y) | (y != np.floor(y))
        _refuse_labels(y, bad, "that is not a whole number" if bad.sum() == 1 else "that are not whole numbers")
    limit = max(MOST_CLASSES, len(y))
    _refuse_labels(y, (y < 0) | (y >= limit), f"outside 0 ... {limit - 1}")
    return torch.from_numpy(np.ascontiguousarray(y, dtype=np.int64))


def _one_a_row(y: np.ndarray) -> np.ndarray:
    if y.ndim == 2 and y.shape[1] == 1:
        return y[:, 0]
    if y.ndim != 1:
        raise UserError(
            f"y is of shape {y.shape}; it needs one label a row (numpy.argmax(y, axis=1) makes them of one-hot rows, "
            f"{AS_NUMBERS})"
        )
    return y


def _refuse_labels(y: np.ndarray, bad: np.ndarray, what: str) -> None:
    if bad.any():
        first = int(bad.argmax())
        raise UserError(
            f"y has {count(int(bad.sum()), 'label')} {what}, the first in row {first} (counted from 0): {y[first]}; "
            f"labels need to be 0, 1, ... up to the number of classes less one: {NUMBER_CLASSES}, {AS_NUMBERS}"
        )


def split(rows: int, validation_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Row numbers for training and for validation, at least one each: a shuffle that depends on the seed alone."""
    shuffled = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    kept = min(max(1, round(rows * validation_fraction)), rows - 1)
    return shuffled[kept:], shuffled[:kept]
