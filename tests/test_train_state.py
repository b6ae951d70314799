"""Checkpoints of a training, and resuming from them."""

from __future__ import annotations

import dataclasses
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trainings import TINY, assert_same_bits, quiet, run, write_data

from mlp_fused import FusedMLP, checkpoint
from mlp_fused.checkpoint import load_checkpoint, save_checkpoint
from mlp_fused.errors import UserError
from mlp_fused.scaling import Scaling
from mlp_fused.train import tasks
from mlp_fused.train.config import build_model
from mlp_fused.train.data import load_data
from mlp_fused.train.loop import train


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_data(tmp_path)


def test_a_checkpoint_is_read_with_weights_only(data: str, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    result = run(TINY, data=data, checkpoint=str(path))
    saved = torch.load(path, weights_only=True)
    assert saved["format"] == checkpoint.FORMAT
    assert saved["epoch"] == 3
    assert [tasks.Epoch(**epoch) for epoch in saved["history"]] == result.history
    assert saved["config"]["hidden"] == [8]
    assert saved["config"]["lr"] == 1e-3
    assert saved["data"]["rows"] == 70
    assert {"order", "processes"} == saved["random"].keys()
    assert [random.keys() for random in saved["random"]["processes"]] == [{"torch", "cuda"}]
    assert sorted(tmp_path.iterdir()) == [tmp_path / "data.npz", path]

    network = FusedMLP(6, [8, 3], activation_layer="gelu")  # a user may build it so later
    model = nn.Sequential(OrderedDict(scaling=Scaling(torch.zeros(6), torch.ones(6)), network=network))
    model.load_state_dict(saved["model"])
    x = load_data(data).x
    assert torch.equal(model.eval()(x), result.model(x))
    assert torch.equal(result.network(result.scaling(x)), result.model(x))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "changes",
    [{}, {"dropout": 0.5}, {"optimizer": "sgd"}, {"dropout": 0.3, "dtype": "bf16"}],
    ids=lambda changes: ",".join(map(str, changes.values())) or "plain",
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    data: str, tmp_path: Path, workers: int, changes: dict[str, Any]
) -> None:
    config = dataclasses.replace(TINY, data=data, workers=workers, **changes)
    whole = run(config, epochs=4)
    path = str(tmp_path / "run.pt")
    first = run(config, epochs=1, checkpoint=path)
    torch.manual_seed(99)  # other code may draw random numbers in between
    second = run(config, epochs=3, checkpoint=path, resume=True)
    third = run(config, epochs=4, checkpoint=path, resume=True)
    assert_same_bits(third, whole)
    assert first.losses + second.losses + third.losses == whole.losses


