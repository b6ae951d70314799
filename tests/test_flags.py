"""mlp_fused/flags.py: a Config's fields are checked by their types, and hold Python's own numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from trainings import TINY, run, write_data

from mlp_fused.checkpoint import load_checkpoint
from mlp_fused.errors import UserError
from mlp_fused.train.config import Config as Train
from mlp_fused.train.predict import Config as Predict
from mlp_fused.transfer.config import Config as Transfer
from mlp_fused.tune.config import Config as Tune

GIVEN: dict[str, tuple[Any, Any]] = {
    "train": (
        Train(
            hidden=np.array([8, 4]),
            epochs=np.int64(3),
            batch_size=torch.tensor(16),
            dropout=np.float32(0.5),
            lr=torch.tensor(0.25),
            seed=np.uint8(7),
            activation=np.str_("relu"),
            optimizer=np.str_("sgd"),
        ),
        Train(hidden=(8, 4), epochs=3, batch_size=16, dropout=0.5, lr=0.25, seed=7, activation="relu", optimizer="sgd"),
    ),
    "train paths": (Train(data=Path("x.npz"), checkpoint=Path("c.pt")), Train(data="x.npz", checkpoint="c.pt")),
    "train numpy bool": (Train(checkpoint="c.pt", resume=np.True_), Train(checkpoint="c.pt", resume=True)),
    "train tensor bool": (Train(resume=torch.tensor(False)), Train(resume=False)),
    "train device": (Train(device=torch.device("cpu")), Train(device="cpu")),
    "train function": (Train(activation=torch.relu), Train(activation="relu")),
    "train class": (Train(activation=nn.SiLU), Train(activation="silu")),
    "train module": (Train(activation=nn.LeakyReLU()), Train(activation="leaky_relu")),
    "predict": (
        Predict(Path("c.pt"), Path("x.npz"), Path("o.csv")),
        Predict("c.pt", "x.npz", "o.csv"),
    ),
    "train tensor": (Train(hidden=torch.tensor([8, 4])), Train(hidden=(8, 4))),
    "train list": (Train(hidden=[8, np.int32(4)]), Train(hidden=(8, 4))),
    "transfer": (
        Transfer(dims=torch.tensor([4, 3]), batch=np.arange(8, 24, 8)),
        Transfer(dims=(4, 3), batch=(8, 16)),
    ),
    "tune": (
        Tune(dims=np.array([[4, 3], [5, 2]]), batch=np.array([8]), minutes=np.float32(0.5)),
        Tune(dims=((4, 3), (5, 2)), batch=(8,), minutes=0.5),
    ),
    "tune without dims": (Tune(dims=None), Tune()),
}


def kinds(value: Any) -> Any:
    return (type(value), [kinds(element) for element in value]) if isinstance(value, tuple) else type(value)


@pytest.mark.parametrize("name", GIVEN)
def test_numbers_of_numpy_and_torch_are_stored_as_pythons_own(name: str) -> None:
    given, expected = GIVEN[name]
    assert given == expected
    for field in dataclasses.fields(given):
        assert kinds(getattr(given, field.name)) == kinds(getattr(expected, field.name)), field.name


def test_a_config_of_numpy_numbers_trains_and_reloads(tmp_path: Path) -> None:
    path = str(tmp_path / "run.pt")
    for width, rate in zip(np.arange(4, 12, 4), np.geomspace(0.01, 0.001, 2)):
        run(TINY, data=write_data(tmp_path), hidden=(width,), lr=rate, epochs=np.int64(1), checkpoint=path)
        assert load_checkpoint(path)["config"]["hidden"] == [width]


def test_a_config_of_paths_and_modules_trains_and_reloads(tmp_path: Path) -> None:
    config: Any = {"data": Path(write_data(tmp_path)), "checkpoint": tmp_path / "run.pt", "activation": nn.SiLU}
    run(TINY, **config, resume=np.False_, epochs=1)
    assert load_checkpoint(tmp_path / "run.pt")["config"]["activation"] == "silu"
    assert len(run(TINY, **config, resume=np.True_, epochs=2).history) == 2


MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "half a row": (lambda: Train(batch_size=8.5), "--batch-size is 8.5; it needs to be a whole number"),
    "bool": (lambda: Train(epochs=True), "--epochs is True; it needs to be a whole number"),
    "numpy bool": (lambda: Train(epochs=np.bool_(True)), "--epochs is .*True.*; it needs to be a whole number"),
    "None": (lambda: Train(epochs=None), "--epochs is None; it needs to be a whole number"),
    "text": (lambda: Train(lr="fast"), "--lr is 'fast'; it needs to be a number"),
    "dropout bool": (
        lambda: Train(dropout=torch.tensor(True)),
        r"--dropout is tensor\(True\); it needs to be a number",
    ),
    "one width": (lambda: Train(hidden=8), "--hidden is 8; it needs to be a sequence"),
    "an array of one": (lambda: Train(hidden=np.array(8)), r"--hidden is array\(8\); it needs to be a sequence"),
    "text for widths": (lambda: Train(hidden="512"), "--hidden is '512'; it needs to be a sequence"),
    "float widths": (lambda: Transfer(dims=(4.0, 3)), "--dims is 4.0; it needs to be a whole number"),
    "rows": (lambda: Transfer(batch=np.array([0.5])), "--batch is .*0.5.*; it needs to be a whole number"),
    "a network": (lambda: Tune(dims=(4, 3)), "--dims is 4; it needs to be a sequence"),
    "choice": (lambda: Train(optimizer="adamw"), "--optimizer is adamw; it needs to be one of adam, sgd"),
    "resume": (lambda: Train(resume=1), "--resume is 1; it needs to be True or False"),
    "path": (lambda: Train(data=3), "--data is 3; it needs to be text"),
    "no path": (lambda: Predict(None, "x.npz", "o.csv"), "--checkpoint is None; it needs to be text"),
    "bytes": (lambda: Train(data=b"x.npz"), "--data is b'x.npz'; it needs to be text"),
    "activation": (lambda: Train(activation=torch.fft.fft), "--activation is .*; it needs to be one of: identity, "),
    "no activation": (lambda: Train(activation=3), "--activation is int; it needs to be a name, "),
    "parameters": (
        lambda: Train(activation=nn.LeakyReLU(0.2)),
        r"--activation is leaky_relu\(negative_slope=0.2\), but a checkpoint stores only a name; it needs its default "
        r"parameters, leaky_relu\(negative_slope=0.01\), or a name added with register_activation$",
    ),
    "choices": (lambda: Tune(dims=((4, 3),), dtype=("fp8",)), "--dtype is fp8; it needs to be one of fp32, tf32, bf16"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_value_of_the_wrong_type_gives_one_sentence(name: str) -> None:
    make, sentence = MISTAKES[name]
    with pytest.raises(UserError, match=f"^{sentence}"):
        make()
