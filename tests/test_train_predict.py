"""`mlp-fused predict` predicts from the unscaled features of a file, with the accuracy that training reported."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mlp_fused
from mlp_fused.errors import UserError
from mlp_fused.train import predict as predict_module
from mlp_fused.train.config import Config
from mlp_fused.train.data import split
from mlp_fused.train.loop import Result, train
from mlp_fused.train.predict import Predictions, load_model, predict

SMALL = Config(data="data.npz", checkpoint="run.pt", hidden=(16,), epochs=12, batch_size=16, lr=0.02)
NAMES = np.array(["elm", "oak", "Öl, roh"])


@pytest.fixture
def arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """data.npz in the current folder: 90 rows of 2 x 2 features near 1.7e9, 3 classes, and values."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    y = random.integers(0, 3, 90)
    x = random.normal(size=(90, 2, 2)) + 2 * y[:, None, None]
    arrays = {"x": x + 1.7e9, "y": y, "value": 1e6 + 30 * x.sum(axis=(1, 2)), "two": x[:, 0] * (1, 1000)}
    np.savez("data.npz", **arrays)
    return arrays


def trained(y: np.ndarray, arrays: dict[str, np.ndarray], **changes: Any) -> Result:
    np.savez("data.npz", x=arrays["x"], y=y)
    return train(dataclasses.replace(SMALL, **changes), report=lambda text: None)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlp_fused", "predict", *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(mlp_fused.__file__).parents[1])},
        capture_output=True,
        text=True,
    )


def read_csv(path: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(Path(path).read_text(encoding="utf-8"))))


def validation() -> np.ndarray:
    return split(90, 0.2, 0)[1].numpy()


def test_a_new_process_predicts_with_the_reported_accuracy(arrays: dict[str, np.ndarray]) -> None:
    result = trained(arrays["y"], arrays)
    assert result.accuracy > 0.8
    np.savez("raw.npz", x=arrays["x"])
    completed = command("--checkpoint", "run.pt", "--data", "raw.npz", "--out", "out.npz")
    assert (completed.returncode, completed.stderr) == (0, "")
    assert completed.stdout == "raw.npz: 90 rows; wrote labels, probabilities, classes to out.npz\n"
    out = np.load("out.npz")
    assert (out["labels"] == arrays["y"])[validation()].mean() == result.accuracy
    assert out["labels"].dtype == np.int64
    assert out["classes"].tolist() == [0, 1, 2]
    assert out["probabilities"].shape == (90, 3)
    assert out["probabilities"].sum(axis=1) == pytest.approx(1)
    assert (out["probabilities"].argmax(axis=1) == out["labels"]).all()
    assert sorted(path.name for path in Path().iterdir()) == ["data.npz", "out.npz", "raw.npz", "run.pt"]


def test_classes_by_name_are_predicted_by_name(arrays: dict[str, np.ndarray]) -> None:
    result = trained(NAMES[arrays["y"]], arrays)
    predict_module.run(predict_module.Config("run.pt", "data.npz", "out.csv"), report=lambda text: None)
    header, *rows = read_csv("out.csv")
    assert header == ["label", *NAMES]
    labels = np.array([row[0] for row in rows])
    assert (labels == NAMES[arrays["y"]])[validation()].mean() == result.accuracy
    predictions = predict("run.pt", arrays["x"])
    assert predictions.labels.tolist() == labels.tolist()
    assert predictions.classes.tolist() == NAMES.tolist()
    assert np.array([row[1:] for row in rows], np.float32).tolist() == predictions.probabilities.tolist()


def test_other_class_names_refuse_to_resume(arrays: dict[str, np.ndarray]) -> None:
    trained(NAMES[arrays["y"]], arrays, epochs=1)
    with pytest.raises(UserError, match="90 rows, 4 features, 3 classes, but needs .* 3 classes with other values$"):
        trained(np.array(list("abc"))[arrays["y"]], arrays, resume=True)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_predict_uses_the_dtype_of_training(arrays: dict[str, np.ndarray], dtype: Any) -> None:
    result = trained(arrays["y"], arrays, dtype=dtype, epochs=3)
    predictions = predict("run.pt", arrays["x"])
    assert (predictions.labels == arrays["y"])[validation()].mean() == result.accuracy


def test_fp16_training_is_predicted_in_fp32_without_a_gpu(arrays: dict[str, np.ndarray]) -> None:
    trained(arrays["y"], arrays, epochs=1)
    expected = predict("run.pt", arrays["x"])
    saved = torch.load("run.pt", weights_only=True)
    saved["config"]["dtype"] = "fp16"
    torch.save(saved, "run.pt")
    assert predict("run.pt", arrays["x"]).probabilities.tolist() == expected.probabilities.tolist()


