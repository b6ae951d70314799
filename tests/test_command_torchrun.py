"""`torchrun … mlp-fused train`: the results of one process, and one message if a process fails."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import TINY, call

import mlp_fused
from mlp_fused.checkpoint import load_checkpoint

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(*arguments: str) -> subprocess.Popen[str]:
    """Start two processes of the command with these arguments on the CPU."""
    environ = {
        **os.environ,
        "PYTHONPATH": str(Path(mlp_fused.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",  # torchrun warns if it has to set this
        "CUDA_VISIBLE_DEVICES": "",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environ}
    return subprocess.Popen([*TORCHRUN, *arguments], start_new_session=True, **pipes)  # type: ignore[call-overload]


def messages(err: str) -> list[str]:
    """Our error lines; torchrun adds its own report of the failed processes."""
    return [line for line in err.splitlines() if line.startswith("mlp-fused") or "[rank" in line]


def history(text: str) -> list[str]:
    quality = r"(?:accuracy \S+|R² \S+  RMSE [^ ,]+)"
    return re.findall(rf"^epoch .* {quality}|^validation .*|^FusedMLP.*|.* training rows, .*", text, re.M)


@pytest.mark.alone
def test_torchrun_trains_as_one_process_does(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["train", "--data", "data.npz", *TINY, "--checkpoint"]
    with torchrun("-m", "mlp_fused", *flags, "two.pt") as command:
        two, err = command.communicate(timeout=120)
    assert (command.returncode, err) == (0, "")
    assert call(*flags, "one.pt") == 0
    one = capsys.readouterr().out
    assert "50 parameters on cpu, in each of 2 processes, the reference path" in two

    assert len(history(one)) == 5
    assert history(two) == history(one)
    assert sorted(path.name for path in folder.iterdir()) == ["data.npz", "one.pt", "two.pt"]
    assert call(*flags, "two.pt", "--epochs", "3", "--resume") == 0
    assert load_checkpoint("two.pt")["epoch"] == 3
    assert load_checkpoint("two.pt")["model"].keys() == load_checkpoint("one.pt")["model"].keys()


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
    advice = f"run.pt is the last checkpoint, after epoch {epoch}; add --resume to the same command to continue"
    assert messages(err) == [f"mlp-fused: stopped; {advice}"]
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
            "\nstopped; run.pt is the last checkpoint, after epoch 1; add --resume to the same command to continue\n",
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