def test_the_state_of_the_gradient_scaler_is_restored(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16 needs a GPU, but its gradient scaler also works without."""
    path = str(tmp_path / "run.pt")
    scalers = []
    original = torch.amp.GradScaler

    def enabled(kind: str, enabled: bool) -> torch.amp.GradScaler:
        scalers.append(original(kind, init_scale=2.0**10, growth_interval=5))
        return scalers[-1]

    monkeypatch.setattr(torch.amp, "GradScaler", enabled)
    whole = run(TINY, data=data)
    run(TINY, data=data, epochs=2, checkpoint=path)
    assert_same_bits(run(TINY, data=data, epochs=3, checkpoint=path, resume=True), whole)
    assert scalers[0].get_scale() == scalers[2].get_scale() == 2.0**12  # grown after 5 and 10 of 12 steps


def test_a_checkpoint_of_a_gpu_resumes_without_one(data: str, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    run(TINY, data=data, epochs=1, checkpoint=str(path))
    saved = load_checkpoint(path)
    for group in saved["optimizer"]["param_groups"]:
        group["fused"] = True
    saved["random"]["processes"][0]["cuda"] = torch.zeros(16, dtype=torch.uint8)
    save_checkpoint(path, saved)
    resumed = run(TINY, data=data, checkpoint=str(path), resume=True)
    assert load_checkpoint(path)["optimizer"]["param_groups"][0]["fused"] is False
    assert_same_bits(resumed, run(TINY, data=data))


def test_nothing_left_to_train(data: str, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, data=data, checkpoint=str(tmp_path / "run.pt"))
    whole = run(config)
    lines: list[str] = []
    resumed = train(dataclasses.replace(config, resume=True, epochs=2), report=lines.append)
    assert_same_bits(resumed, whole)
    assert resumed.losses == []
    assert any("nothing left to train" in line for line in lines)
    assert lines[-2].startswith(f"validation accuracy: {whole.accuracy:.4f} (always predicting ")


OTHER_RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "hidden": ({"hidden": (8, 8)}, "--hidden is 8 8, but needs to be 8"),
    "no hidden": ({"hidden": ()}, "--hidden is empty, but needs to be 8"),
    "activation": ({"activation": "relu"}, "--activation is relu, but needs to be gelu"),
    "dropout": ({"dropout": 0.1}, "--dropout is 0.1, but needs to be 0.0"),
    "optimizer": ({"optimizer": "sgd", "lr": 1e-3}, "--optimizer is sgd, but needs to be adam"),
    "lr": ({"lr": 0.1}, "--lr is 0.1, but needs to be 0.001"),
    "batch size": ({"batch_size": 8}, "--batch-size is 8, but needs to be 16"),
    "dtype": ({"dtype": "bf16"}, "--dtype is bf16, but needs to be fp32"),
    "seed": ({"seed": 1}, "--seed is 1, but needs to be 0"),
    "split": ({"validation_fraction": 0.5}, "--validation-fraction is 0.5, but needs to be 0.2"),
    "data": ({"data": None}, "--data has 1797 rows, 64 features, 10 classes, but needs 70 rows, 6 features, 3 classes"),
    "two": ({"seed": 1, "lr": 0.1}, "--lr is 0.1, but needs to be 0.001; --seed is 1, but needs to be 0"),
}


@pytest.mark.parametrize(("changes", "sentence"), OTHER_RUNS.values(), ids=OTHER_RUNS)
def test_a_checkpoint_of_another_run_is_refused(
    data: str, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    config = dataclasses.replace(TINY, data=data, epochs=1, checkpoint=str(tmp_path / "run.pt"))
    run(config)
    before = (tmp_path / "run.pt").read_bytes()
    with pytest.raises(UserError) as caught:
        run(config, epochs=2, resume=True, **changes)
    assert str(caught.value) == f"{config.checkpoint} is from another run: {sentence}"
    assert (tmp_path / "run.pt").read_bytes() == before


def test_other_values_of_the_same_sizes(data: str, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, data=data, epochs=1, checkpoint=str(tmp_path / "run.pt"))
    run(config)
    arrays = dict(np.load(data))
    arrays["x"][0, 0, 0] += 1
    np.savez(data, **arrays)
    with pytest.raises(UserError, match="but needs 70 rows, 6 features, 3 classes with other values"):
        run(config, epochs=2, resume=True)


@pytest.mark.parametrize("classes", [2, 4])
def test_another_number_of_classes_is_refused(data: str, tmp_path: Path, classes: int) -> None:
    """More or fewer classes are refused on the host, before any network is built."""
    config = dataclasses.replace(TINY, data=data, epochs=1, checkpoint=str(tmp_path / "run.pt"))
    run(config)
    before = (tmp_path / "run.pt").read_bytes()
    arrays = dict(np.load(data))
    np.savez(data, x=arrays["x"], y=np.arange(len(arrays["y"])) % classes)
    built: list[object] = []
    with pytest.raises(UserError, match=f"--data has 70 rows, 6 features, {classes} classes, but needs .* 3 classes$"):
        train(dataclasses.replace(config, epochs=2, resume=True), build=lambda *_: built.append(1), report=quiet)
    assert built == []
    assert (tmp_path / "run.pt").read_bytes() == before


def test_the_data_may_have_moved_and_workers_may_differ(data: str, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, data=data, checkpoint=str(tmp_path / "run.pt"))
    whole = run(TINY, data=data)
    run(config, epochs=1)
    moved = Path(data).rename(tmp_path / "elsewhere.npz")
    assert_same_bits(run(config, data=str(moved), workers=1, backend="reference", resume=True), whole)


@pytest.mark.parametrize("name", checkpoint.PARTS)
def test_a_checkpoint_with_a_part_of_the_wrong_type_is_refused(data: str, tmp_path: Path, name: str) -> None:
    config = dataclasses.replace(TINY, data=data, epochs=1, checkpoint=str(tmp_path / "run.pt"))
    run(config)
    save_checkpoint(tmp_path / "run.pt", {**load_checkpoint(tmp_path / "run.pt"), name: None})
    with pytest.raises(UserError, match=r"run.pt is not a checkpoint of mlp-fused train$"):
        run(config, epochs=2, resume=True)


def test_weights_of_other_shapes_are_refused(data: str, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, data=data, epochs=1, checkpoint=str(tmp_path / "run.pt"))
    run(config)
    saved = load_checkpoint(tmp_path / "run.pt")
    saved["model"]["network.0.weight"] = torch.zeros(9, 6)
    save_checkpoint(tmp_path / "run.pt", saved)
    with pytest.raises(UserError, match=r"run.pt does not fit this network: "):
        run(config, epochs=2, resume=True)


def fail_midway(save: Callable[..., None], error: BaseException) -> Callable[..., None]:
    def torch_save(checkpoint: object, file: Any) -> None:
        file.write(b"half a checkpoint")
        raise error

    return torch_save


def fail(_: Callable[..., None], error: BaseException) -> Callable[..., None]:
    def replace(*arguments: object) -> None:
        raise error

    return replace


@pytest.mark.parametrize(
    ("module", "name", "how"),
    [(torch, "save", fail_midway), (os, "fsync", fail), (os, "replace", fail)],
    ids=["save", "fsync", "replace"],
)
@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed"), KeyboardInterrupt()],
    ids=lambda error: type(error).__name__,
)
def test_a_failed_write_leaves_the_old_checkpoint(
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    how: Callable[..., Any],
    error: BaseException,
) -> None:
    config = dataclasses.replace(TINY, data=data, checkpoint=str(tmp_path / "run.pt"))
    run(config, epochs=1)
    before = (tmp_path / "run.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(module, name, how(getattr(module, name), error))
        with pytest.raises((UserError, KeyboardInterrupt)) as caught:
            run(config, resume=True)
    assert (tmp_path / "run.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.npz", "run.pt"]
    if isinstance(error, KeyboardInterrupt):
        assert "is the last checkpoint, after epoch 1" in str(caught.value)
    else:
        assert f"cannot write the checkpoint {tmp_path / 'run.pt'}: {error}; the old file" in str(caught.value)
    assert len(run(config, resume=True).history) == 3


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """A limit on the size of files makes torch.save fail as a full disk does."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(UserError, match=r"^cannot write the checkpoint .*run.pt: \[Errno 27\] File too large; the"):
            save_checkpoint(tmp_path / "run.pt", {"model": torch.zeros(2**20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_at_a_link_replaces_the_target(tmp_path: Path) -> None:
    link, target = tmp_path / "link.pt", tmp_path / "target.pt"
    target.write_bytes(b"old")
    link.symlink_to(target)
    save_checkpoint(link, {"epoch": 1})
    assert link.is_symlink()
    assert torch.load(target, weights_only=True) == {"epoch": 1}


def test_a_checkpoint_has_the_permissions_of_any_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    save_checkpoint(tmp_path / "run.pt", {})
    assert (tmp_path / "run.pt").stat().st_mode == (tmp_path / "other").stat().st_mode


class Interrupted(nn.Module):
    """A network in whose nth call Ctrl-C is pressed."""

    def __init__(self, network: nn.Module, calls: int) -> None:
        super().__init__()
        self.network = network
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        self.calls -= 1
        if self.calls == 0:
            raise KeyboardInterrupt
        return self.network(x)


@pytest.mark.parametrize(
    ("calls", "checkpoint", "sentence"),
    [  # an epoch calls the network 4 + 1 times
        (2, True, r"stopped before the end of the first epoch; no checkpoint was written to .*run.pt"),
        (5, True, r"stopped before the end of the first epoch; no checkpoint was written to .*run.pt"),
        (
            6,
            True,
            r"stopped; .*run.pt is the last checkpoint, after epoch 1; add --resume to the same command to continue",
        ),
        (
            15,
            True,
            r"stopped; .*run.pt is the last checkpoint, after epoch 2; add --resume to the same command to continue",
        ),
        (6, False, r"stopped; no checkpoint was saved \(use --checkpoint FILE\)"),
    ],
)
def test_ctrl_c(data: str, tmp_path: Path, calls: int, checkpoint: bool, sentence: str) -> None:
    path = tmp_path / "run.pt"
    config = dataclasses.replace(TINY, data=data, checkpoint=str(path) if checkpoint else None)

    def build(calls: int) -> Callable[..., nn.Module]:
        return lambda *arguments: Interrupted(build_model(*arguments), calls)

    with pytest.raises(KeyboardInterrupt, match=f"^{sentence}$"):
        train(config, build=build(calls), report=quiet)
    assert path.exists() is (checkpoint and calls > 5)
    if path.exists():
        resumed = train(dataclasses.replace(config, resume=True), build=build(-1), report=quiet)
        assert_same_bits(resumed, train(dataclasses.replace(config, checkpoint=None), build=build(-1), report=quiet))
