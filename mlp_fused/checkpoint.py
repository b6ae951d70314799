"""Checkpoint files of `mlp-fused train`: written whole, read without running anything, and made a model again.

Format 2 holds the state_dict of Sequential(scaling, network), for regression with an unscaling behind, so that the
model takes features as they are in the data's file. Format 1, which has no number, held the network's alone, and beside
it the mean and scale of features in float32. It is read as what format 2 would have been.
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
from .scaling import Scaling, Unscaling, whole

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

# A checkpoint's parts, and their types. "rounded": whether features are rounded to float32 before they are scaled, as
# they were for format 1. "data" describes the data (`Data.description`), "history" has each epoch's losses and quality.
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
    """Write the file whole or not at all: whatever happens meanwhile, `path` holds the old checkpoint or the new one.

    Raises:
        UserError: it cannot be written; the old one is still there.
    """
    try:
        write_whole(path, lambda file: torch.save(dict(checkpoint), file))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        where = Path(path).resolve()
        raise UserError(
            f"cannot write the checkpoint {where}: {first_line(error)}; what was there before is as it was"
        ) from error


def check_checkpoint(path: Path) -> None:
    """Find out before hours of training, and not after them, that no checkpoint can be written.

    Raises:
        UserError: nothing can be written there, or what would be replaced is no checkpoint.
    """
    check_writable(path, "--checkpoint")
    if path.exists():
        try:
            load_checkpoint(path)
        except UserError as error:
            raise UserError(f"{error}, so it will not be overwritten") from None


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """`PARTS` as `save_checkpoint` wrote them, on the CPU; nothing in the file is executed.

    A file of format 1 comes with the parts of format 2, and keeps its number: its digest of the data is of format 1.

    Raises:
        UserError: there is no such file, or it is not one of ours.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except Exception as error:  # a file of another kind: pickle's, zipfile's and torch's own errors
        raise UserError(f"{path} cannot be read as a checkpoint: {first_line(error)}") from None
    if isinstance(checkpoint, dict):
        number = checkpoint.get("format", 1)
        if isinstance(number, int) and number > FORMAT:
            raise UserError(
                f"{path} is a checkpoint of format {number}, and this mlp_fused reads up to {FORMAT}; "
                "upgrade mlp_fused to read it"
            )
        if "format" not in checkpoint:
            checkpoint = _from_format_1(checkpoint)
    if not isinstance(checkpoint, dict) or any(
        not isinstance(checkpoint.get(name), kind) for name, kind in PARTS.items()
    ):
        raise UserError(f"{path} is not a checkpoint of mlp-fused train")
    return checkpoint


def _from_format_1(old: dict[str, Any]) -> dict[str, Any] | None:
    """The parts of format 2; None if the old ones are of other kinds."""
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
    """The scaling of features that the network of a checkpoint was trained with.

    Raises:
        UserError: the checkpoint has none.
    """
    try:
        mean, scale, remainder = (checkpoint["model"][f"scaling.{name}"] for name in ("mean", "scale", "remainder"))
        return Scaling(mean, scale, remainder, torch.float32 if checkpoint["rounded"] else None)
    except (KeyError, AttributeError):
        raise UserError(f"{path} is not a checkpoint of mlp-fused train") from None


# features, outputs, the settings of `mlp-fused train` by name -> the network
Build = Callable[[int, int, Mapping[str, Any]], nn.Module]


def build_network(features: int, outputs: int, settings: Mapping[str, Any]) -> FusedMLP:
    """The network of `mlp-fused train`: x (M, features) -> (M, outputs), by its settings.

    Reads `hidden`, `activation`, `dropout` and `backend`. Raises what FusedMLP raises.
    """
    model = FusedMLP(
        features,
        [*settings["hidden"], outputs],
        activation_layer=settings["activation"],
        dropout=settings["dropout"],
        backend=settings["backend"],
    )
    del model[-1]  # the Dropout that torchvision's order puts after the last Linear: dropped outputs would be zeros
    return model


def make_model(
    path: str | Path,
    checkpoint: Mapping[str, Any],
    build: Build = build_network,
    backend: Backend | None = "auto",
) -> nn.Sequential:
    """The trained model of a checkpoint that was loaded from `path`, on the CPU and in eval mode.

    A backend of None is the one that trained.

    Raises:
        UserError: the network cannot be made, or is not the one whose parameters the checkpoint has.
    """
    data = checkpoint["data"]
    try:
        settings = {**checkpoint["config"], "checkpoint": None, "resume": False}
        if backend is not None:
            settings["backend"] = backend
        outputs = data["classes"] if data["shape"] is None else data["targets"]
        network = build(data["features"], outputs, settings)
        unscaling = None if data["shape"] is None else Unscaling(torch.zeros(outputs), torch.ones(outputs))
        model = whole(make_scaling(path, checkpoint), network, unscaling)
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} makes no network here: {first_line(error)}") from None
    return model.eval()