@pytest.mark.parametrize("shape", [(90,), (90, 1)], ids=str)
def test_a_regressions_values_have_the_targets_units_and_shape(
    arrays: dict[str, np.ndarray], shape: tuple[int, ...]
) -> None:
    y = arrays["value"].reshape(shape)
    result = trained(y, arrays, task="regression")
    assert result.r2 > 0.9
    np.savez("raw.npz", x=arrays["x"])
    completed = command("--checkpoint", "run.pt", "--data", "raw.npz", "--out", "out.npz")
    assert (completed.returncode, completed.stderr, completed.stdout) == (
        0,
        "",
        "raw.npz: 90 rows; wrote values to out.npz\n",
    )
    values = np.load("out.npz")["values"]
    assert (values.shape, values.dtype) == (shape, np.float64)
    errors = (values - y)[validation()]
    assert np.sqrt((errors**2).mean()) == pytest.approx(result.history[-1].rmse[0], rel=1e-4)
    predict_module.run(predict_module.Config("run.pt", "raw.npz", "out.csv"), report=lambda text: None)
    header, *rows = read_csv("out.csv")
    assert header == (["value"] if len(shape) == 1 else ["value 0"])
    assert np.array(rows, float).ravel().tolist() == values.ravel().tolist()


def test_several_targets(arrays: dict[str, np.ndarray]) -> None:
    trained(arrays["two"], arrays, task="regression")
    predict_module.run(predict_module.Config("run.pt", "data.npz", "out.csv"), report=lambda text: None)
    header, *rows = read_csv("out.csv")
    assert header == ["value 0", "value 1"]
    errors = np.array(rows, float) - arrays["two"]
    assert (errors.std(axis=0) < 0.2 * arrays["two"].std(axis=0)).all()


def test_the_loaded_model_is_a_module(arrays: dict[str, np.ndarray]) -> None:
    trained(arrays["y"], arrays)
    model = load_model("run.pt")
    labels = model(torch.from_numpy(arrays["x"]).flatten(1)).argmax(dim=1)
    assert labels.tolist() == predict("run.pt", arrays["x"]).labels.tolist()
    assert predict("run.pt", torch.from_numpy(arrays["x"])).labels.tolist() == labels.tolist()


def test_many_rows_are_predicted_in_parts(arrays: dict[str, np.ndarray]) -> None:
    trained(arrays["y"], arrays, epochs=1)
    whole = predict("run.pt", arrays["x"])
    parts = predict("run.pt", arrays["x"], batch_size=7)
    assert parts.labels.tolist() == whole.labels.tolist()
    assert parts.probabilities == pytest.approx(whole.probabilities, abs=1e-6)


MISTAKES: dict[str, tuple[dict[str, str], str]] = {
    "suffix": ({"out": "out.txt"}, "--out is out.txt; it needs to end in .npz or .csv"),
    "the data": (
        {"out": "data.npz"},
        "--out is data.npz, which is also --data and would be replaced; give",
    ),
    "the checkpoint": ({"checkpoint": "x.npz", "out": "x.npz"}, "--out is x.npz, which is also --checkpoint and"),
    "no folder": ({"out": "none/out.npz"}, "cannot write into .*none, the folder of --out: No such file"),
    "a folder": ({"out": "folder.npz"}, "--out .*folder.npz is a folder; it needs to be a file"),
    "no checkpoint": ({"checkpoint": "none.pt"}, "there is no checkpoint none.pt"),
    "data for a checkpoint": ({"checkpoint": "wide.npz"}, "wide.npz cannot be read as a checkpoint"),
    "text for a checkpoint": (
        {"checkpoint": "text.pt"},
        "text.pt cannot be read as a checkpoint: it is no file of torch.save$",
    ),
    "no data": ({"data": "none.npz"}, "there is no file none.npz"),
    "other features": ({"data": "wide.npz"}, "x has 5 features per row; the network of run.pt needs 4"),
    "NaN": ({"data": "nan.npz"}, "nan.npz: x has 1 value that is NaN, infinite or beyond float32, the first in row 1"),
    "no x": ({"data": "y.npz"}, r"y.npz has no array x; it has y, but needs x \(one example per row\)"),
    "device": ({"device": "gpu"}, "--device gpu cannot be used here"),
}


