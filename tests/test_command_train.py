"""`mlp-fused`: what it prints, how it answers mistakes and Ctrl-C."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mlp_fused
from mlp_fused import ACTIVATIONS, environment, files
from mlp_fused.__main__ import main
from mlp_fused.checkpoint import load_checkpoint
from mlp_fused.engine import paths, tables
from mlp_fused.errors import UserError
from mlp_fused.train import data, distributed, loop, predict, timer
from mlp_fused.train.config import Config
from mlp_fused.transfer import measurement
from mlp_fused.transfer.config import Config as TransferConfig
from mlp_fused.tune.config import Config as TuneConfig

TINY = ["--hidden", "8", "--epochs", "2", "--batch-size", "16"]
COMMAND = [sys.executable, "-m", "mlp_fused"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with data.npz in it: 50 rows, 3 features, 2 classes."""
    monkeypatch.chdir(tmp_path)
    write(x=np.random.default_rng(0).normal(size=(50, 3)), y=np.arange(50) % 2)
    return tmp_path


def write(**arrays: Any) -> None:
    np.savez("data.npz", **arrays)


def call(*arguments: str, run: Callable[..., object] | None = None) -> int:
    """The exit status; `run` takes the place of the command's own function."""
    try:
        return main(arguments, run)
    except SystemExit as stop:  # argparse's own
        return -1 if stop.code is None else int(stop.code)


def test_training_prints_what_a_course_wants_to_see(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "--data", "data.npz", *TINY, "--checkpoint", "run.pt") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "data.npz: 3 features, 2 classes, 40 rows to train on, 10 to validate" in out
    assert "FusedMLP(\n  (0): Linear(in_features=3, out_features=8, bias=True)\n  (1): GELU" in out
    assert "50 parameters on cpu, the reference path (the input is on the CPU)" in out
    assert (
        len(re.findall(r"^epoch [12]/2  loss \d\.\d{4}  validation loss \d\.\d{4}  accuracy [01]\.\d{4}", out, re.M))
        == 2
    )
    shares = [
        float(line.split()[2]) for phase in timer.StepTimer.PHASES for line in re.findall(f"^{phase} .*", out, re.M)
    ]
    assert len(shares) == 5
    assert sum(shares) == pytest.approx(100, abs=0.3)
    accuracy = load_checkpoint("run.pt")["history"][-1]["accuracy"]
    share = r"\(class [01], the largest, is [01]\.\d{4} of the validation rows\)"
    assert re.search(rf"\nvalidation accuracy: {accuracy:.4f} {share}\ncheckpoint: run\.pt\n$", out)
    assert f"\n{loop.SCALED}\n" in out


def test_an_interrupted_command_is_resumed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = ["train", "--data", "data.npz", "--hidden", "8", "--dropout", "0.5", "--checkpoint"]
    assert call(*same, "whole.pt", "--epochs", "4") == 0
    assert call(*same, "parts.pt", "--epochs", "2") == 0
    assert call(*same, "parts.pt", "--epochs", "4", "--resume") == 0
    assert "carrying on from parts.pt, after epoch 2\nepoch 3/4" in capsys.readouterr().out
    whole, parts = load_checkpoint("whole.pt"), load_checkpoint("parts.pt")
    assert whole["history"] == parts["history"]
    for key, value in whole["model"].items():
        assert torch.equal(value, parts["model"][key])


def test_every_flag_reaches_the_configuration() -> None:
    seen: list[Config] = []

    def run(config: Any, report: object) -> None:
        seen.append(config)

    assert call("train", run=run) == 0
    told = Config(
        data="d.npz",
        task="regression",
        hidden=(3, 4),
        activation="tanh",
        dropout=0.25,
        backend="reference",
        optimizer="sgd",
        lr=0.125,
        epochs=7,
        batch_size=9,
        dtype="bf16",
        validation_fraction=0.5,
        seed=11,
        device="cpu",
        workers=1,
        checkpoint="c.pt",
        resume=True,
    )
    arguments = []
    for name, value in dataclasses.asdict(told).items():
        assert value != getattr(Config(), name), f"{name} is not told apart from its default"
        arguments.append("--" + name.replace("_", "-"))
        arguments += [] if value is True else map(str, value) if isinstance(value, tuple) else [str(value)]
    assert call("train", *arguments, run=run) == 0
    assert seen == [Config(), told]


def test_help_states_every_flag_and_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "10000")
    assert call("train", "--help") == 0
    entries = {entry.split()[0]: entry for entry in re.split(r"\n  (?=--)", capsys.readouterr().out)}
    for field in dataclasses.fields(Config):
        entry = entries["--" + field.name.replace("_", "-")]
        assert "default" in entry
        if isinstance(field.default, str | int | float) and not isinstance(field.default, bool):
            assert str(field.default) in entry.split("{")[0] + entry.split("}")[-1]  # in the words, not the choices
    assert "512 512" in entries["--hidden"]
    assert ", ".join(ACTIVATIONS) in entries["--activation"]
    assert "0.001 for adam, 0.05 for sgd" in entries["--lr"]
    usage = re.sub(r"\s+", " ", next(iter(entries.values())))
    assert "Features are scaled column by column in float64: minus the mean, divided by a quarter of the range" in usage
    assert "The model in a checkpoint does this itself" in usage


