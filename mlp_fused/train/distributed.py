"""The processes that torchrun starts: which one this is, and what they tell each other. Without it there is one."""

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

if TYPE_CHECKING:  # torch.distributed has its modules only where torch was built with it
    from torch.distributed.distributed_c10d import Store

__all__ = ["Part", "Processes", "is_first", "is_first_to_fail", "join"]


def _environment() -> tuple[int, int, int]:
    """This process's number, how many there are, and its number on this machine, as torchrun sets them."""
    rank, count, local = (int(os.environ.get(name, alone)) for name, alone in _ALONE.items())
    return rank, count, local


_ALONE = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}


def is_first() -> bool:
    """True if this process speaks where all would say the same."""
    rank, count, _ = _environment()
    return rank == 0 or count == 1


def is_first_to_fail() -> bool:
    """True if no other process has asked this before: the others made the same mistake, or find their peer gone.

    So that one message is printed, by the process that knows why.
    """
    if _environment()[1] == 1:
        return True
    try:
        return _store(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]).add("failed", 1) == 1
    except RuntimeError:  # the store went with the process that failed
        return False


@functools.cache
def _store(address: str, port: str) -> Store:
    """The store that all processes can read and write, whether or not one of them has failed."""
    from torch.distributed.rendezvous import rendezvous

    store: Store = next(rendezvous("env://"))[0]
    return store


@dataclass(frozen=True)
class Processes:
    """One of `count` processes, from 0, and its device; every method is called by all of them alike."""

    device: torch.device
    rank: int = 0
    count: int = 1

    def sum(self, values: Sequence[float]) -> list[float]:
        """Value by value, over the processes."""
        if self.count == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def gather(self, thing: Any) -> list[Any]:
        """Every process's."""
        things = [thing] * self.count
        if self.count > 1:
            dist.all_gather_object(things, thing)
        return things

    def wait(self) -> None:
        """For all to come here."""
        if self.count > 1:
            dist.barrier()

    def take_over(self, tensors: Iterable[Tensor]) -> None:
        """The first process's values, in place."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model, whose gradients are averaged over the processes."""
        if self.count == 1:
            return model
        return nn.parallel.DistributedDataParallel(model, [self.device] if self.device.type == "cuda" else None)


_joined = itertools.count()  # a name for each time that this process joins the others


@contextlib.contextmanager
def join(pick_device: Callable[[int | None], torch.device]) -> Iterator[Processes]:
    """The processes as torchrun's environment has them, together within the block: by NCCL on GPUs, else by gloo.

    Where one of them raises an exception, torchrun ends the others; by gloo they find it gone as well, and raise too.

    Args:
        pick_device: this process's number on its machine (None where it is alone) -> its device.
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
    dist.destroy_process_group()  # not after an exception: the others would find this one gone before it says why


class Part(Sampler[list[int]]):
    """One process's rows of every batch, each `count`-th from the `rank`-th on, so that together they are the batch.

    A process for which a last batch has no row gets one of another's, which `weights` does not count.
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
        """The weight of this part's mean for each batch, so that the mean of all parts is that of the batch."""
        rows, size = len(self.batches.sampler), self.batches.batch_size  # type: ignore[arg-type]
        sizes = [min(size, rows - begin) for begin in range(0, rows, size)]
        return [len(range(self.rank, whole, self.count)) * self.count / whole for whole in sizes]
