"""`mlp-fused predict`: its flags, its help and its errors."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import TINY, call

from mlp_fused.train import predict


def test_every_flag_of_predict_reaches_its_configuration() -> None:
    seen: list[predict.Config] = []

    def run(config: Any, report: object) -> None:
        seen.append(config)

    needed = ["--checkpoint", "c.pt", "--data", "d.npz", "--out", "o.csv"]
    assert call("predict", *needed, run=run) == 0
    assert call("predict", *needed, "--device", "cpu", run=run) == 0
    assert seen == [predict.Config("c.pt", "d.npz", "o.csv"), predict.Config("c.pt", "d.npz", "o.csv", "cpu")]


def test_help_of_predict_states_every_flag_and_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "10000")
    assert call("predict", "--help") == 0
    entries = {entry.split()[0]: entry for entry in re.split(r"\n  (?=--)", capsys.readouterr().out)}
    for field in dataclasses.fields(predict.Config):
        assert "(required)" in entries["--" + field.name] or field.name == "device"
    assert "or auto for a GPU if there is one (default: auto)" in entries["--device"]
    assert "unscaled features" in entries["--data"]


def test_train_then_predict(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "--data", "data.npz", *TINY, "--checkpoint", "run.pt") == 0
    capsys.readouterr()
    assert call("predict", "--checkpoint", "run.pt", "--data", "data.npz", "--out", "out.csv") == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("data.npz: 50 rows; wrote labels, probabilities, classes to out.csv\n", "")
    assert len(Path("out.csv").read_text().splitlines()) == 51


def test_a_keras_style_file_is_trained_resumed_and_predicted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = np.load("data.npz")
    x, y = data["x"], data["y"]
    np.savez("keras.npz", x_train=x[:40], y_train=y[:40, None], x_test=x[40:], y_test=y[40:, None])
    command = ("train", "--data", "keras.npz", *TINY, "--checkpoint", "run.pt")
    assert call(*command) == 0
    out, _ = capsys.readouterr()
    assert "keras.npz: 3 features, 2 classes, 40 training rows, 10 validation rows (from the file)\n" in out
    reported = float(re.findall(r"validation accuracy: ([\d.]+)", out)[-1])
    assert call(*command, "--resume", "--epochs", "3") == 0
    assert call(*command) == 0
    capsys.readouterr()
    assert call("predict", "--checkpoint", "run.pt", "--data", "keras.npz", "--out", "out.npz") == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("keras.npz: 10 rows of x_test; wrote labels, probabilities, classes to out.npz\n", "")
    assert (np.load("out.npz")["labels"] == y[40:]).mean() == pytest.approx(reported, abs=1e-4)
    np.savez("data.npz", x=x, y=y)
    assert call("train", "--data", "data.npz", *TINY, "--checkpoint", "run.pt", "--resume", "--epochs", "3") == 2
    assert "run.pt is from another run: --data has 50 rows" in capsys.readouterr().err


def test_a_single_row_is_predicted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "--data", "data.npz", *TINY, "--checkpoint", "run.pt") == 0
    np.savez("one.npz", x=np.load("data.npz")["x"][:1])
    capsys.readouterr()
    assert call("predict", "--checkpoint", "run.pt", "--data", "one.npz", "--out", "out.npz") == 0
    assert capsys.readouterr().out == "one.npz: 1 row; wrote labels, probabilities, classes to out.npz\n"


PREDICT_MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing": ((), "the following arguments are required: --checkpoint, --data, --out"),
    "no checkpoint": (
        ("--checkpoint", "none.pt", "--data", "data.npz", "--out", "o.npz"),
        "there is no checkpoint none",
    ),
    "suffix": (("--checkpoint", "a", "--data", "data.npz", "--out", "o.txt"), "--out is o.txt; it needs to end in"),
    "its data": (
        ("--checkpoint", "a", "--data", "data.npz", "--out", "data.npz"),
        "--out is data.npz, which is also --data",
    ),
}


@pytest.mark.parametrize(("flags", "sentence"), PREDICT_MISTAKES.values(), ids=PREDICT_MISTAKES)
def test_a_mistake_in_predicting_gives_one_sentence_and_exit_status_2(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], sentence: str
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert call("predict", *flags) == 2
    out, err = capsys.readouterr()
    assert re.search(f"^mlp-fused( predict)?: .*{re.escape(sentence)}", err)
    assert err.count("\n") == 1
    assert out == ""
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
