"""The processes that torchrun starts, and the communication between them. Without torchrun there is one process."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import BatchSampler, Sampler

if TYPE_CHECKING:  # some builds of PyTorch have no torch.distributed
    from torch.distributed.distributed_c10d import Store

__all__ = ["Part", "Processes", "is_first", "is_first_to_fail", "join"]


def _environment() -> tuple[int, int, int]:
    """(rank, world size, local rank), as torchrun sets them."""
    rank, count, local = (int(os.environ.get(name, alone)) for name, alone in _ALONE.items())
    return rank, count, local


_ALONE = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}


def is_first() -> bool:
    """True in the process of rank 0, which prints for all processes."""
    rank, count, _ = _environment()
    return rank == 0 or count == 1


def is_first_to_fail() -> bool:
    """True in the first process that fails, which then prints the error.

    The other processes fail after it, with the same error or because they lost their peer. They print nothing.
    """
    if _environment()[1] == 1:
        return True
    try:
        return _store(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]).add("failed", 1) == 1
    except RuntimeError:  # the store is gone: the process that held it has failed
        return False


@functools.cache
def _store(address: str, port: str) -> Store:
    """The key-value store that all processes share. It still works after a process has failed."""
    from torch.distributed.rendezvous import rendezvous

    store: Store = next(rendezvous("env://"))[0]
    return store


@dataclass(frozen=True)
class Processes:
    """The group of `count` processes, as seen by the one of rank `rank`. All processes call the same methods."""

    device: torch.device
    rank: int = 0
    count: int = 1

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sum of each value over the processes."""
        if self.count == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in the order of their ranks."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.count > 1:
            dist.barrier()

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Copy the tensors of rank 0 into those of all processes, in place."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def parallel(self, model: nn.Module) -> nn.Module:
        """Wrap the model in DistributedDataParallel, which averages gradients, if there is more than one process."""
        if self.count == 1:
            return model
        return nn.parallel.DistributedDataParallel(model, [self.device] if self.device.type == "cuda" else None)


_joined = itertools.count()  # numbers the process groups, so that each has its own keys in the store


@contextlib.contextmanager
def join(pick_device: Callable[[int | None], torch.device]) -> Iterator[Processes]:
    """Join the processes of torchrun into a group within the `with` block: NCCL on GPUs, gloo on CPUs.

    If one process raises an exception, torchrun ends the others. With gloo they also notice that it is gone, and raise.

    Args:
        pick_device: a function that returns the device for a local rank, which is None for a single process.
    """
    rank, count, local = _environment()
    if count == 1:
        yield Processes(pick_device(None))
        return
    from torch.distributed.distributed_c10d import PrefixStore

    device = pick_device(local)
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=PrefixStore(f"group {next(_joined)}", _store(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])),
        rank=rank,
        world_size=count,
        device_id=device if on_gpu else None,
    )
    yield Processes(device, rank, count)
    dist.destroy_process_group()  # not after an exception: the others could fail and print before this process does


class Part(Sampler[list[int]]):
    """Samples this process's part of every batch: `batch[rank::count]`. The parts of all processes make up the batch.

    The last batch may have fewer rows than there are processes. A process without a row then gets the first row of the
    batch, with weight 0 in `weights`.
    """

    def __init__(self, batches: BatchSampler, rank: int, count: int) -> None:
        self.batches = batches
        self.rank = rank
        self.count = count

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            yield batch[self.rank :: self.count] or batch[:1]

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def weights(self) -> list[float]:
        """The weight of this process's mean loss in each batch: (rows of this part) * count / (rows of the batch).

        The mean of the weighted losses over all processes is the mean loss of the batch.
        """
        rows, size = len(self.batches.sampler), self.batches.batch_size  # type: ignore[arg-type]
        sizes = [min(size, rows - begin) for begin in range(0, rows, size)]
        return [len(range(self.rank, whole, self.count)) * self.count / whole for whole in sizes]
