"""Regression: a squared error on scaled targets, with scores in the units of the targets."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score
from torch import nn

from mlp_fused.checkpoint import load_checkpoint
from mlp_fused.errors import UserError
from mlp_fused.train.config import Config, build_torch_model
from mlp_fused.train.data import Data, load_data, split
from mlp_fused.train.distributed import Processes
from mlp_fused.train.loop import Result, evaluate, train
from mlp_fused.train.predict import load_model
from mlp_fused.train.tasks import Classification, Epoch, Regression, make_task, squared_errors

SMALL = Config(task="regression", hidden=(16,), epochs=10, batch_size=16, lr=0.02)
SHAPES = {"(N,)": (), "(N, 1)": (1,), "(N, 2)": (2,)}


def write(path: Path, shape: tuple[int, ...] = (), offset: float = 0.0, unit: float = 1.0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    x = random.normal(size=(100, 3)).round(4)
    y = np.stack([np.sin(x[:, 0]) + x[:, 1], 1000 * (x[:, 2] - x[:, 0])], axis=1).round(4)
    y = y.reshape(100, 2)[:, : max(1, *shape, 1)].reshape(100, *shape) * unit + offset
    np.savez(path / "data.npz", x=x, y=y)
    return {"x": x, "y": y}


def run(path: Path, lines: list[str] | None = None, **changes: Any) -> Result:
    config = dataclasses.replace(SMALL, data=str(path / "data.npz"), **changes)
    return train(config, report=lambda text: None if lines is None else lines.append(text))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_r2_and_rmse_are_in_the_units_of_the_targets(tmp_path: Path, shape: tuple[int, ...]) -> None:
    arrays = write(tmp_path, shape)
    lines: list[str] = []
    result = run(tmp_path, lines)
    training_rows, rows = (part.numpy() for part in split(100, 0.2, 0))
    values = result.model(torch.from_numpy(arrays["x"])).detach().numpy()
    targets = arrays["y"].reshape(100, -1)
    assert values.dtype == np.float64
    epoch = result.history[-1]
    assert epoch.r2 == pytest.approx(r2_score(targets[rows], values[rows]), abs=1e-5)
    rmse = np.sqrt(((values - targets)[rows] ** 2).mean(axis=0))
    assert epoch.rmse == pytest.approx(tuple(rmse), rel=1e-4)
    assert epoch.accuracy is None
    assert result.r2 == epoch.r2 > 0.6
    alone = np.sqrt(((targets[rows] - targets[training_rows].mean(axis=0)) ** 2).mean(axis=0))

    def shown(numbers: Any) -> str:
        return ", ".join(f"{number:.4g}" for number in numbers)

    assert lines[-1] == (
        f"validation R²: {epoch.r2:.4f}, RMSE: {shown(epoch.rmse)} "
        f"(always predicting the mean of the training rows: RMSE {shown(alone)})"
    )
    assert lines[0].endswith(
        f"3 features, {len(rmse)} target{'s' * (len(rmse) != 1)}, 80 training rows, 20 validation rows"
    )
    assert sum(bool(re.match(r"epoch .* validation loss \S+  R² \S+  RMSE ", line)) for line in lines) == 10


@pytest.mark.parametrize("offset", [1.7e9, -5e6, 2**40], ids=str)
def test_targets_far_from_zero_cost_no_accuracy(tmp_path: Path, offset: float) -> None:
    write(tmp_path)
    near = run(tmp_path)
    write(tmp_path, offset=offset)
    far = run(tmp_path)
    assert far.losses == pytest.approx(near.losses, rel=1e-3)
    assert far.r2 == pytest.approx(near.r2, abs=1e-3)
    assert far.history[-1].rmse == pytest.approx(near.history[-1].rmse, rel=1e-3)


@pytest.mark.parametrize("dtype", ["f4", "i8", "u2", "f2"])
def test_targets_of_any_dtype(tmp_path: Path, dtype: str) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(100, 2))
    np.savez(tmp_path / "data.npz", x=x, y=(100 + 20 * x.sum(axis=1)).astype(dtype))
    assert run(tmp_path, epochs=20).r2 > 0.9


def test_the_loss_is_the_mean_squared_error_of_scaled_targets(tmp_path: Path) -> None:
    """Compare with a plain training loop on targets with mean 0 and variance 1."""
    arrays = write(tmp_path, (2,))
    result = run(tmp_path, epochs=1, batch_size=1000)
    rows = split(100, 0.2, 0)[0].numpy()
    y = arrays["y"][rows]
    scaled = torch.from_numpy((y - y.mean(axis=0)) / y.std(axis=0)).float()
    torch.manual_seed(0)
    network = build_torch_model(3, 2, SMALL)
    x = result.scaling(torch.from_numpy(arrays["x"][rows]))
    assert result.losses == pytest.approx([nn.functional.mse_loss(network(x), scaled).item()], rel=1e-5)


def test_the_kernels_train_like_torch(tmp_path: Path) -> None:
    write(tmp_path, (2,))
    ours = run(tmp_path, epochs=2, backend="triton")
    twin = train(
        dataclasses.replace(SMALL, epochs=2, data=str(tmp_path / "data.npz")),
        build=build_torch_model,
        report=lambda text: None,
    )
    assert ours.losses == pytest.approx(twin.losses, rel=0, abs=1e-4)


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.3}, {"dtype": "bf16"}], ids=str)
def test_a_resumed_regression_equals_an_uninterrupted_one(tmp_path: Path, changes: dict[str, Any]) -> None:
    write(tmp_path, (2,), offset=1e6)
    whole = run(tmp_path, epochs=4, **changes)
    path = str(tmp_path / "run.pt")
    first = run(tmp_path, epochs=2, checkpoint=path, **changes)
    second = run(tmp_path, epochs=4, checkpoint=path, resume=True, **changes)
    assert first.losses + second.losses == whole.losses
    assert second.history == whole.history
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


def test_the_saved_model_scales_back(tmp_path: Path) -> None:
    arrays = write(tmp_path, (2,), offset=1.7e9)
    path = str(tmp_path / "run.pt")
    result = run(tmp_path, epochs=2, checkpoint=path)
    saved = load_checkpoint(path)
    assert list(saved["model"])[-2:] == ["unscaling.mean", "unscaling.scale"]
    assert saved["data"]["targets"] == 2
    assert saved["data"]["shape"] == [2]
    model = load_model(path)
    assert [name for name, _ in model.named_children()] == ["scaling", "network", "unscaling"]
    x = torch.from_numpy(arrays["x"])
    assert torch.equal(model(x), result.model(x))
    assert torch.allclose(model.half()(x), result.model(x), rtol=0, atol=20)  # the values' deviation is 1400


@pytest.mark.parametrize(("begun", "resumed"), [("classification", "regression"), ("regression", "classification")])
def test_another_task_refuses_to_resume(tmp_path: Path, begun: Any, resumed: Any) -> None:
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).normal(size=(40, 2)), y=np.arange(40) % 2)
    path = tmp_path / "run.pt"
    run(tmp_path, epochs=1, task=begun, checkpoint=str(path))
    before = path.read_bytes()
    with pytest.raises(UserError) as caught:
        run(tmp_path, epochs=2, task=resumed, checkpoint=str(path), resume=True)
    assert str(caught.value) == f"{path} is from another run: --task is {resumed}, but needs to be {begun}"
    assert path.read_bytes() == before


def test_another_task_is_named_before_the_targets_are_checked(tmp_path: Path) -> None:
    write(tmp_path)
    run(tmp_path, epochs=1, checkpoint=str(tmp_path / "run.pt"))
    with pytest.raises(UserError, match="--task is classification, but needs to be regression$"):
        run(tmp_path, task="classification", checkpoint=str(tmp_path / "run.pt"), resume=True)


def test_other_values_of_the_same_sizes(tmp_path: Path) -> None:
    arrays = write(tmp_path)
    run(tmp_path, epochs=1, checkpoint=str(tmp_path / "run.pt"))
    arrays["y"][0] += 1e-9
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(UserError, match="100 rows, 3 features, 1 target with other values$"):
        run(tmp_path, checkpoint=str(tmp_path / "run.pt"), resume=True)


class OneOfTwo(Processes):
    """A process whose peer has 20 rows, with squared errors 1 and 3 per row and a loss of 2."""

    def sum(self, values: Sequence[float]) -> list[float]:
        return [here + there for here, there in zip(values, (40.0, 20.0, 60.0, 20.0), strict=True)]


def test_a_process_without_validation_rows_adds_nothing() -> None:
    alone = OneOfTwo(torch.device("cpu"), 0, 2)
    actual = evaluate(nn.Identity(), [], nn.MSELoss(), alone, "fp32", squared_errors, 2)
    assert actual == (2.0, 1.0, 3.0)


def test_targets_that_do_not_vary(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).normal(size=(40, 2)), y=np.full(40, 0.1))
    lines: list[str] = []
    result = run(tmp_path, lines)
    assert lines[1] == "y has only one value (column 0, counted from 0), so there is nothing to learn"
    assert result.history[-1].rmse[0] < 0.1
    assert result.r2 in (0.0, 1.0)


def test_make_task_follows_the_data(tmp_path: Path) -> None:
    write(tmp_path)
    rows = split(100, 0.2, 0)
    assert isinstance(make_task(load_data(str(tmp_path / "data.npz"), "regression"), *rows), Regression)
    np.savez(tmp_path / "data.npz", x=np.ones((100, 2)), y=np.arange(100) % 2)
    assert isinstance(make_task(load_data(str(tmp_path / "data.npz")), *rows), Classification)


def test_the_task_stays_on_the_cpu_when_the_model_moves() -> None:
    y = torch.arange(20.0)[:, None]
    task = make_task(Data("d", torch.ones(20, 1), y, shape=()), torch.arange(15), torch.arange(15, 20))
    expected = task.epoch(1.0, 1.0, [0.25])
    assert task.unscaling
    task.unscaling.to("meta")
    assert task.epoch(1.0, 1.0, [0.25]) == expected
    assert expected.rmse[0] == pytest.approx(0.5 * float(y[:15].std(correction=0)))


def test_a_long_list_of_targets_is_shortened() -> None:
    y = torch.arange(60.0).reshape(20, 3).repeat(1, 3) * torch.tensor([1.0, 1e6, 1e20] * 3)
    task = make_task(Data("d", torch.ones(20, 1), y, shape=(9,)), torch.arange(15), torch.arange(15, 20))
    text = task.describe(Epoch(1.0, 1.0, r2=0.5, rmse=tuple([0.5, 123456.7, 1e20] * 3)))
    assert text == "R² 0.5000  RMSE 0.5, 123,457, 1e+20, 0.5, 123,457, ..."
