"""Training that runs out of memory, and marks on distorted times."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from out_of_memory import TORCH_MESSAGE, on_call, run_out
from torch import nn

from mlp_fused import memory
from mlp_fused.__main__ import main
from mlp_fused.checkpoint import load_checkpoint
from mlp_fused.memory import Room
from mlp_fused.train import loop
from mlp_fused.train.config import Config, build_model
from mlp_fused.train.loop import train


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A configuration with 56 training rows, 4 steps per epoch, and 14 validation rows in one batch."""
    random = np.random.default_rng(0)
    y = random.integers(0, 3, 70)
    np.savez(tmp_path / "data.npz", x=random.normal(size=(70, 6)) + 2 * y[:, None], y=y)
    return Config(
        data=str(tmp_path / "data.npz"),
        hidden=(8,),
        epochs=3,
        batch_size=16,
        checkpoint=str(tmp_path / "run.pt"),
        device="cpu",
    )


# Changes of the network that make one phase of the second epoch run out of memory.
PHASES: dict[str, Callable[[nn.Module], object]] = {
    "forward": lambda model: model.register_forward_hook(on_call(7)),  # an epoch calls the network 4 + 1 times
    "backward": lambda model: model[0].weight.register_hook(on_call(6)),
    "optimizer": lambda model: model[0].weight.register_post_accumulate_grad_hook(on_call(6)),
    "validation": lambda model: model.register_forward_hook(on_call(10)),
}


@pytest.mark.parametrize("phase", PHASES)
def test_training_that_runs_out_resumes_from_the_last_checkpoint(
    phase: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*arguments: Any) -> nn.Module:
        model = build_model(*arguments)
        PHASES[phase](model)
        return model

    path = Path(str(config.checkpoint))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        train(config, build=build, report=lambda text: None)
    torchs, ours, where = str(caught.value).splitlines()
    assert torchs == TORCH_MESSAGE
    assert ours.startswith("mlp_fused: a batch of 16 rows needs ")
    assert ours.endswith(
        "To use less memory: a smaller --batch-size (restarts the training), more GPUs, which share each batch "
        "(torchrun), or --dtype bf16 (restarts the training)."
    )
    assert (
        where == f"stopped; {path} is the last checkpoint, after epoch 1; add --resume to the same command to continue"
    )
    assert [file.name for file in sorted(path.parent.iterdir())] == ["data.npz", "run.pt"]
    alone = train(dataclasses.replace(config, epochs=1, checkpoint=None), report=lambda text: None)
    for name, tensor in load_checkpoint(path)["model"].items():
        assert torch.equal(tensor, alone.model.state_dict()[name])
    resumed = train(dataclasses.replace(config, resume=True), report=lambda text: None)
    whole = train(dataclasses.replace(config, checkpoint=None), report=lambda text: None)
    assert resumed.history == whole.history


def test_the_command_that_runs_out_prints_no_traceback(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.optim.Adam, "step", run_out)
    monkeypatch.setattr(memory, "room", lambda device: Room(2**20, 2**19))
    flags = ["--data", str(config.data), "--hidden", "8", "--checkpoint", str(config.checkpoint), "--device", "cpu"]
    assert main(["train", *flags]) == 2
    torchs, ours, where = capsys.readouterr().err.splitlines()
    assert torchs == f"mlp-fused: {TORCH_MESSAGE}"
    assert (
        "To use less memory: a smaller --batch-size, more GPUs, which share each batch (torchrun), or --dtype bf16."
        in ours
    )
    assert where == f"stopped before the end of the first epoch; no checkpoint was written to {config.checkpoint}"
    assert not Path(str(config.checkpoint)).exists()


def test_state_has_the_number_of_tensors_per_parameter() -> None:
    for name, state in loop.STATE.items():
        config = Config(optimizer=name, hidden=(8,))
        model = build_model(4, 3, config)
        optimizer = loop.make_optimizer(model, config, torch.device("cpu"))
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        moments = [
            tensor for tensor in optimizer.state[model[0].weight].values() if tensor.shape == model[0].weight.shape
        ]
        assert len(moments) == state


def test_distorted_times_are_marked(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    train(config, report=messages.append)
    assert not any("times are distorted" in line for line in messages)  # those of a CPU are not
    messages.clear()
    marked = loop.about_times(torch.device("cuda"))
    assert marked == (
        "these times are distorted: CUDA_LAUNCH_BLOCKING is set, which makes every launch wait for its kernel: "
        "unset it to measure\n"
    )