def broken_zip() -> None:
    content = bytearray(Path("data.npz").read_bytes())
    content[100:400] = bytes(300)
    Path("data.npz").write_bytes(content)


def of_another_network() -> None:
    assert call("train", "--data", "data.npz", *TINY, "--hidden", "16", "--checkpoint", "run.pt") == 0


def truncated_checkpoint() -> None:
    of_another_network()
    Path("run.pt").write_bytes(Path("run.pt").read_bytes()[:2000])


X, Y = np.ones((6, 3)), np.array([0, 1, 2, 0, 1, 2])
NAN = np.where(np.arange(18).reshape(6, 3) >= 10, np.nan, 1.0)
RUN = ("--checkpoint", "run.pt")

# What the folder holds besides (a function, or data.npz's arrays); the flags; the sentence, a regular expression.
MISTAKES: dict[str, tuple[Callable[[], object] | dict[str, Any], tuple[str, ...], str]] = {
    "no file": ({}, ("--data", "none.npz"), "there is no file none.npz"),
    "a folder": ({}, ("--data", "."), r"cannot read \.: Is a directory"),
    "text": (lambda: Path("data.npz").write_text("x,y\n1,2\n"), (), r"data.npz is not an npz file; numpy\.savez"),
    "an empty file": (lambda: Path("data.npz").write_bytes(b""), (), "data.npz is not an npz file"),
    "npy": (lambda: np.save("a.npy", X), ("--data", "a.npy"), "a.npy holds one array; it needs to be an npz file"),
    "a damaged file": (broken_zip, (), "cannot read array x of data.npz: .+"),
    "no y": (lambda: write(x=X, labels=Y), (), "data.npz has no array y; it has x, labels, and needs x .* and y"),
    "neither": (lambda: np.savez("data.npz", X), (), "data.npz has no array x and no array y; it has arr_0,"),
    "no arrays": (write, (), "data.npz has no array x and no array y; it has none,"),
    "objects": ({"y": np.array([{}] * 6)}, (), r"data.npz: y is an array of Python .*; save y\.astype\(str\)"),
    "complex": ({"x": X * 1j}, (), "data.npz: x is of dtype complex128; it needs to be real numbers"),
    "text in x": ({"x": np.array(["a"] * 6)}, (), "x is of dtype <U1; it needs to be real numbers"),
    "dates": ({"x": X.astype("M8[s]")}, (), r"x is of dtype datetime64\[s\]; it needs to be real"),
    "NaN": ({"x": NAN}, (), r"x has 8 values NaN, infinite or beyond float32, the first in row 3 \(counted from 0\)"),
    "infinity": ({"x": np.where(Y == 1, np.inf, 0)}, (), "x has 2 values NaN, infinite .* in row 1"),
    "beyond float32": ({"x": np.diag([1, 1, 1, 1, 1e300, 1])}, (), "x has 1 value NaN, .* beyond float32, .* row 4"),
    "no rows": ({"x": np.ones((0, 3)), "y": []}, (), r"x is of shape \(0, 3\), empty; it needs rows of data"),
    "no features": ({"x": np.ones((6, 0))}, (), r"x is of shape \(6, 0\), empty"),
    "a number": ({"x": 3.0}, (), r"x is of shape \(\), a single number"),
    "one row": ({"x": X[:1], "y": Y[:1]}, (), "there is one row; training and validation need one each"),
    "lengths": ({"y": Y[:4]}, (), "data.npz: x has 6 rows and y has 4 labels; there needs to be one label a row"),
    "no labels": ({"y": []}, (), "x has 6 rows and y has 0 labels"),
    "a label for all": ({"y": 1}, (), r"y is of shape \(\); it needs one label a row"),
    "one-hot": ({"y": np.eye(3)[Y]}, (), r"y is of shape \(6, 3\); .*numpy\.argmax"),
    "dates for labels": ({"y": Y.astype("M8[s]")}, (), r"y is of dtype datetime64\[s\]; .*numpy\.unique.*astype\(str"),
    "names for numbers": (
        {"y": np.array(list("abcabc"))},
        ("--task", "regression"),
        "y is of dtype <U1; .*real numbers",
    ),
    "task": ({}, ("--task", "ranking"), "argument --task: invalid choice: 'ranking'"),
    "halves": ({"y": Y / 2}, (), r"y has 2 labels that are not whole numbers, the first in row 1 \(.*\): 0\.5; labels"),
    "NaN in y": ({"y": np.where(Y == 2, np.nan, 0)}, (), "y has 2 labels that are not whole .* row 2 .*: nan"),
    "negative": (
        {"y": Y - 1},
        (),
        r"y has 2 labels outside 0 \.\.\. 65535, the first in row 0 .*: -1; labels need.*--task regression",
    ),
    "an id": ({"y": Y + 10**9}, (), r"y has 6 labels outside 0 \.\.\. 65535, .*: 1000000000"),
    "uint64": ({"y": np.full(6, 2**64 - 1, np.uint64)}, (), "y has 6 labels outside .*: 18446744073709551615"),
    "epochs": ({}, ("--epochs", "0"), "--epochs is 0; it needs to be 1 or more"),
    "batch size": ({}, ("--batch-size", "-4"), "--batch-size is -4; it needs to be 1 or more"),
    "workers": ({}, ("--workers", "-1"), "--workers is -1; it needs to be 0 or more"),
    "dropout": ({}, ("--dropout", "1.5"), "--dropout is 1.5; it needs to be a probability, from 0 to 1"),
    "dropout NaN": ({}, ("--dropout", "nan"), "--dropout is nan; it needs to be a probability"),
    "lr": ({}, ("--lr", "0"), "--lr is 0.0; it needs to be a finite number above 0"),
    "lr infinite": ({}, ("--lr", "inf"), "--lr is inf; it needs to be a finite number"),
    "width": ({}, ("--hidden", "8", "0"), "--hidden is 8 0; it needs to be widths of 1 or more"),
    "huge": ({}, ("--hidden", "1000000000000"), "--hidden 1000000000000 makes no network here: .*memory"),
    "fraction": ({}, ("--validation-fraction", "1"), "--validation-fraction is 1.0; it needs to be between 0 and 1"),
    "seed": ({}, ("--seed", "-1"), "--seed is -1; it needs to be from 0 to"),
    "no number": ({}, ("--epochs", "many"), "argument --epochs: invalid int value: 'many'"),
    "no such flag": ({}, ("--epoch", "3"), "unrecognized arguments: --epoch 3"),
    "activation": ({}, ("--activation", "rleu"), "--activation is 'rleu'; it needs to be one of: .*relu, "),
    "optimizer": ({}, ("--optimizer", "adamw"), "argument --optimizer: invalid choice: 'adamw'"),
    "dtype": ({}, ("--dtype", "fp8"), "argument --dtype: invalid choice: 'fp8'"),
    "backend": ({}, ("--backend", "cuda"), "argument --backend: invalid choice: 'cuda'"),
    "fp16": (
        {},
        ("--dtype", "fp16", "--device", "cpu"),
        "--dtype fp16 needs a GPU; on the CPU there are fp32 and bf16",
    ),
    "device": ({}, ("--device", "gpu"), "--device gpu cannot be used here: .+; cpu always can"),
    "meta": ({}, ("--device", "meta"), "--device meta cannot be used here: .+; cpu always can"),
    "nothing to resume": ({}, ("--resume",), "--resume needs --checkpoint FILE"),
    "no checkpoint": ({}, (*RUN, "--resume"), "there is no checkpoint run.pt"),
    "no folder": (
        {},
        ("--checkpoint", "no/run.pt"),
        "cannot write into .*no, the folder of --checkpoint: No such file",
    ),
    "a file for a folder": (
        {},
        ("--checkpoint", "data.npz/run.pt"),
        "cannot write into .*data.npz, .*: Not a directory",
    ),
    "a folder for a file": ({}, ("--checkpoint", "."), "--checkpoint .* is a folder; it needs to be a file"),
    "data for a checkpoint": (
        {},
        ("--checkpoint", "data.npz"),
        "data.npz .*checkpoint.*, so it will not be overwritten",
    ),
    "another network": (of_another_network, (*RUN, "--resume"), "run.pt is .* another run: --hidden is 8, it needs 16"),
    "cut short": (truncated_checkpoint, (*RUN, "--resume"), "run.pt cannot be read as a checkpoint: .+"),
    "a list": (lambda: torch.save([1], "run.pt"), (*RUN, "--resume"), "run.pt is not a checkpoint of mlp-fused train"),
    "a model alone": (
        lambda: torch.save({"0.weight": 1}, "run.pt"),
        (*RUN, "--resume"),
        "run.pt is not a checkpoint of",
    ),
    "pickled code": (
        lambda: torch.save(Config(), "run.pt"),
        (*RUN, "--resume"),
        "run.pt cannot be read as a checkpoint",
    ),
}


