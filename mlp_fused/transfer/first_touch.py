"""The cost of the first call alone: the steps from a bare process to a network's first output, in order.

A process has its context, its handles and its kernels once, so this is measured in processes of its own:
`python -m mlp_fused.transfer.first_touch FILE` reads a pickled (model, batch) and prints one line of JSON,
seconds by name.
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
    """Milliseconds by the host's clock, the device waited for, each step done for the first time in its process.

    Attributes:
        context: creating the context on the GPU.
        allocation: memory for the batch.
        copy: the batch into it, from pageable memory.
        launch: a kernel of torch's, its library loaded.
        compiled: the network's first forward, Triton's cache on disk empty.
        loaded: the same with the kernels in that cache.
        again: the same for the second time.
    """

    context: float
    allocation: float
    copy: float
    launch: float
    compiled: float
    loaded: float
    again: float


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Host seconds until `function` is done, the device included, and what it returned."""
    begun = time.perf_counter()
    result = function()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - begun, result


def first_touch(model: nn.Module, batch: Sequence[Tensor]) -> dict[str, float]:
    """Seconds by name, in this process, which has not touched the GPU before; names that end in _2 are a second time.

    The model is left on the GPU; `forward` is its first call, the kernels compiled or loaded from Triton's cache.
    """
    found: dict[str, float] = {}

    def context() -> None:
        torch.cuda.init()
        torch.cuda.synchronize()

    def allocate() -> list[Tensor]:
        return [torch.empty_like(tensor, device="cuda") for tensor in batch]

    def copy(there: list[Tensor]) -> None:
        for target, source in zip(there, batch):
            target.copy_(source)

    found["context"], _ = seconds(context)
    for again in ("", "_2"):
        found["allocation" + again], there = seconds(allocate)
        found["copy" + again], _ = seconds(partial(copy, there))
        found["launch" + again], _ = seconds(partial(there[0].fill_, 1))
        del there
        torch.cuda.empty_cache()  # or the second allocation would be a look into torch's own cache
    here, model = [tensor.cuda() for tensor in batch], model.cuda()
    with torch.no_grad():
        for again in ("", "_2"):
            found["forward" + again], _ = seconds(partial(model, *here))
    return found


def in_fresh_processes(
    model: nn.Module, batch: Sequence[Tensor], device: torch.device, run: Callable[..., Any] = run_json
) -> FirstTouch:
    """The times of two processes: Triton's cache empty, then filled. Only `compiled` is the first's.

    Raises:
        RuntimeError: the model cannot be pickled, or a process failed; says why.
    """
    own = next((type(module) for module in model.modules() if type(module).__module__ == "__main__"), None)
    if own is not None:
        raise RuntimeError(
            f"{own.__name__} is defined in the script that runs, which a fresh process cannot import; define it in a "
            "module of its own"
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.pt")
        try:
            torch.save((model, list(batch)), file)
        except Exception as error:  # pickle answers what it cannot write with errors of many classes
            raise RuntimeError(f"the model cannot be pickled: {error}") from None
        # One GPU is seen, by the number that it has among those that this process sees.
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        index = device.index or 0
        environment = {
            **os.environ,
            "TRITON_CACHE_DIR": str(Path(folder, "cache")),
            "CUDA_VISIBLE_DEVICES": str(index) if seen is None else seen.split(",")[index],
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # for the model's own classes
        }
        cold, warm = (run("mlp_fused.transfer.first_touch", str(file), environment=environment) for _ in range(2))
    steps = {name: 1e3 * warm[name] for name in ("context", "allocation", "copy", "launch")}
    return FirstTouch(
        **steps, compiled=1e3 * cold["forward"], loaded=1e3 * warm["forward"], again=1e3 * warm["forward_2"]
    )


def main() -> None:
    model, batch = torch.load(sys.argv[1], map_location="cpu", weights_only=False)  # the parent's own file
    print(json.dumps(first_touch(model, batch)))


if __name__ == "__main__":
    main()
