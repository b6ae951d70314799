"""All that a run depends on: what a checkpoint holds of it, and whether a checkpoint is of the same run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError, first_line
from ..flags import flag, shown
from .config import MAY_CHANGE, Config
from .data import Data
from .distributed import Processes
from .tasks import Epoch


@dataclass
class State:
    """All that the next epoch depends on, data and configuration apart. The loop draws no other random numbers."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    order: torch.Generator
    processes: Processes
    history: list[Epoch] = field(default_factory=list)

    def checkpoint(self) -> dict[str, Any]:
        device = self.processes.device
        random = {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": len(self.history),
            "random": {"order": self.order.get_state(), "processes": self.processes.gather(random)},
            "history": [dataclasses.asdict(epoch) for epoch in self.history],
        }

    def restore(self, checkpoint: dict[str, Any], path: Path | None) -> None:
        """Put everything back as `checkpoint()` found it; a process that was not there then keeps the seed it has.

        Raises:
            UserError: the checkpoint is of another network, or damaged.
        """
        device = self.processes.device
        on_gpu = device.type == "cuda"
        try:
            self.model.load_state_dict(checkpoint["model"])
            for group in checkpoint["optimizer"]["param_groups"]:
                group["fused"] = on_gpu  # the device may be another one now
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.scaler.load_state_dict(checkpoint["scaler"])
            for random in checkpoint["random"]["processes"][self.processes.rank :][:1]:
                torch.set_rng_state(random["torch"])
                if on_gpu and random["cuda"] is not None:
                    torch.cuda.set_rng_state(random["cuda"], device)
            self.order.set_state(checkpoint["random"]["order"])
            self.history = [Epoch(**epoch) for epoch in checkpoint["history"]]
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{path} does not fit this network: {first_line(error)}") from None


def check_same_run(checkpoint: dict[str, Any], config: Config) -> None:
    """Refuse to carry on with another network, another task, or another course of training."""
    told, needed = run_settings(config), checkpoint["config"]
    differences = [
        f"{flag(name)} is {shown(value)}, it needs {shown(needed.get(name))}"
        for name, value in told.items()
        if name not in MAY_CHANGE and value != needed.get(name)
    ]
    if differences:
        raise UserError(f"{config.checkpoint} is the checkpoint of another run: {'; '.join(differences)}")


def check_same_data(checkpoint: dict[str, Any], config: Config, data: Data) -> None:
    """Refuse to carry on with other data."""
    now = data.description_of_format_1 if checkpoint["format"] == 1 else data.description
    then = checkpoint["data"]
    if now != then:
        same_sizes = data.sizes == {name: then.get(name) for name in data.sizes}
        raise UserError(
            f"{config.checkpoint} is the checkpoint of another run: --data has {_sizes(now)}, it needs {_sizes(then)}"
            + " of other values" * same_sizes
        )


def _sizes(description: Mapping[str, Any]) -> str:
    nouns = {"rows": "row", "features": "feature", "classes": "class", "targets": "target"}
    sizes = ((description[name], name, noun) for name, noun in nouns.items() if name in description)
    return ", ".join(f"{size} {noun if size == 1 else name}" for size, name, noun in sizes)


def run_settings(config: Config) -> dict[str, Any]:
    """The configuration in types that weights_only reads, the learning rate filled in."""
    return {**dataclasses.asdict(config), "hidden": list(config.hidden), "lr": config.learning_rate}