@pytest.mark.parametrize(("prepare", "flags", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_status_2(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    prepare: Callable[[], object] | dict[str, Any],
    flags: tuple[str, ...],
    sentence: str,
) -> None:
    if callable(prepare):
        prepare()
    elif prepare:
        write(**{"x": X, "y": Y, **prepare})
    capsys.readouterr()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    assert call("train", "--data", "data.npz", *TINY, *flags) == 2

    out, err = capsys.readouterr()
    assert re.search(f"^mlp-fused( train)?: .*{sentence}", err)
    assert err.count("\n") == 1
    assert "epoch" not in out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(("name", "choices"), [("optimizer", "adam, sgd"), ("dtype", "fp32, bf16, fp16")])
def test_mistakes_in_python_are_the_same_sentences(name: str, choices: str) -> None:
    with pytest.raises(UserError, match=f"^--{name} is x; it needs to be one of {choices}$"):
        Config(**{name: "x"})  # type: ignore[arg-type]


def test_cuda_without_a_gpu(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(*_: object, **__: object) -> None:
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch, "zeros", zeros)
    assert call("train", "--data", "data.npz", "--device", "cuda") == 2
    sentence = "--device cuda cannot be used here: Torch not compiled with CUDA enabled; cpu always can"
    assert capsys.readouterr().err == f"mlp-fused: {sentence}\n"


def test_kernels_that_cannot_run(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "INTERPRETER", False)
    assert call("train", "--data", "data.npz", "--backend", "triton") == 2
    out, err = capsys.readouterr()
    assert re.match(r"mlp-fused: the backend is triton, but the input is on the CPU.*TRITON_INTERPRET=1.*\n$", err)
    assert out == ""


def test_a_folder_that_may_not_be_written(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files, "open", refuse, raising=False)
    assert call("train", "--data", "data.npz", "--checkpoint", "run.pt") == 2
    out, err = capsys.readouterr()
    assert err == f"mlp-fused: cannot write into {folder}, the folder of --checkpoint: Permission denied\n"
    assert out == ""


def test_a_full_disk(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert call("train", "--data", "data.npz", *TINY, "--checkpoint", "run.pt") == 2
    assert re.match(r"mlp-fused: cannot write the checkpoint .*No space left on device.*\n$", capsys.readouterr().err)


def test_scikit_learn_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert call("train") == 2
    err = capsys.readouterr().err
    assert 'scikit-learn is not installed: pip install "mlp_fused[demo]", or give data of your own with --data' in err
    assert err.count("\n") == 1


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert call() == 2
    assert capsys.readouterr().err.startswith("mlp-fused: the following arguments are required: ")


@pytest.mark.parametrize("text", ["stopped; run.pt is the last checkpoint", ""])
def test_ctrl_c_is_one_line_and_exit_status_130(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(config: Config, report: object) -> None:
        raise KeyboardInterrupt(*[text] * bool(text))

    assert call("train", run=interrupted) == 130
    assert capsys.readouterr().err == f"mlp-fused: {text or 'stopped'}\n"


@pytest.mark.alone
def test_a_signal_to_every_process_leaves_the_last_checkpoint(folder: Path) -> None:
    """Ctrl-C, as a terminal sends it; workers must not add tracebacks of their own."""
    command = [
        *COMMAND,
        "train",
        "--data",
        "data.npz",
        "--hidden",
        "8",
        "--epochs",
        "1000000",
        "--checkpoint",
        "run.pt",
    ]
    environ = {**os.environ, "PYTHONPATH": str(Path(mlp_fused.__file__).parents[1])}
    with subprocess.Popen(
        [*command, "--workers", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
        start_new_session=True,
    ) as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("epoch "):
                break
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    epoch = load_checkpoint("run.pt")["epoch"]
    assert epoch >= 1
    assert err == (
        f"mlp-fused: stopped; run.pt is the last checkpoint, after epoch {epoch}: "
        "the same command with --resume carries on\n"
    )
    assert sorted(path.name for path in folder.iterdir()) == ["data.npz", "run.pt"]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(*arguments: str) -> subprocess.Popen[str]:
    """Two processes of the command that those arguments are, on the CPU."""
    environ = {
        **os.environ,
        "PYTHONPATH": str(Path(mlp_fused.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",  # torchrun warns where it has to set it
        "CUDA_VISIBLE_DEVICES": "",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environ}
    return subprocess.Popen([*TORCHRUN, *arguments], start_new_session=True, **pipes)  # type: ignore[call-overload]


def messages(err: str) -> list[str]:
    """Ours; torchrun reports that its processes failed besides."""
    return [line for line in err.splitlines() if line.startswith("mlp-fused") or "[rank" in line]


def course(text: str) -> list[str]:
    quality = r"(?:accuracy \S+|R² \S+  RMSE [^ ,]+)"
    return re.findall(rf"^epoch .* {quality}|^validation .*|^FusedMLP.*|.* rows to train on.*", text, re.M)


@pytest.mark.alone
def test_torchrun_trains_as_one_process_does(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["train", "--data", "data.npz", *TINY, "--checkpoint"]
    with torchrun("-m", "mlp_fused", *flags, "two.pt") as command:
        two, err = command.communicate(timeout=120)
    assert (command.returncode, err) == (0, "")
    assert call(*flags, "one.pt") == 0
    one = capsys.readouterr().out
    assert "50 parameters on cpu, in each of 2 processes, the reference path" in two

    assert len(course(one)) == 5
    assert course(two) == course(one)
    assert sorted(path.name for path in folder.iterdir()) == ["data.npz", "one.pt", "two.pt"]
    assert call(*flags, "two.pt", "--epochs", "3", "--resume") == 0
    assert load_checkpoint("two.pt")["epoch"] == 3
    assert load_checkpoint("two.pt")["model"].keys() == load_checkpoint("one.pt")["model"].keys()


@pytest.mark.alone
def test_torchrun_trains_a_regression_as_one_process_does(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.random.default_rng(0).normal(size=(50, 3))
    write(x=x, y=1000 + 30 * x.sum(axis=1))
    flags = ["train", "--data", "data.npz", "--task", "regression", *TINY, "--lr", "0.02", "--checkpoint"]
    with torchrun("-m", "mlp_fused", *flags, "two.pt") as command:
        two, err = command.communicate(timeout=120)
    assert (command.returncode, err) == (0, "")
    assert call(*flags, "one.pt") == 0
    one = capsys.readouterr().out
    assert len(course(one)) == 5
    assert course(two) == course(one)
    saved = [load_checkpoint(path) for path in ("one.pt", "two.pt")]
    for name, value in saved[0]["model"].items():
        assert torch.allclose(value, saved[1]["model"][name], atol=1e-5), name


@pytest.mark.alone
def test_ctrl_c_under_torchrun_leaves_the_last_checkpoint(folder: Path) -> None:
    flags = ["train", "--data", "data.npz", *TINY, "--checkpoint", "run.pt"]
    assert call(*flags) == 0
    with torchrun("-m", "mlp_fused", *flags, "--epochs", "1000000", "--resume") as command:
        assert command.stdout
        for line in command.stdout:
            if line.startswith("epoch "):
                break
        os.killpg(command.pid, signal.SIGINT)
        out, err = command.communicate(timeout=120)
    assert command.returncode != 0
    assert "Traceback" not in out
    epoch = load_checkpoint("run.pt")["epoch"]
    assert epoch >= 3
    carries_on = f"run.pt is the last checkpoint, after epoch {epoch}: the same command with --resume carries on"
    assert messages(err) == [f"mlp-fused: stopped; {carries_on}"]
    assert sorted(path.name for path in folder.iterdir()) == ["data.npz", "run.pt"]


FAILS_IN_ONE = """
import os, sys, torch
from mlp_fused.__main__ import main
from mlp_fused.errors import UserError
from mlp_fused.train import loop

evaluate, calls = loop.evaluate, []

def broken(*arguments):
    calls.append(1)
    if len(calls) == 2 and os.environ["RANK"] == "1":
        raise eval(os.environ["FAILURE"])
    return evaluate(*arguments)

loop.evaluate = broken
sys.exit(main())
"""


@pytest.mark.alone
@pytest.mark.parametrize(
    ("failure", "where"),
    [
        ("UserError('broken in one process')", ""),
        (
            "torch.OutOfMemoryError('broken in one process')",
            "\nstopped; run.pt is the last checkpoint, after epoch 1: the same command with --resume carries on\n",
        ),
    ],
    ids=["mistake", "out of memory"],
)
def test_a_failure_of_one_process_ends_all_with_one_message(
    failure: str, where: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILURE", failure)
    Path("fails.py").write_text(FAILS_IN_ONE)
    with torchrun("fails.py", "train", "--data", "data.npz", *TINY, "--checkpoint", "run.pt") as command:
        _, err = command.communicate(timeout=120)
    assert command.returncode != 0
    assert messages(err) == ["mlp-fused: broken in one process"]
    assert where in err
    assert load_checkpoint("run.pt")["epoch"] == 1
    assert sorted(path.name for path in folder.iterdir()) == ["data.npz", "fails.py", "run.pt"]


@pytest.mark.parametrize(
    "flags", [("--epochs", "0"), ("--epochs", "many"), ("--data", "none.npz"), ("--data", "labels.npz")], ids=" ".join
)
@pytest.mark.parametrize("first", [0, 1])
def test_a_mistake_of_all_processes_is_said_once(
    first: int,
    flags: tuple[str, ...],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever comes first; the two are called here one after the other."""
    np.savez("labels.npz", x=X, y=Y - 1)  # a label below 0: out of range on every process's host, and on no GPU
    store = torch.distributed.HashStore()
    monkeypatch.setattr(distributed, "_store", lambda *address: store)

    def run(config: Any, report: object) -> None:
        data.load_data(config.data)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "0")
    errors = []
    for rank in (first, 1 - first):
        monkeypatch.setenv("RANK", str(rank))
        assert call("train", *flags, run=run) == 2
        errors.append(capsys.readouterr().err)
    assert errors[0].startswith("mlp-fused")
    assert errors[0].count("\n") == 1
    assert errors[1] == ""


@pytest.mark.parametrize("flags", [("--version",), ("--help",), ("train", "--help"), ("env",)], ids=" ".join)
def test_the_first_process_alone_answers(
    flags: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        assert call(*flags) == 0
        assert bool(capsys.readouterr().out) == (rank == 0)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out == f"mlp-fused {mlp_fused.__version__}\n"


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What `mlp-fused env` prints, by name."""
    assert call("env") == 0
    pairs = [line.split(":", 1) for line in capsys.readouterr().out.splitlines()]
    return {name: value.strip() for name, value in pairs}


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_env_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no nvidia-smi
    monkeypatch.delenv("MLP_FUSED_DEBUG", raising=False)
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    found = report(capsys)
    assert found["mlp_fused"] == mlp_fused.__version__
    assert found["Python"].startswith(platform.python_version())
    assert found["torch"] == torch.__version__
    assert found["numpy"] == np.__version__
    assert found["OS"] == platform.platform()
    assert found["CUDA runtime"] == (torch.version.cuda or "none")
    assert found["HIP runtime"] == (torch.version.hip or "none")
    assert found["GPU"] == "none that torch can use"
    assert found["tuned table"].startswith("none for this GPU")
    assert found["driver"]
    assert found['backend "auto"'] == "the reference path: the input is on the CPU"
    assert found["MLP_FUSED_DEBUG"] == "not set"
    assert found["CUDA_LAUNCH_BLOCKING"] == "1 (makes every launch wait for its kernel)"
    assert found["TRITON_INTERPRET"].startswith(os.environ.get("TRITON_INTERPRET", "not set"))
    assert "MLP_FUSED_BACKEND" in found


@pytest.mark.usefixtures("no_gpu")
def test_env_reaches_its_end_whatever_is_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\nexit 9\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(environment, "FusedMLP", broken)
    monkeypatch.setattr(environment.metadata, "version", fail_to_find)
    found = report(capsys)
    assert found["triton"] == found["tqdm"] == "not installed"
    assert found["driver"].startswith("unknown: ")
    assert "exit status 9" in found["driver"]
    assert found['backend "auto"'] == "failed: RuntimeError: broken"


def fail_to_find(package: str) -> str:
    raise environment.metadata.PackageNotFoundError(package)


def memory_of(gpu: int) -> tuple[int, int]:
    if gpu:
        raise RuntimeError(
            "CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."
        )
    return 7 * 2**29, 1398 * 2**30 // 10


def test_env_lists_the_processes_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch does, where it has the package to ask with."""
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda package: package)
    for torchs, ours in (
        (
            "GPU:0\nprocess     1234 uses   512.000 MB GPU memory\nprocess        7 uses     1.000 MB GPU memory",
            "process 1234 uses 512.000 MB GPU memory; process 7 uses 1.000 MB GPU memory",
        ),
        ("GPU:0\nno processes are running", "no processes are running"),
        ("cuda driver can't be loaded, is cuda enabled?", "unknown; nvidia-smi may list them"),
    ):
        monkeypatch.setattr(torch.cuda, "list_gpu_processes", lambda gpu, torchs=torchs: torchs)
        assert environment._processes(0) == ours

    def broken(gpu: int) -> str:
        raise ValueError("Not Supported")

    monkeypatch.setattr(torch.cuda, "list_gpu_processes", broken)
    assert environment._processes(0) == "unknown: ValueError: Not Supported; nvidia-smi may list them"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert environment._processes(0).endswith("amd-smi process may list them")


def test_env_with_gpus(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Properties:
        major, minor, gcnArchName, total_memory = 9, 0, "gfx942", 141 * 2**30  # noqa: N815 (torch's name)

        def __init__(self, index: int) -> None:
            self.name = ["NVIDIA H200", "NVIDIA A100-SXM4-80GB"][index]

    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\nprintf '570.86.15\\n570.86.15\\n'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory_of)
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda package: None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "PACKAGED", tmp_path / "tuned")
    both = [tmp_path / "cache" / "mlp_fused" / "nvidia_h200.json", tmp_path / "tuned" / "nvidia_h200.json"]
    for path in both:
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    monkeypatch.setattr(environment, "_path_taken", lambda device: f"asked about {device}")
    found = report(capsys)
    assert found["GPU 0"] == "NVIDIA H200, compute capability 9.0, 141 GiB"
    assert found["tuned table 0"] == f"{both[0]}, then {both[1]}"
    assert found["memory 0"] == "3.5 of 139.8 GiB free"
    assert found["memory 1"] == "unknown: CUDA error: out of memory"
    assert found["processes 0"] == (
        "nvidia-smi lists those that hold memory (this report does with pip install nvidia-ml-py)"
    )
    assert found["GPU 1"].startswith("NVIDIA A100-SXM4-80GB, ")
    assert found["tuned table 1"] == "none for this GPU"
    assert found["driver"] == "570.86.15"
    assert found['backend "auto"'] == "asked about cuda"


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
        assert "default" in entries["--" + field.name]
    assert "(default: auto, a GPU where there is one)" in entries["--device"]
    assert "not scaled: the model does that" in entries["--data"]


def test_train_then_predict(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "--data", "data.npz", *TINY, "--checkpoint", "run.pt") == 0
    capsys.readouterr()
    assert call("predict", "--checkpoint", "run.pt", "--data", "data.npz", "--out", "out.csv") == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("data.npz: 50 rows; labels, probabilities, classes are in out.csv\n", "")
    assert len(Path("out.csv").read_text().splitlines()) == 51


PREDICT_MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing": ((), "the following arguments are required: --checkpoint, --data, --out"),
    "no checkpoint": (
        ("--checkpoint", "none.pt", "--data", "data.npz", "--out", "o.npz"),
        "there is no checkpoint none",
    ),
    "suffix": (("--checkpoint", "a", "--data", "data.npz", "--out", "o.txt"), "--out is o.txt; it needs to be a name"),
    "its data": (
        ("--checkpoint", "a", "--data", "data.npz", "--out", "data.npz"),
        "--out is data.npz, the file of --data",
    ),
}


@pytest.mark.parametrize(("flags", "sentence"), PREDICT_MISTAKES.values(), ids=PREDICT_MISTAKES)
def test_a_mistake_in_predicting_is_one_sentence_and_exit_status_2(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], sentence: str
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert call("predict", *flags) == 2
    out, err = capsys.readouterr()
    assert re.search(f"^mlp-fused( predict)?: .*{re.escape(sentence)}", err)
    assert err.count("\n") == 1
    assert out == ""
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_every_flag_of_tune_reaches_its_configuration() -> None:
    seen: list[TuneConfig] = []

    def run(config: Any, report: object) -> None:
        seen.append(config)

    assert call("tune", run=run) == 0
    flags = "--dims 784 512 10 --dims 4 2 --batch 64 128 --dtype tf32 fp16 --activation gelu --minutes 2.5 --out t.json"
    assert call("tune", *flags.split(), run=run) == 0
    told = TuneConfig(((784, 512, 10), (4, 2)), (64, 128), ("tf32", "fp16"), "gelu", 2.5, "t.json")
    assert seen == [TuneConfig(), told]
    for field in dataclasses.fields(TuneConfig):
        assert "--" + field.name in flags
        assert getattr(told, field.name) != field.default


def test_help_of_tune_states_every_flag_and_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "10000")
    assert call("tune", "--help") == 0
    entries = {entry.split()[0]: entry for entry in re.split(r"\n  (?=--)", capsys.readouterr().out)}
    for field in dataclasses.fields(TuneConfig):
        assert "default: " in entries["--" + field.name]
    assert "(default: 64 1024)" in entries["--batch"]
    assert "(default: fp32 bf16)" in entries["--dtype"]
    assert "(default: 10.0)" in entries["--minutes"]


TUNE_MISTAKES = {
    "no GPU": ((), "tuning measures a GPU, and there is none that torch can use; mlp-fused env says what was found"),
    "no GPU, a network": (("--dims", "4", "2"), "tuning measures a GPU, and there is none"),
    "one width": (("--dims", "4"), "--dims is 4; it needs to be two widths or more"),
    "no number": (("--dims", "4", "x"), "argument --dims: invalid int value: 'x'"),
    "batch without dims": (("--batch", "4"), "--batch is of networks that --dims gives"),
    "dtype": (("--dims", "4", "2", "--dtype", "fp8"), "argument --dtype: invalid choice: 'fp8'"),
    "minutes": (("--minutes", "-1"), "--minutes is -1.0; it needs to be a finite number above 0"),
    "no such flag": (("--minute", "1"), "unrecognized arguments: --minute 1"),
}


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(("flags", "sentence"), TUNE_MISTAKES.values(), ids=TUNE_MISTAKES)
def test_a_mistake_in_tuning_is_one_sentence_and_exit_status_2(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], sentence: str
) -> None:
    assert call("tune", *flags) == 2
    out, err = capsys.readouterr()
    assert re.search(f"^mlp-fused( tune)?: .*{re.escape(sentence)}", err)
    assert err.count("\n") == 1
    assert out == ""


def test_ctrl_c_while_tuning(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(config: TuneConfig, report: object) -> None:
        raise KeyboardInterrupt("stopped; 2 of 6 problems were measured, and are in t.json")

    assert call("tune", run=interrupted) == 130
    assert capsys.readouterr().err == "mlp-fused: stopped; 2 of 6 problems were measured, and are in t.json\n"


def test_every_flag_of_transfer_reaches_its_configuration() -> None:
    seen: list[TransferConfig] = []

    def run(config: Any, report: object) -> None:
        seen.append(config)

    assert call("transfer", run=run) == 0
    flags = "--dims 784 10 --activation gelu --batch 8 16 --dtype bf16 --inference --device cpu --json --plot a.png"
    assert call("transfer", *flags.split(), run=run) == 0
    assert call("transfer", "--checkpoint", "run.pt", run=run) == 0
    told = TransferConfig((784, 10), None, "gelu", (8, 16), "bf16", True, "cpu", True, "a.png")
    assert seen == [TransferConfig(), told, TransferConfig(checkpoint="run.pt")]
    for field in dataclasses.fields(TransferConfig):
        assert "--" + field.name in flags + " --checkpoint"
        assert field.name == "checkpoint" or getattr(told, field.name) != field.default


def test_help_of_transfer_states_every_flag_and_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "10000")
    assert call("transfer", "--help") == 0
    entries = {entry.split()[0]: entry for entry in re.split(r"\n  (?=--)", capsys.readouterr().out)}
    for field in dataclasses.fields(TransferConfig):
        assert "default: " in entries["--" + field.name]
    assert "(default: 784 512 512 10)" in entries["--dims"]
    assert "(default: 64 256 1024)" in entries["--batch"]
    assert "(default: fp32)" in entries["--dtype"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures next to nothing, so next to nothing long."""
    measure = measurement.measure
    monkeypatch.setattr(measurement, "measure", lambda *args, **options: measure(*args, **options, seconds=1e-3))


@pytest.mark.usefixtures("no_gpu", "quick")
def test_transfer_without_a_gpu_measures_the_cpu(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("transfer", "--dims", "6", "5", "--batch", "4", "8", "--dtype", "bf16") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("FusedMLP, 35 parameters, input (8, 6) bfloat16; training, 8 rows\n")
    assert "step on the CPU" in out
    assert "not measured: the GPU's part, which is copies, launches, kernels and first touch (no GPU that torch" in out


@pytest.mark.usefixtures("no_gpu", "quick")
def test_transfer_of_a_trained_network_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "--data", "data.npz", *TINY, "--checkpoint", "run.pt") == 0
    capsys.readouterr()
    assert call("transfer", "--checkpoint", "run.pt", "--batch", "4", "2", "--inference", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["network"] == "FusedMLP, 50 parameters, input (4, 3) float32"
    assert [point["rows"] for point in found["points"]] == [2, 4]
    assert not found["training"]
    assert found["gpu"] is None


@pytest.mark.usefixtures("no_gpu", "quick")
@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_transfer_draws(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("transfer", "--dims", "6", "5", "--batch", "4", "8", "--plot", "plot.svg") == 0
    assert capsys.readouterr().out.endswith("drawn into plot.svg\n")
    assert Path("plot.svg").read_bytes().startswith(b"<?xml")


TRANSFER_MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "one width": (("--dims", "4"), "--dims is 4; it needs to be two widths or more, each 1 or more, such as 784 10"),
    "no width": (("--dims", "4", "0"), "--dims is 4 0; it needs to be two widths or more"),
    "batch": (("--batch", "0"), "--batch is 0; it needs to be 1 or more"),
    "dtype": (("--dtype", "fp8"), "argument --dtype: invalid choice: 'fp8'"),
    "activation": (("--activation", "none"), "--activation is 'none'"),
    "two networks": (("--dims", "4", "2", "--checkpoint", "a"), "--dims and --checkpoint are two networks; it needs"),
    "two activations": (("--activation", "relu", "--checkpoint", "a"), "--activation and --checkpoint are two"),
    "no checkpoint": (("--checkpoint", "none.pt"), "there is no checkpoint none.pt"),
    "no such checkpoint": (("--checkpoint", "data.npz"), "data.npz cannot be read as a checkpoint"),
    "device": (("--device", "gpu"), "--device gpu cannot be used here"),
    "kind of plot": (("--plot", "plot.pdf"), "--plot is plot.pdf; it needs to be a name that ends in .png or .svg"),
    "no folder": (("--plot", "none/plot.png"), "cannot write into"),
    "a network too large": (("--dims", "1", "1000000000000"), "--dims 1 1000000000000 makes no network here"),
}


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(("flags", "sentence"), TRANSFER_MISTAKES.values(), ids=TRANSFER_MISTAKES)
def test_a_mistake_in_transfer_is_one_sentence_and_exit_status_2(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    sentence: str,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", sys)  # some module: nothing is drawn
    assert call("transfer", *flags) == 2
    out, err = capsys.readouterr()
    assert re.search(f"^mlp-fused( transfer)?: .*{re.escape(sentence)}", err)
    assert err.count("\n") == 1
    assert out == ""


def test_matplotlib_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert call("transfer", "--plot", "plot.png") == 2
    sentence = '--plot needs matplotlib, which is not installed: pip install "mlp_fused[plot]"'
    assert capsys.readouterr().err == f"mlp-fused: {sentence}\n"
