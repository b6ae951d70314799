"""Reading and checking of features and targets, and remarks on unlikely targets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlp_fused.errors import UserError
from mlp_fused.train.data import Data, load_data, load_features, split, to_classes, to_features, to_labels, to_targets


@pytest.mark.parametrize(
    "dtype", ["?", "u1", "i1", "<u2", ">i2", "i4", "u4", "u8", "i8", "f2", "<f4", ">f4", "f8", "longdouble"]
)
def test_features_of_any_numeric_dtype_become_rows_with_the_same_values(dtype: str) -> None:
    x = np.arange(24).reshape(4, 3, 2) % 2 if dtype == "?" else np.arange(24).reshape(4, 3, 2)
    rows = to_features(x.astype(dtype))
    assert rows.tolist() == x.reshape(4, 6).tolist()
    rows.amin()  # an operator that torch lacks for some unsigned integers


@pytest.mark.parametrize(
    ("values", "dtype"),
    [([2**63 - 1, -(2**63)], "int64"), ([2**64 - 1, 0], "uint64"), ([2**53 + 1, 2**53], "uint64")],
)
def test_large_integers_keep_every_bit(values: list[int], dtype: str) -> None:
    assert to_features(np.array(values, dtype)).flatten().tolist() == values


def test_float64_features_keep_every_bit() -> None:
    x = np.array([[1.7e9 + 0.125], [1e-300]])
    assert to_features(x).tolist() == x.tolist()


def test_one_dimensional_features_are_a_column() -> None:
    assert to_features(np.arange(5)).shape == (5, 1)


def test_strided_features() -> None:
    x = np.arange(24.0).reshape(6, 4)[::-2, ::2]
    assert to_features(x).tolist() == x.tolist()


@pytest.mark.parametrize("dtype", ["?", "u1", "i1", ">i4", "u8", "i8", "f2", "f4", ">f8"])
def test_whole_labels_of_any_dtype_become_int64(dtype: str) -> None:
    labels = to_labels(np.array([1, 0, 1, 1]).astype(dtype))
    assert labels.dtype == torch.int64
    assert labels.tolist() == [1, 0, 1, 1]


def test_a_column_of_labels() -> None:
    assert to_labels(np.array([[2.0], [0.0]])).tolist() == [2, 0]


@pytest.mark.parametrize("dtype", ["U5", "S5"])
@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_text_labels_give_named_classes(dtype: str, shape: tuple[int, ...]) -> None:
    labels, names = to_classes(np.array(["oak", "elm", "oak", "birch"], dtype).reshape(shape))
    assert names == ("birch", "elm", "oak")
    assert labels.dtype == torch.int64
    assert labels.tolist() == [2, 1, 2, 0]


def test_names_beyond_ascii() -> None:
    assert to_classes(np.array(["Öl".encode(), b"Gas"]))[1] == ("Gas", "Öl")
    with pytest.raises(UserError, match="^y has bytes that are not UTF-8; save text instead, such as y.astype"):
        to_classes(np.array([b"\xff\xfe", b"a"]))


@pytest.mark.parametrize("y", [np.array(["a", "b"], object), np.array([1, 2], object)], ids=["text", "numbers"])
def test_objects_are_refused_with_the_fix(y: np.ndarray) -> None:
    with pytest.raises(
        UserError, match=r"^y has dtype object; labels need to be whole numbers or text; use .*, or y\.astype\(str\)$"
    ):
        to_classes(y)
    numbers = r"has dtype object; it needs real numbers \(.*\)"
    with pytest.raises(UserError, match=rf"^y {numbers}; use y\.astype\(float\)$"):
        to_targets(y)
    with pytest.raises(UserError, match=rf"^x {numbers}; use x\.astype\(float\)$"):
        to_features(y)
    with pytest.raises(UserError, match=r"^x has dtype <U1; it needs real numbers \(integer, float or bool\)$"):
        to_features(y.astype("U1"))


@pytest.mark.parametrize("name", ["x", "y"])
def test_a_file_with_objects_is_refused_with_the_fix(tmp_path: Path, name: str) -> None:
    path = str(tmp_path / "d.npz")
    arrays: dict[str, Any] = {"x": np.ones((3, 2)), "y": np.arange(3)}
    np.savez(path, **{**arrays, name: arrays[name].astype(object)})
    fix = {"x": "x.astype(float)", "y": "y.astype(str) or y.astype(float)"}[name]
    with pytest.raises(UserError) as caught:
        load_data(path)
    assert str(caught.value) == (
        f"{path}: {name} is an array of Python objects, and loading it could run code; save {fix} instead"
    )


def test_the_number_of_classes_is_the_largest_label_plus_one(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.ones((3, 2)), y=[0, 4, 1])
    assert load_data(str(tmp_path / "d.npz")).classes == 5


def test_digits() -> None:
    digits = load_data(None)
    assert digits.x.shape == (1797, 64)
    assert digits.classes == 10
    assert digits.y.bincount().min() > 170
    assert digits.remarks() == []


@pytest.mark.parametrize(
    ("y", "rows", "shape"),
    [
        (np.array([0.5, 2]), [[0.5], [2.0]], ()),
        (np.array([[1], [3]]), [[1], [3]], (1,)),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]], (2,)),
        (np.array([True, False]), [[True], [False]], ()),
    ],
    ids=["(N,)", "(N, 1)", "(N, k)", "bool"],
)
def test_targets_of_a_regression(tmp_path: Path, y: np.ndarray, rows: list[Any], shape: tuple[int, ...]) -> None:
    np.savez(tmp_path / "d.npz", x=np.ones((2, 3)), y=y)
    data = load_data(str(tmp_path / "d.npz"), "regression")
    assert data.y.tolist() == rows
    assert data.shape == shape
    assert data.outputs == len(rows[0])


@pytest.mark.parametrize(
    ("y", "sentence"),
    [
        (
            np.ones((2, 2, 2)),
            r"y has the shape \(2, 2, 2\); it needs one number per row, \(N,\), or k numbers per row, \(N, k\)",
        ),
        (np.array(1.0), r"y has the shape \(\); it needs one number per row"),
        (np.ones((2, 0)), r"y has the shape \(2, 0\); it needs one number per row"),
        (
            np.array(["a", "b"]),
            "y has dtype <U1; it needs real .*; use --task classification for class names",
        ),
        (np.array([1j, 2]), "y has dtype complex128; it needs real numbers"),
        (np.array([1, np.nan]), "y has 1 value that is NaN, infinite or beyond float32, the first in row 1"),
        (np.array([]), "x has 2 rows and y has 0 targets"),
    ],
    ids=["3-D", "a number", "no column", "text", "complex", "NaN", "empty"],
)
def test_bad_targets_are_refused(tmp_path: Path, y: np.ndarray, sentence: str) -> None:
    path = str(tmp_path / "d.npz")
    np.savez(path, x=np.ones((2, 3)), y=y)
    with pytest.raises(UserError, match=f"^{path}: {sentence}"):
        load_data(path, "regression")


def remarks(y: Any, task: Any = "classification") -> list[str]:
    y = np.array(y)
    x = torch.zeros(len(y), 2)
    if task == "regression":
        return Data("d", x, to_targets(y), shape=y.shape[1:]).remarks()
    return Data("d", x, *to_classes(y)).remarks()


FIX = "use numpy.unique(y, return_inverse=True)[1] to number the classes, or --task regression to predict numbers"
EVEN = np.arange(60)


@pytest.mark.parametrize(
    ("y", "line"),
    [
        (EVEN % 3 * 50, f"98 of 101 classes never occur in y and y has 101 classes in 60 rows, ROWS; {FIX}"),
        (EVEN % 3 + 1, f"1 of 4 classes never occurs in y; {FIX}"),
        (EVEN, f"y has 60 classes in 60 rows, ROWS; {FIX}"),
        (EVEN % 31, f"y has 31 classes in 60 rows, ROWS; {FIX}"),
        (1960 + EVEN, f"1960 of 2020 classes never occur in y and y has 2020 classes in 60 rows, ROWS; {FIX}"),
        (EVEN * 0, "y has only one class, 0, so there is nothing to learn"),
        (EVEN * 0 + 7, "y has only one class, 7, so there is nothing to learn"),
        (np.array(["elm"] * 9), "y has only one class, elm, so there is nothing to learn"),
        (np.array(list("abc")), "y has 3 classes in 3 rows, ROWS; make sure that y has class names"),
    ],
    ids=["gaps", "from 1", "every row", "half", "years", "one", "one, not 0", "one name", "names"],
)
def test_unlikely_classes_get_one_remark(y: np.ndarray, line: str) -> None:
    assert remarks(y) == [line.replace("ROWS", "fewer than two rows per class")]


@pytest.mark.parametrize("y", [EVEN % 2, EVEN % 30, np.array(["a", "b", "a", "b"])], ids=["two", "half", "names"])
def test_ordinary_classes_get_no_remark(y: np.ndarray) -> None:
    assert remarks(y) == []


def test_constant_targets_get_a_remark() -> None:
    assert remarks([1.0, 2.0], "regression") == []
    assert remarks([2.5, 2.5], "regression") == [
        "y has only one value (column 0, counted from 0), so there is nothing to learn"
    ]
    assert len(remarks([[1, 2, 3], [1, 5, 3]], "regression")) == 1


@pytest.mark.parametrize(
    "y",
    [EVEN / 7, EVEN * 10_000, -EVEN, EVEN % 2 * 2 - 1, EVEN % 2 * 2.0 - 1, EVEN % 3 / 2, np.eye(3)],
    ids=["real numbers", "large integers", "negative", "-1 and 1", "-1.0 and 1.0", "real classes", "one-hot"],
)
def test_errors_for_labels_show_the_fix(y: np.ndarray) -> None:
    with pytest.raises(UserError, match="--task regression to predict numbers"):
        to_labels(y)
    with pytest.raises(
        UserError, match=r"numpy\.(unique\(y, return_inverse=True\)\[1\] to number the|argmax\(y, axis=1\))"
    ):
        to_labels(y)


@pytest.mark.parametrize(
    ("y", "sentence"),
    [
        (
            [0, 0.5, 1],
            "y has 1 label that is not a whole number, the first in row 1 (counted from 0): 0.5; labels need",
        ),
        (
            [0.25, 0.5, 1],
            "y has 2 labels that are not whole numbers, the first in row 0 (counted from 0): 0.25; labels",
        ),
        (
            [1, -1, 1],
            "y has 1 label outside 0 ... 65535, the first in row 1 (counted from 0): -1; labels need to be 0, ",
        ),
        (
            [-1, -1, 1],
            "y has 2 labels outside 0 ... 65535, the first in row 0 (counted from 0): -1; labels need to be ",
        ),
    ],
    ids=["one", "two", "one outside", "two outside"],
)
def test_labels_are_counted_in_the_singular_and_the_plural(y: list[float], sentence: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}.*{re.escape(FIX)}"):
        to_labels(np.array(y))
    numbered = np.unique(y, return_inverse=True)[1]
    assert to_labels(numbered).tolist() == numbered.tolist()


def description(x: np.ndarray, y: Any = (0, 1, 1)) -> dict[str, Any]:
    return Data("d", to_features(x), *to_classes(np.array(y))).description


def test_the_digest_depends_on_every_value_and_no_dtype() -> None:
    x = np.array([[1, 2], [3, 4], [5, 6]])
    same = [description(x.astype(dtype)) for dtype in ("i8", "u2", "f4", "f8")]
    assert same == [same[0]] * 4
    others = [description(x + 1e-12), description(x, (0, 1, 0)), description(x, ("a", "b", "b"))]
    assert len({other["sha256"] for other in [*same, *others[:2]]}) == 3
    assert others[2] != same[0]
    assert description(x, ("a", "b", "b")) != description(x, ("a", "c", "c"))
    large = x + 2**60
    assert description(large) != description(large + 1)  # float64 cannot distinguish these


def test_features_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "d.npz")
    np.savez(path, x=np.arange(12).reshape(2, 2, 3))
    x, name = load_features(path)
    assert (x.tolist(), name) == ([[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]], "x")
    np.savez(path, y=np.ones(3))
    with pytest.raises(UserError, match=r"has no array x; it has y, but needs x \(one example per row\), or x_test$"):
        load_features(path)
    np.savez(path, x_train=np.ones((3, 2)), x_test=np.zeros((1, 2)))
    x, name = load_features(path)
    assert (x.tolist(), name) == ([[0, 0]], "x_test")


KERAS = {
    "x_train": np.arange(12).reshape(6, 2),
    "y_train": np.array([0, 1, 2, 0, 1, 2]),
    "x_test": np.arange(4).reshape(2, 2) + 0.5,
    "y_test": np.array([3.0, 0.0]),
}


def load(path: Path, task: Any = "classification", **arrays: Any) -> Data:
    np.savez(path / "d.npz", **arrays)
    return load_data(str(path / "d.npz"), task)


def test_the_test_part_of_a_keras_style_file_is_for_validation(tmp_path: Path) -> None:
    data = load(tmp_path, **KERAS)
    assert data.x.tolist() == [*KERAS["x_train"].tolist(), *KERAS["x_test"].tolist()]
    assert data.y.tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    assert data.classes == 4
    training, validation = data.split(0.5, seed=0)
    assert (training.tolist(), validation.tolist()) == ([0, 1, 2, 3, 4, 5], [6, 7])


@pytest.mark.parametrize("left_out", [("x_test", "y_test"), ("y_test",)], ids=["no test part", "no labels"])
def test_without_a_test_part_the_rows_for_validation_are_drawn(tmp_path: Path, left_out: tuple[str, ...]) -> None:
    data = load(tmp_path, **{name: array for name, array in KERAS.items() if name not in left_out})
    assert data.x.tolist() == KERAS["x_train"].tolist()
    assert data.validation_rows == 0
    assert [part.tolist() for part in data.split(0.5, 3)] == [part.tolist() for part in split(6, 0.5, 3)]


def test_x_and_y_take_precedence_over_the_parts(tmp_path: Path) -> None:
    """A file that a checkpoint was trained on still counts as the same data."""
    alone = load(tmp_path, x=np.ones((3, 2)), y=np.arange(3))
    data = load(tmp_path, x=np.ones((3, 2)), y=np.arange(3), **KERAS)
    assert {**data.description} == {**alone.description}
    assert "validation_rows" not in data.description


def test_text_and_numbers_of_both_parts(tmp_path: Path) -> None:
    names = {"y_train": np.array(["elm", "oak"] * 3), "y_test": np.array(["birch", "oak"])}
    assert load(tmp_path, **{**KERAS, **names}).names == ("birch", "elm", "oak")
    numbers = {"y_train": np.arange(12.0).reshape(6, 2), "y_test": np.zeros((2, 2), np.int64)}
    assert load(tmp_path, "regression", **{**KERAS, **numbers}).y.shape == (8, 2)


def test_the_same_rows_in_other_parts_are_other_data(tmp_path: Path) -> None:
    parts = load(tmp_path, **KERAS)
    x, y = (np.concatenate([KERAS[f"{name}_train"], KERAS[f"{name}_test"]]) for name in "xy")
    whole = load(tmp_path, x=x, y=y)
    assert parts.description == {**whole.description, "validation_rows": 2}


KERAS_MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "features": (
        {"x_test": np.ones((2, 3))},
        "x_train has dtype int64 and shape (6, 2), but x_test has dtype float64 and shape (2, 3); the",
    ),
    "kinds": (
        {"y_test": np.array(["a", "b"])},
        "y_train has dtype int64 and shape (6,), but y_test has dtype <U1 and shape (2,); the rows",
    ),
    "a number": (
        {"x_test": 3.0},
        "x_train has dtype int64 and shape (6, 2), but x_test has dtype float64 and",
    ),
    "lengths": (
        {"y_test": np.zeros(3)},
        "x_test has 2 rows and y_test has 3 targets; it needs one target per row",
    ),
    "one label": (
        {"y_test": np.zeros(1)},
        "x_test has 2 rows and y_test has 1 target; it needs one target per row",
    ),
    "training": (
        {"y_train": np.zeros(5, int)},
        "x_train has 6 rows and y_train has 5 targets; it needs one target",
    ),
    "empty": (
        {"x_test": np.ones((0, 2)), "y_test": np.zeros(0)},
        "x_test has no rows; training and validation need at least one",
    ),
    "NaN": (
        {"x_test": [[1, np.nan], [1, 1]]},
        "x has 1 value that is NaN, infinite or beyond float32, the first in row 6",
    ),
    "label": (
        {"y_test": [0, -1]},
        "y has 1 label outside 0 ... 65535, the first in row 7 (counted from 0): -1; labels",
    ),
}


@pytest.mark.parametrize("name", KERAS_MISTAKES)
def test_a_mistake_in_a_part_names_it(tmp_path: Path, name: str) -> None:
    arrays, sentence = KERAS_MISTAKES[name]
    prefix = f"{tmp_path / 'd.npz'} (x is x_train, then x_test; y is y_train, then y_test): "
    with pytest.raises(UserError, match=f"^{re.escape(prefix + sentence)}"):
        load(tmp_path, **{**KERAS, **arrays})


@pytest.mark.parametrize("name", ["x_test", "y_train"])
def test_a_part_of_objects_is_refused_with_the_fix(tmp_path: Path, name: str) -> None:
    fix = "y_train.astype(str) or y_train.astype(float)" if name == "y_train" else "x_test.astype(float)"
    with pytest.raises(UserError, match=f"{name} is an array of Python objects.* save {re.escape(fix)} instead$"):
        load(tmp_path, **{**KERAS, name: KERAS[name].astype(object)})


def test_arrays_that_are_missing_are_named(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    needed = "x (one example per row) and y (one target per row), or x_train and y_train"
    with pytest.raises(UserError, match=f"^{path} has no array y; it has x, but needs {re.escape(needed)}$"):
        load(tmp_path, x=np.ones((3, 2)))
    needed = "x_train (one example per row) and y_train (one target per row)"
    present = "x_train, x_test"
    with pytest.raises(
        UserError, match=f"^{path} has no array y_train; it has {present}, but needs {re.escape(needed)}$"
    ):
        load(tmp_path, x_train=KERAS["x_train"], x_test=KERAS["x_test"])


@pytest.mark.parametrize(("rows", "fraction", "count"), [(1797, 0.2, 359), (10, 0.25, 2), (2, 0.01, 1), (2, 0.99, 1)])
def test_the_split_is_seeded_and_complete(rows: int, fraction: float, count: int) -> None:
    training_rows, validation_rows = split(rows, fraction, seed=5)
    assert len(validation_rows) == count
    assert sorted(training_rows.tolist() + validation_rows.tolist()) == list(range(rows))
    assert torch.equal(training_rows, split(rows, fraction, seed=5)[0])


def test_another_seed_gives_another_split() -> None:
    assert not torch.equal(split(100, 0.2, 0)[0], split(100, 0.2, 1)[0])


@pytest.mark.parametrize(
    ("training", "test"),
    [
        (np.uint64([2**60 + 1, 2**60 + 2]), np.int64([2**60 + 3])),
        (np.int64([2**60 + 1, 2]), np.uint64([2**64 - 1])),
        (np.uint64([2**53 + 1, 0]), np.int8([-5])),
        (np.uint64([2**64 - 1, 0]), np.array([True])),
    ],
    ids=str,
)
def test_signed_and_unsigned_rows_keep_every_bit(tmp_path: Path, training: np.ndarray, test: np.ndarray) -> None:
    np.savez(tmp_path / "d.npz", x_train=training, y_train=[0, 1], x_test=test, y_test=[1])
    assert load_data(str(tmp_path / "d.npz")).x.flatten().tolist() == [*training.tolist(), *test.tolist()]


def test_rows_that_no_integer_dtype_holds_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x_train=np.uint64([2**63, 0]), y_train=[0, 1], x_test=np.int64([-1]), y_test=[1])
    with pytest.raises(UserError) as caught:
        load_data(str(tmp_path / "d.npz"))
    assert str(caught.value).endswith(
        ": x_train, then x_test have integers from -1 to 9223372036854775808, which no 64-bit dtype holds; "
        "use astype(float) for all"
    )
