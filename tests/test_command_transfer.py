"""`mlp-fused transfer`: its flags, its help, its errors and its output."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import TINY, call

from mlp_fused.transfer.config import Config as TransferConfig
from mlp_fused.transfer.config import run as transfer


def test_every_flag_of_transfer_reaches_its_configuration() -> None:
    seen: list[TransferConfig] = []

    def run(config: Any, report: object) -> None:
        seen.append(config)

    assert call("transfer", run=run) == 0
    flags = "--dims 784 10 --activation gelu --batch 8 16 --dtype bf16 --inference --device cpu --json --plot a.png"
    assert call("transfer", *flags.split(), run=run) == 0
    assert call("transfer", "--checkpoint", "run.pt", run=run) == 0
    expected = TransferConfig((784, 10), None, "gelu", (8, 16), "bf16", True, "cpu", True, "a.png")
    assert seen == [TransferConfig(), expected, TransferConfig(checkpoint="run.pt")]
    for field in dataclasses.fields(TransferConfig):
        assert "--" + field.name in flags + " --checkpoint"
        assert field.name == "checkpoint" or getattr(expected, field.name) != field.default


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


quick = functools.partial(transfer, seconds=1e-3)  # almost no measuring time


@pytest.mark.usefixtures("no_gpu")
def test_transfer_without_a_gpu_measures_the_cpu(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("transfer", "--dims", "6", "5", "--batch", "4", "8", "--dtype", "bf16", run=quick) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("FusedMLP, 35 parameters, input (8, 6) bfloat16; training, 8 rows\n")
    assert "step on the CPU" in out
    assert "not measured: the GPU's copies, launches, kernels and first touch (torch" in out


@pytest.mark.usefixtures("no_gpu")
def test_transfer_of_a_trained_network_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "--data", "data.npz", *TINY, "--checkpoint", "run.pt") == 0
    capsys.readouterr()
    assert call("transfer", "--checkpoint", "run.pt", "--batch", "4", "2", "--inference", "--json", run=quick) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["network"] == "FusedMLP, 50 parameters, input (4, 3) float32"
    assert [point["rows"] for point in output["points"]] == [2, 4]
    assert not output["training"]
    assert output["gpu"] is None


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_transfer_draws_a_figure(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("transfer", "--dims", "6", "5", "--batch", "4", "8", "--plot", "plot.svg", run=quick) == 0
    assert capsys.readouterr().out.endswith("wrote the plot to plot.svg\n")
    assert Path("plot.svg").read_bytes().startswith(b"<?xml")


TRANSFER_MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "one width": (("--dims", "4"), "--dims is 4; it needs to be two widths or more, each 1 or more, such as 784 10"),
    "no width": (("--dims", "4", "0"), "--dims is 4 0; it needs to be two widths or more"),
    "batch": (("--batch", "0"), "--batch is 0; it needs to be 1 or more"),
    "a width beyond 64 bits": (("--dims", "3", str(2**63)), f"--dims is {2**63}; it needs to be at most 2^63 - 1"),
    "rows beyond 64 bits": (("--batch", "9" * 20), f"--batch is {'9' * 20}; it needs to be at most 2^63 - 1"),
    "rows beyond memory": (("--dims", "3", "3", "--batch", str(2**62)), f"--batch is {2**62}; cannot make its input: "),
    "dtype": (("--dtype", "fp8"), "argument --dtype: invalid choice: 'fp8'"),
    "activation": (("--activation", "none"), "--activation is 'none'"),
    "two networks": (("--dims", "4", "2", "--checkpoint", "a"), "--dims and --checkpoint are both given, but each"),
    "two activations": (("--activation", "relu", "--checkpoint", "a"), "--activation and --checkpoint are both"),
    "no checkpoint": (("--checkpoint", "none.pt"), "there is no checkpoint none.pt"),
    "no such checkpoint": (("--checkpoint", "data.npz"), "data.npz cannot be read as a checkpoint"),
    "device": (("--device", "gpu"), "--device gpu cannot be used here"),
    "kind of plot": (("--plot", "plot.pdf"), "--plot is plot.pdf; it needs to end in .png or .svg"),
    "no folder": (("--plot", "none/plot.png"), "cannot write into"),
    "a network too large": (("--dims", "1", "1000000000000"), "--dims is 1 1000000000000; cannot build the network"),
}


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(("flags", "sentence"), TRANSFER_MISTAKES.values(), ids=TRANSFER_MISTAKES)
def test_a_mistake_in_transfer_gives_one_sentence_and_exit_status_2(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    sentence: str,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", sys)  # any module will do, as nothing is drawn
    assert call("transfer", *flags) == 2
    out, err = capsys.readouterr()
    assert re.search(f"^mlp-fused( transfer)?: .*{re.escape(sentence)}", err)
    assert err.count("\n") == 1
    assert out == ""


def test_matplotlib_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert call("transfer", "--plot", "plot.png") == 2
    sentence = '--plot needs matplotlib, which is not installed; install it (pip install "mlp_fused[plot]")'
    assert capsys.readouterr().err == f"mlp-fused: {sentence}\n"
