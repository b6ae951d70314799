"""The checkpoint's format: its model, its format number, and files of older versions.

`data/saved/train_format_1.pt` was written at commit 6f8e961, before formats had numbers, by two epochs on the `.npz`
beside it with `--hidden 8 --batch-size 16 --lr 0.02 --dropout 0.1`. The `.json` holds the history of four epochs by
that version, and the network's logits of the first five rows after two epochs. float32 rounds the third feature to
sixteenths.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mlp_fused.checkpoint import FORMAT, load_checkpoint, save_checkpoint
from mlp_fused.errors import UserError
from mlp_fused.train.config import Config, build_torch_model
from mlp_fused.train.data import load_features, split
from mlp_fused.train.loop import train
from mlp_fused.train.predict import load_model, predict
from mlp_fused.transfer import config as transfer_config

SAVED = Path(__file__).parent / "data" / "saved"
OLD = Config(data=str(SAVED / "train_format_1.npz"), hidden=(8,), epochs=4, batch_size=16, lr=0.02, dropout=0.1)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the checkpoint of format 1."""
    return Path(shutil.copy(SAVED / "train_format_1.pt", tmp_path / "run.pt"))


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads((SAVED / "train_format_1.json").read_text())


@pytest.fixture
def new(tmp_path: Path) -> Path:
    """A checkpoint of the current format."""
    path = tmp_path / "new.pt"
    train(dataclasses.replace(OLD, checkpoint=str(path), epochs=1), report=lambda text: None)
    return path


def test_an_old_checkpoint_resumes_with_the_numbers_of_its_version(old: Path, recorded: dict[str, Any]) -> None:
    result = train(dataclasses.replace(OLD, resume=True, checkpoint=str(old)), report=lambda text: None)
    assert len(result.history) == 4
    for epoch, expected in zip(result.history, recorded["history"]):
        assert epoch.loss == pytest.approx(expected["loss"], rel=1e-5)
        assert epoch.validation_loss == pytest.approx(expected["validation_loss"], rel=1e-5)
        assert epoch.accuracy == pytest.approx(expected["accuracy"])
    saved = load_checkpoint(old)
    assert saved["format"] == FORMAT
    assert saved["rounded"] is True
    resumed = train(dataclasses.replace(OLD, resume=True, checkpoint=str(old), epochs=5), report=lambda text: None)
    assert resumed.scaling.rounding == torch.float32


def test_an_old_checkpoint_predicts_raw_features(old: Path, recorded: dict[str, Any]) -> None:
    data = np.load(SAVED / "train_format_1.npz")
    model = load_model(old)
    assert torch.allclose(model(torch.from_numpy(data["x"][:5])), torch.tensor(recorded["logits"]), atol=1e-5)
    rows = split(60, 0.2, 0)[1].numpy()
    labels = predict(old, data["x"]).labels
    assert (labels == data["y"])[rows].mean() == pytest.approx(recorded["history"][1]["accuracy"])


def test_transfer_reads_an_old_checkpoint(old: Path) -> None:
    network = transfer_config._network(transfer_config.Config(checkpoint=str(old)))
    assert [tuple(parameter.shape) for parameter in network.parameters()] == [(8, 3), (8,), (3, 8), (3,)]
    expected = torch.load(old, weights_only=True)["model"]
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())


def test_an_old_checkpoint_refuses_other_data(old: Path, tmp_path: Path) -> None:
    arrays = dict(np.load(SAVED / "train_format_1.npz"))
    arrays["x"][0, 0] += 1
    np.savez(tmp_path / "other.npz", **arrays)
    before = old.read_bytes()
    config = dataclasses.replace(OLD, resume=True, checkpoint=str(old), data=str(tmp_path / "other.npz"))
    with pytest.raises(UserError, match="60 rows, 3 features, 3 classes with other values$"):
        train(config, report=lambda text: None)
    assert old.read_bytes() == before


def test_an_old_checkpoint_counts_as_a_classification(old: Path) -> None:
    with pytest.raises(UserError, match="another run: --task is regression, but needs to be classification$"):
        train(dataclasses.replace(OLD, resume=True, checkpoint=str(old), task="regression"), report=lambda text: None)


def test_the_model_consists_of_the_scaling_and_the_network(new: Path) -> None:
    saved = torch.load(new, weights_only=True)
    assert saved["format"] == FORMAT == 2
    assert list(saved["model"]) == [
        *(f"scaling.{name}" for name in ("mean", "scale", "remainder")),
        *(f"network.{name}" for name in ("0.weight", "0.bias", "3.weight", "3.bias")),
    ]
    assert {saved["model"][f"scaling.{name}"].dtype for name in ("mean", "scale", "remainder")} == {torch.float64}
    model = load_model(new)
    assert type(model) is nn.Sequential
    assert not model.training
    x, _ = load_features(str(SAVED / "train_format_1.npz"))
    twin = load_model(new, build_torch_model)
    assert torch.allclose(twin(x), model(x), atol=1e-6)
    assert torch.equal(model.network(model.scaling(x)), model(x))


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_a_model_in_16_bits_takes_raw_features(new: Path, cast: str) -> None:
    x, _ = load_features(str(SAVED / "train_format_1.npz"))
    model = load_model(new)
    expected = model(x)
    low = getattr(load_model(new), cast)()
    assert torch.allclose(low(x).float(), expected, atol=0.05)


@pytest.mark.parametrize("number", [FORMAT + 1, 99])
def test_a_newer_format_is_named(new: Path, number: int) -> None:
    save_checkpoint(new, {**load_checkpoint(new), "format": number})
    sentence = f"{new} is a checkpoint of format {number}, but this mlp_fused reads formats up to 2; upgrade mlp_fused"
    with pytest.raises(UserError) as caught:
        load_model(new)
    assert str(caught.value) == sentence
    before = new.read_bytes()
    for resume in (True, False):
        with pytest.raises(UserError, match="format"):
            train(dataclasses.replace(OLD, checkpoint=str(new), resume=resume), report=lambda text: None)
    assert new.read_bytes() == before


@pytest.mark.parametrize("part", ["scaling.mean", "network.0.weight"])
def test_a_missing_part_of_a_model_is_named(new: Path, part: str) -> None:
    saved = load_checkpoint(new)
    del saved["model"][part]
    save_checkpoint(new, saved)
    with pytest.raises(
        UserError, match=f"^({new} is not a checkpoint of mlp-fused train|cannot build the network of {new}: )"
    ):
        load_model(new)


@pytest.mark.parametrize("name", ["mean", "scale", "model", "config", "data"])
def test_a_part_of_the_wrong_type_in_an_old_checkpoint_is_named(old: Path, name: str) -> None:
    torch.save({**torch.load(old, weights_only=True), name: None}, old)
    with pytest.raises(UserError, match="is not a checkpoint of mlp-fused train$"):
        load_checkpoint(old)


def test_a_checkpoint_does_not_require_the_backend_that_trained_it(new: Path) -> None:
    saved = load_checkpoint(new)
    saved["config"]["backend"] = "triton"
    save_checkpoint(new, saved)
    assert load_model(new).network.backend == "auto"
    assert transfer_config._network(transfer_config.Config(checkpoint=str(new))).backend == "triton"
