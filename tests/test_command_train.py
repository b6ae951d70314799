"""`mlp-fused train`: its output, its errors, and Ctrl-C."""

from __future__ import annotations

import dataclasses
import os
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
from command_line import COMMAND, TINY, X, Y, call, write

import mlp_fused
from mlp_fused import ACTIVATIONS, files
from mlp_fused.checkpoint import load_checkpoint
from mlp_fused.engine import paths
from mlp_fused.errors import UserError
from mlp_fused.train import loop, timer
from mlp_fused.train.config import Config


def test_training_prints_its_progress_and_results(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "--data", "data.npz", *TINY, "--checkpoint", "run.pt") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "data.npz: 3 features, 2 classes, 40 training rows, 10 validation rows" in out
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
    share = r"\(always predicting [01], the largest class: [01]\.\d{4}\)"
    assert re.search(rf"\nvalidation accuracy: {accuracy:.4f} {share}\ncheckpoint: run\.pt\n$", out)
    assert f"\n{loop.SCALED}\n" in out


def test_an_interrupted_command_is_resumed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--data", "data.npz", "--hidden", "8", "--dropout", "0.5", "--checkpoint"]
    assert call(*command, "whole.pt", "--epochs", "4") == 0
    assert call(*command, "parts.pt", "--epochs", "2") == 0
    assert call(*command, "parts.pt", "--epochs", "4", "--resume") == 0
    assert "resuming from parts.pt, after epoch 2\nepoch 3/4" in capsys.readouterr().out
    whole, parts = load_checkpoint("whole.pt"), load_checkpoint("parts.pt")
    assert whole["history"] == parts["history"]
    for key, value in whole["model"].items():
        assert torch.equal(value, parts["model"][key])