@pytest.mark.parametrize(("changes", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_changes_no_file(arrays: dict[str, np.ndarray], changes: dict[str, str], sentence: str) -> None:
    trained(arrays["y"], arrays, epochs=1)
    Path("folder.npz").mkdir()
    np.savez("wide.npz", x=np.ones((3, 5)))
    np.savez("nan.npz", x=[[1, 1, 1, 1], [1, 1, 1, np.nan]])
    np.savez("y.npz", y=np.ones(3))
    Path("text.pt").write_text("hello")
    Path("out.npz").write_bytes(b"before")
    before = {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    options = {"checkpoint": "run.pt", "data": "data.npz", "out": "out.npz", **changes}
    with pytest.raises(UserError, match=f"^{sentence}"):
        predict_module.run(predict_module.Config(**options), report=lambda text: None)
    assert {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before


@pytest.mark.parametrize("out", ["out.npz", "out.csv"])
def test_a_failed_write_leaves_the_old_file(
    arrays: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    trained(arrays["y"], arrays, epochs=1)
    Path(out).write_bytes(b"before")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            UserError, match=f"^cannot write the predictions to {out}: .*No space left on device; the old file"
        ):
            predict_module.run(predict_module.Config("run.pt", "data.npz", out), report=lambda text: None)
    assert Path(out).read_bytes() == b"before"
    assert sorted(path.name for path in Path().iterdir()) == sorted(["data.npz", out, "run.pt"])
    predict_module.run(predict_module.Config("run.pt", "data.npz", out), report=lambda text: None)
    assert Path(out).read_bytes() != b"before"


def test_only_available_results_are_written() -> None:
    assert list(Predictions(values=np.ones(3)).arrays) == ["values"]
    assert list(Predictions(np.ones(3), np.ones((3, 2)), np.arange(2)).arrays) == ["labels", "probabilities", "classes"]


def test_tensors_are_predicted_as_arrays(arrays: dict[str, np.ndarray]) -> None:
    trained(arrays["y"], arrays, epochs=1)
    expected = predict("run.pt", arrays["x"]).probabilities
    assert predict("run.pt", torch.from_numpy(arrays["x"]).requires_grad_()).probabilities.tolist() == expected.tolist()
    narrow = torch.from_numpy(arrays["x"]).bfloat16()
    expected = predict("run.pt", narrow.float().numpy()).probabilities
    assert predict("run.pt", narrow).probabilities.tolist() == expected.tolist()


REFUSED_TENSORS = {
    "NaN": (torch.full((2, 4), torch.nan), "x has 8 values that are NaN, infinite or beyond float32, the first in row"),
    "complex": (torch.ones(2, 4, dtype=torch.complex64).conj(), "x has dtype complex64; it needs real numbers"),
    "empty": (torch.ones(0, 4), r"x has the shape \(0, 4\), and is empty; it needs rows of data"),
    "one number": (torch.tensor(1.0), r"x has the shape \(\), a single number; it needs rows of data"),
}


@pytest.mark.parametrize("name", REFUSED_TENSORS)
def test_a_wrong_tensor_gives_one_sentence(arrays: dict[str, np.ndarray], name: str) -> None:
    trained(arrays["y"], arrays, epochs=1)
    x, sentence = REFUSED_TENSORS[name]
    with pytest.raises(UserError, match=f"^{sentence}"):
        predict("run.pt", x)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_outputs_that_are_not_finite_give_one_sentence(arrays: dict[str, np.ndarray], task: Any) -> None:
    arrays["x"] = (arrays["x"] - 1.7e9) / 1000  # a small range, so that 3e38 is infinite in float32 after the scaling
    trained(arrays["y"], arrays, epochs=1, task=task)
    x = arrays["x"].copy()
    x[3] = x[5] = 3e38
    with pytest.raises(UserError) as caught:
        predict("run.pt", x, batch_size=2)
    assert str(caught.value) == (
        "the network of run.pt gives NaN or infinite outputs for 2 rows, the first of them row 3 (counted from 0); "
        "their features are too far from those of the training; fix or remove these rows"
    )


def test_a_network_that_diverged_gives_one_sentence(arrays: dict[str, np.ndarray]) -> None:
    trained(arrays["y"], arrays, epochs=1)
    saved = torch.load("run.pt", weights_only=True)
    saved["model"]["network.0.bias"].fill_(torch.nan)
    torch.save(saved, "run.pt")
    with pytest.raises(UserError) as caught:
        predict("run.pt", arrays["x"])
    assert str(caught.value) == (
        "the network of run.pt has parameters that are NaN or infinite; train it again, with a smaller --lr if its "
        "loss grew"
    )


def test_a_class_name_beyond_utf_8_needs_an_npz(arrays: dict[str, np.ndarray]) -> None:
    names = np.array(["elm", "oak", "ash\udcff"])
    trained(names[arrays["y"]], arrays, epochs=1)
    with pytest.raises(UserError) as caught:
        predict_module.run(predict_module.Config("run.pt", "data.npz", "out.csv"), report=lambda text: None)
    assert str(caught.value) == (
        r"a class name has '\udcff', which UTF-8 cannot encode; use --out FILE.npz instead of out.csv"
    )
    assert not Path("out.csv").exists()
    predict_module.run(predict_module.Config("run.pt", "data.npz", "out.npz"), report=lambda text: None)
    assert sorted(np.load("out.npz")["classes"].tolist()) == sorted(names.tolist())
