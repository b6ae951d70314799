"""The network that a training configuration describes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from trainings import TINY, run, write_data

from mlp_fused import FusedMLP
from mlp_fused.train.config import Config, build_model, build_torch_model


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_data(tmp_path)


def test_the_model_is_fused_mlp_with_no_dropout_on_the_logits() -> None:
    model = build_model(6, 3, Config(hidden=(8, 4), activation="silu", dropout=0.5, backend="reference"))
    assert isinstance(model, FusedMLP)
    assert model.backend == "reference"
    kinds = [nn.Linear, nn.SiLU, nn.Dropout, nn.Linear, nn.SiLU, nn.Dropout, nn.Linear]
    assert [type(child) for child in model] == kinds
    assert model[2].p == 0.5
    assert model(torch.randn(5, 6)).shape == (5, 3)


def test_no_hidden_layer_is_a_linear_classifier(data: str) -> None:
    assert [type(child) for child in run(TINY, data=data, hidden=()).network.children()] == [nn.Linear]


def test_the_torch_twin_starts_from_the_same_parameters() -> None:
    torch.manual_seed(1)
    ours = build_model(6, 3, TINY)
    torch.manual_seed(1)
    twin = build_torch_model(6, 3, TINY)
    assert type(twin) is nn.Sequential  # FusedMLP is a subclass of it
    assert [repr(child) for child in twin.children()] == [repr(child) for child in ours.children()]
    for key, value in ours.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key])