def test_every_flag_reaches_the_configuration() -> None:
    seen: list[Config] = []

    def run(config: Any, report: object) -> None:
        seen.append(config)

    assert call("train", run=run) == 0
    config = Config(
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
    for name, value in dataclasses.asdict(config).items():
        assert value != getattr(Config(), name), f"{name} is equal to its default"
        arguments.append("--" + name.replace("_", "-"))
        arguments += [] if value is True else map(str, value) if isinstance(value, tuple) else [str(value)]
    assert call("train", *arguments, run=run) == 0
    assert seen == [Config(), config]


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
            assert str(field.default) in entry.split("{")[0] + entry.split("}")[-1]  # not in the list of choices
    assert "512 512" in entries["--hidden"]
    assert ", ".join(ACTIVATIONS) in entries["--activation"]
    assert "0.001 for adam, 0.05 for sgd" in entries["--lr"]
    usage = re.sub(r"\s+", " ", next(iter(entries.values())))
    assert "Each feature is scaled in float64: minus its mean, divided by a quarter of its range" in usage
    assert "The model in a checkpoint includes the scaling" in usage


def broken_zip() -> None:
    content = bytearray(Path("data.npz").read_bytes())
    content[100:400] = bytes(300)
    Path("data.npz").write_bytes(content)


def checkpoint_with_other_widths() -> None:
    assert call("train", "--data", "data.npz", *TINY, "--hidden", "16", "--checkpoint", "run.pt") == 0


def truncated_checkpoint() -> None:
    checkpoint_with_other_widths()
    Path("run.pt").write_bytes(Path("run.pt").read_bytes()[:2000])


NAN = np.where(np.arange(18).reshape(6, 3) >= 10, np.nan, 1.0)


RUN = ("--checkpoint", "run.pt")


# The preparation of the folder (a function, or the arrays of data.npz), the flags, and the sentence as a regular
# expression.
MISTAKES: dict[str, tuple[Callable[[], object] | dict[str, Any], tuple[str, ...], str]] = {
    "no file": ({}, ("--data", "none.npz"), "there is no file none.npz"),
    "a folder": ({}, ("--data", "."), r"cannot read \.: Is a directory"),
    "text": (
        lambda: Path("data.npz").write_text("x,y\n1,2\n"),
        (),
        r"data.npz is not an npz file; .*numpy\.savez",
    ),
    "an empty file": (lambda: Path("data.npz").write_bytes(b""), (), "data.npz is not an npz file"),
    "npy": (lambda: np.save("a.npy", X), ("--data", "a.npy"), "a.npy has a single array; it needs to be an npz file"),
    "a damaged file": (broken_zip, (), "cannot read array x of data.npz: .+"),
    "no y": (lambda: write(x=X, labels=Y), (), "data.npz has no array y; it has x, labels, but needs x .* and y"),
    "neither": (lambda: np.savez("data.npz", X), (), "data.npz has no array x and no array y; it has arr_0,"),
    "no arrays": (write, (), "data.npz has no array x and no array y; it has none,"),
    "objects": ({"y": np.array([{}] * 6)}, (), r"data.npz: y is an array of Python .*; save y\.astype\(str\)"),
    "complex": ({"x": X * 1j}, (), "data.npz: x has dtype complex128; it needs real numbers"),
    "text in x": ({"x": np.array(["a"] * 6)}, (), "x has dtype <U1; it needs real numbers"),
    "dates": ({"x": X.astype("M8[s]")}, (), r"x has dtype datetime64\[s\]; it needs real"),
    "NaN": (
        {"x": NAN},
        (),
        r"x has 8 values that are NaN, .*, the first in row 3 \(counted from 0\)",
    ),
    "infinity": ({"x": np.where(Y == 1, np.inf, 0)}, (), "x has 2 values that are NaN, infinite .* in row 1"),
    "beyond float32": (
        {"x": np.diag([1, 1, 1, 1, 1e300, 1])},
        (),
        "x has 1 value that .* beyond float32, .* row 4",
    ),
    "no rows": ({"x": np.ones((0, 3)), "y": []}, (), r"x has the shape \(0, 3\), and is empty; it needs rows of data"),
    "no features": ({"x": np.ones((6, 0))}, (), r"x has the shape \(6, 0\), and is empty"),
    "a number": ({"x": 3.0}, (), r"x has the shape \(\), a single number"),
    "one row": (
        {"x": X[:1], "y": Y[:1]},
        (),
        "there is only one row; training and validation need at least one",
    ),
    "lengths": ({"y": Y[:4]}, (), "data.npz: x has 6 rows and y has 4 targets; it needs one target per row"),
    "no labels": ({"y": []}, (), "x has 6 rows and y has 0 targets"),
    "a label for all": ({"y": 1}, (), r"y has the shape \(\); it needs one label per row"),
    "one-hot": ({"y": np.eye(3)[Y]}, (), r"y has the shape \(6, 3\); .*numpy\.argmax"),
    "dates for labels": ({"y": Y.astype("M8[s]")}, (), r"y has dtype datetime64\[s\]; .*numpy\.unique.*astype\(str"),
    "names for numbers": (
        {"y": np.array(list("abcabc"))},
        ("--task", "regression"),
        "y has dtype <U1; .*real numbers",
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
    "huge": ({}, ("--hidden", "1000000000000"), "--hidden is 1000000000000; cannot build the network: .*memory"),
    "beyond 64 bits": ({}, ("--hidden", "8", str(2**63)), f"--hidden is {2**63}; it needs to be at most 2.63 - 1$"),
    "lr beyond float32": ({}, ("--lr", "1e300"), r"--lr is 1e\+300; it needs to be a finite .* above 0, at most 1e36$"),
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
        "--dtype fp16 needs a GPU; on a CPU, use fp32 or bf16",
    ),
    "device": ({}, ("--device", "gpu"), "--device gpu cannot be used here: .+; --device cpu always works"),
    "meta": ({}, ("--device", "meta"), "--device meta cannot be used here: .+; --device cpu always works"),
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
    "another network": (
        checkpoint_with_other_widths,
        (*RUN, "--resume"),
        "run.pt is from another run: --hidden is 8, but needs",
    ),
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
def test_a_mistake_gives_one_sentence_and_exit_status_2(
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
def test_mistakes_in_python_give_the_same_sentences(name: str, choices: str) -> None:
    with pytest.raises(UserError, match=f"^--{name} is x; it needs to be one of {choices}$"):
        Config(**{name: "x"})  # type: ignore[arg-type]


def test_cuda_without_a_gpu(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(*_: object, **__: object) -> None:
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch, "zeros", zeros)
    assert call("train", "--data", "data.npz", "--device", "cuda") == 2
    sentence = "--device cuda cannot be used here: Torch not compiled with CUDA enabled; --device cpu always works"
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
    assert 'scikit-learn, which is not installed; install it (pip install "mlp_fused[demo]") or use --data' in err
    assert err.count("\n") == 1


def enable_interrupts() -> None:
    """Handle SIGINT, which background processes of a shell and their children ignore by default."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.alone
def test_a_signal_to_every_process_leaves_the_last_checkpoint(folder: Path) -> None:
    """A terminal sends SIGINT to every process on Ctrl-C. Workers must not print their own tracebacks."""
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
        preexec_fn=enable_interrupts,
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
        f"mlp-fused: stopped; run.pt is the last checkpoint, after epoch {epoch}; "
        "add --resume to the same command to continue\n"
    )
    assert sorted(path.name for path in folder.iterdir()) == ["data.npz", "run.pt"]
