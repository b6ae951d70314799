"""The state of a training run: save it in a checkpoint, restore it, check that a checkpoint is from the same run."""

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
    """Everything that the next epoch depends on, except the data and the settings.

    The loop draws random numbers only from `order` and from PyTorch's generators, which `checkpoint` includes.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    order: torch.Generator
    processes: Processes
    history: list[Epoch] = field(default_factory=list)

    def checkpoint(self) -> dict[str, Any]:
        """Return the parts of a checkpoint, as plain types and tensors. All processes call it."""
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
        """Restore the state from a checkpoint. A process that the checkpointed run did not have keeps its own seed.

        Raises:
            UserError: the checkpoint belongs to another network, or is damaged.
        """
        device = self.processes.device
        on_gpu = device.type == "cuda"
        try:
            self.model.load_state_dict(checkpoint["model"])
            for group in checkpoint["optimizer"]["param_groups"]:
                group["fused"] = on_gpu  # the checkpoint may come from another device
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
    """Raise a UserError if the settings differ from the checkpoint's, except for those in `MAY_CHANGE`."""
    given, needed = run_settings(config), checkpoint["config"]
    differences = [
        f"{flag(name)} is {shown(value)}, but needs to be {shown(needed.get(name))}"
        for name, value in given.items()
        if name not in MAY_CHANGE and value != needed.get(name)
    ]
    if differences:
        raise UserError(f"{config.checkpoint} is from another run: {'; '.join(differences)}")


def check_same_data(checkpoint: dict[str, Any], config: Config, data: Data) -> None:
    """Raise a UserError if the data are not those of the checkpoint's run."""
    given = data.format_1_description if checkpoint["format"] == 1 else data.description
    needed = checkpoint["data"]
    if given != needed:
        same_sizes = data.sizes == {name: needed.get(name) for name in data.sizes}
        raise UserError(
            f"{config.checkpoint} is from another run: --data has {_sizes(given)}, but needs {_sizes(needed)}"
            + " with other values" * same_sizes
        )


def _sizes(description: Mapping[str, Any]) -> str:
    nouns = {"rows": "row", "features": "feature", "classes": "class", "targets": "target"}
    sizes = ((description[name], name, noun) for name, noun in nouns.items() if name in description)
    return ", ".join(f"{size} {noun if size == 1 else name}" for size, name, noun in sizes)


def run_settings(config: Config) -> dict[str, Any]:
    """Return the settings as types that `torch.load(weights_only=True)` reads, with the actual learning rate."""
    return {**dataclasses.asdict(config), "hidden": list(config.hidden), "lr": config.learning_rate}
