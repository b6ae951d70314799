"""Checkpoint files of `mlp-fused train`: write them atomically, read them without executing code, rebuild the model.

Format 2 has the state_dict of Sequential(scaling, network), or for a regression Sequential(scaling, network,
unscaling). So the model takes features as they are in the data file. Format 1 has the state_dict of the network alone,
and separately the mean and scale of the features in float32; its files have no "format". It is converted when read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .engine.settings import Backend
from .errors import UserError, first_line
from .files import check_writable, write_whole
from .module import FusedMLP
from .scaling import Scaling, Unscaling, join_modules

__all__ = [
    "FORMAT",
    "PARTS",
    "Build",
    "build_network",
    "check_checkpoint",
    "load_checkpoint",
    "make_model",
    "make_scaling",
    "save_checkpoint",
]

FORMAT = 2

# The parts of a checkpoint, and their types. "rounded" is True if features are rounded to float32 before they are
# scaled, as in format 1. "data" is `Data.description`. "history" has the losses and the metrics of each epoch.
PARTS: dict[str, type] = {
    "format": int,
    "model": dict,
    "rounded": bool,
    "optimizer": dict,
    "scaler": dict,
    "epoch": int,
    "random": dict,
    "config": dict,
    "data": dict,
    "history": list,
}


def save_checkpoint(path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically: at any time, `path` has either the whole old file or the whole new one.

    Raises:
        UserError: it cannot be written. The old file is still there.
    """
    try:
        write_whole(path, lambda file: torch.save(dict(checkpoint), file))
    except (OSError, RuntimeError) as error:
        where = Path(path).resolve()
        # torch hides the OSError of a full disk behind a RuntimeError with a line of its source code.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserError(
            f"cannot write the checkpoint {where}: {first_line(reason)}; the old file, if any, is unchanged"
        ) from error


def check_checkpoint(path: Path) -> None:
    """Check, before hours of training, that a checkpoint can be written.

    Raises:
        UserError: `path` cannot be written, or is a file that is not a checkpoint.
    """
    check_writable(path, "--checkpoint")
    if path.exists():
        try:
            load_checkpoint(path)
        except UserError as error:
            raise UserError(f"{error}, so it will not be overwritten") from None


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The parts of a checkpoint (`PARTS`), on the CPU. No code in the file is executed.

    A file of format 1 is converted to the parts of format 2, but its "format" and its digest of the data stay those of
    format 1.

    Raises:
        UserError: there is no such file, or it is not a checkpoint of `mlp-fused train`.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except Exception as error:  # for a file of another kind, pickle, zipfile and torch raise many errors
        why = "it is no file of torch.save" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"{path} cannot be read as a checkpoint: {why}") from None
    if isinstance(checkpoint, dict):
        number = checkpoint.get("format", 1)
        if isinstance(number, int) and number > FORMAT:
            raise UserError(
                f"{path} is a checkpoint of format {number}, but this mlp_fused reads formats up to {FORMAT}; "
                "upgrade mlp_fused"
            )
        if "format" not in checkpoint:
            checkpoint = _from_format_1(checkpoint)
    if not isinstance(checkpoint, dict) or any(
        not isinstance(checkpoint.get(name), kind) for name, kind in PARTS.items()
    ):
        raise UserError(f"{path} is not a checkpoint of mlp-fused train")
    return checkpoint


def _from_format_1(old: dict[str, Any]) -> dict[str, Any] | None:
    """The parts of format 2, from those of format 1; None if these have other types."""
    kinds = {"model": dict, "config": dict, "data": dict, "mean": Tensor, "scale": Tensor}
    if any(not isinstance(old.get(name), kind) for name, kind in kinds.items()):
        return None
    parts = {name: value for name, value in old.items() if name not in ("mean", "scale")}
    scaling = Scaling(old["mean"], old["scale"])
    return {
        **parts,
        "format": 1,
        "model": {
            **scaling.state_dict(prefix="scaling."),
            **{f"network.{name}": value for name, value in old["model"].items()},
        },
        "rounded": True,
        "config": {**old["config"], "task": "classification"},
        "data": {**old["data"], "names": None, "shape": None},
    }


def make_scaling(path: str | Path, checkpoint: Mapping[str, Any]) -> Scaling:
    """Return the scaling of features with which the network of a checkpoint was trained.

    Raises:
        UserError: the checkpoint has no scaling.
    """
    try:
        mean, scale, remainder = (checkpoint["model"][f"scaling.{name}"] for name in ("mean", "scale", "remainder"))
        return Scaling(mean, scale, remainder, torch.float32 if checkpoint["rounded"] else None)
    except (KeyError, AttributeError):
        raise UserError(f"{path} is not a checkpoint of mlp-fused train") from None


# (features, outputs, the settings of `mlp-fused train` by name) -> the network
Build = Callable[[int, int, Mapping[str, Any]], nn.Module]


def build_network(features: int, outputs: int, settings: Mapping[str, Any]) -> FusedMLP:
    """Build the network of `mlp-fused train`: x (M, features) -> y (M, outputs).

    It uses the settings `hidden`, `activation`, `dropout` and `backend`, and raises the errors of `FusedMLP`.
    """
    model = FusedMLP(
        features,
        [*settings["hidden"], outputs],
        activation_layer=settings["activation"],
        dropout=settings["dropout"],
        backend=settings["backend"],
    )
    del model[-1]  # the Dropout after the last Linear, in torchvision's order: it would set outputs to zero
    return model


def make_model(
    path: str | Path,
    checkpoint: Mapping[str, Any],
    build: Build = build_network,
    backend: Backend | None = "auto",
) -> nn.Sequential:
    """Build the trained model of a checkpoint, on the CPU and in eval mode.

    Args:
        path: the file of the checkpoint, for error messages.
        checkpoint: the result of `load_checkpoint`.
        build: a function (features, outputs, settings) -> network.
        backend: the backend of the network; None for the backend of the training.

    Raises:
        UserError: the network cannot be built, or does not fit the parameters in the checkpoint.
    """
    data = checkpoint["data"]
    try:
        settings = {**checkpoint["config"], "checkpoint": None, "resume": False}
        if backend is not None:
            settings["backend"] = backend
        outputs = data["classes"] if data["shape"] is None else data["targets"]
        network = build(data["features"], outputs, settings)
        unscaling = None if data["shape"] is None else Unscaling(torch.zeros(outputs), torch.ones(outputs))
        model = join_modules(make_scaling(path, checkpoint), network, unscaling)
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"cannot build the network of {path}: {first_line(error)}") from None
    return model.eval()
