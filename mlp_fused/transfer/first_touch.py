"""Measure the one-time costs of a process on a GPU, from creating the context to the first output of a network.

A process creates its context and loads its kernels only once, so this is measured in new processes.
`python -m mlp_fused.transfer.first_touch FILE` reads a pickled (model, batch) and prints one line of JSON: seconds by
name.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..processes import run_json

__all__ = ["FirstTouch", "first_touch", "in_fresh_processes", "seconds"]


@dataclass(frozen=True)
class FirstTouch:
    """Milliseconds of the first calls in a new process, by the host's clock, until the device is done.

    Attributes:
        context: creating the context on the GPU.
        allocation: allocating memory for the batch.
        copy: copying the batch into it, from pageable memory.
        launch: launching a kernel of PyTorch, which loads its library.
        compiled: the first forward of the network, with an empty Triton cache: kernels are compiled.
        loaded: the first forward with a filled Triton cache: kernels are loaded from disk.
        again: the second forward.
    """

    context: float
    allocation: float
    copy: float
    launch: float
    compiled: float
    loaded: float
    again: float


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Call the function. Return the seconds until the device is done, by the host's clock, and the result."""
    begin = time.perf_counter()
    result = function()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - begin, result


def first_touch(model: nn.Module, batch: Sequence[Tensor]) -> dict[str, float]:
    """Measure the first calls in this process, which must not have used the GPU before. Return seconds by name.

    Names that end in _2 are second calls. "forward" is the first call of the model, which compiles its kernels or loads
    them from Triton's cache. The model stays on the GPU.
    """
    times: dict[str, float] = {}

    def context() -> None:
        torch.cuda.init()
        torch.cuda.synchronize()

    def allocate() -> list[Tensor]:
        return [torch.empty_like(tensor, device="cuda") for tensor in batch]

    def copy(targets: list[Tensor]) -> None:
        for target, source in zip(targets, batch):
            target.copy_(source)

    times["context"], _ = seconds(context)
    for suffix in ("", "_2"):
        times["allocation" + suffix], targets = seconds(allocate)
        times["copy" + suffix], _ = seconds(partial(copy, targets))
        times["launch" + suffix], _ = seconds(partial(targets[0].fill_, 1))
        del targets
        torch.cuda.empty_cache()  # otherwise the second allocation would come from PyTorch's cache
    inputs, model = [tensor.cuda() for tensor in batch], model.cuda()
    with torch.no_grad():
        for suffix in ("", "_2"):
            times["forward" + suffix], _ = seconds(partial(model, *inputs))
    return times


def in_fresh_processes(
    model: nn.Module, batch: Sequence[Tensor], device: torch.device, run: Callable[..., Any] = run_json
) -> FirstTouch:
    """Measure the first calls in two new processes: with an empty Triton cache, then with the filled one.

    Only `compiled` comes from the first process.

    Raises:
        RuntimeError: the model cannot be pickled, or a process failed.
    """
    own = next((type(module) for module in model.modules() if type(module).__module__ == "__main__"), None)
    if own is not None:
        raise RuntimeError(
            f"{own.__name__} is defined in the main script, which a new process cannot import; move it to a module"
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.pt")
        try:
            torch.save((model, list(batch)), file)
        except Exception as error:  # pickle raises many kinds of errors
            raise RuntimeError(f"the model cannot be pickled: {error}") from None
        # The new process sees only this GPU. Its index counts the GPUs that this process sees.
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        index = device.index or 0
        environment = {
            **os.environ,
            "TRITON_CACHE_DIR": str(Path(folder, "cache")),
            "CUDA_VISIBLE_DEVICES": str(index) if seen is None else seen.split(",")[index],
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # to import the classes of the model
        }
        cold, warm = (run("mlp_fused.transfer.first_touch", str(file), environment=environment) for _ in range(2))
    steps = {name: 1e3 * warm[name] for name in ("context", "allocation", "copy", "launch")}
    return FirstTouch(
        **steps, compiled=1e3 * cold["forward"], loaded=1e3 * warm["forward"], again=1e3 * warm["forward_2"]
    )


def main() -> None:
    """Measure in this process, and print the times as JSON."""
    model, batch = torch.load(sys.argv[1], map_location="cpu", weights_only=False)  # a file of our parent process
    print(json.dumps(first_touch(model, batch)))


if __name__ == "__main__":
    main()
