"""An experiment: a narrow network's forward on a batch that lies in pinned memory of the host, read where it lies.

Copy and compute are one pass then, and a batch of fewer bits than the network computes in is widened as it is loaded.
FusedMLP does neither; these rows are to tell whether it should. What is expected: 2^20 rows of 64 in bf16 take 2.4 ms
of a link of 55 GB/s, and 0.06 ms of an H200's memory: a prefetcher's copies hide all else, and nothing is left to win.
2^8 rows take 0.6 µs of the link, and the launch of a copy, several µs, is what reading in place saves.

A batch of each of `kinds` comes by each of WAYS, and y is the same:

    copied      a copy in the stream that computes, torch's cast to the network's dtype, the network: as it is written
    widened     the copy; the network casts as it loads (of narrower kinds only)
    prefetched  the same on a `DevicePrefetcher`'s copies, which pass while the batch before is computed on
    in_place    the network alone, loading from the host's memory, and casting
    resident    the network on batches that are on the device: what is left where the link costs nothing
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, lru_cache, partial

import torch
from torch import Tensor, nn

from bench.shapes import Problem
from mlp_fused import DevicePrefetcher, FusedMLP, timing
from mlp_fused.dtypes import DTYPES
from mlp_fused.engine.network_path import NetworkPlan
from mlp_fused.engine.paths import find_network
from mlp_fused.engine.recognize import resolve
from mlp_fused.kernels import network_forward
from mlp_fused.kernels.launch import Launches
from mlp_fused.prefetch import use_up
from mlp_fused.reference import Layer
from mlp_fused.timing import Timed

WAYS = ("copied", "widened", "prefetched", "in_place", "resident")
KINDS = {"uint8": torch.uint8, **DTYPES}


def kinds(problem: Problem) -> tuple[str, ...]:
    """What a batch may be of: bytes, as images and categories come; 16 bits for fp32; the network's own dtype."""
    return ("uint8", "fp16", "fp32") if problem.dtype == "fp32" else ("uint8", problem.dtype)


class FromHost:
    """One network on one device, and batches for it in the host's memory."""

    def __init__(self, problem: Problem, device: str) -> None:
        self.problem = problem
        self.device = torch.device(device)
        self.dtype = DTYPES[problem.dtype]
        torch.manual_seed(0)
        first, *rest = problem.widths
        self.model = FusedMLP(
            first, rest, activation_layer=problem.activation, device=self.device, dtype=self.dtype
        ).requires_grad_(False)
        linears = [child for child in self.model if isinstance(child, nn.Linear)]
        self.weights = tuple(linear.weight for linear in linears)
        self.biases = tuple(linear.bias for linear in linears)
        # NaN: an entry that is never written is found
        shape = problem.rows, problem.widths[-1]
        self.y = torch.full(shape, torch.nan, dtype=self.dtype, device=self.device)
        self.launches = Launches()

    @cached_property
    def path(self) -> NetworkPlan:
        """Raises AssertionError where the network is not one kernel."""
        activations = [self.problem.activation] * (len(self.weights) - 1) + ["identity"]
        layers = tuple(map(Layer, self.weights, self.biases, map(resolve, activations)))
        x = torch.empty((self.problem.rows, self.problem.widths[0]), dtype=self.dtype, device=self.device)
        found = find_network(x, layers, self.dtype, training=False)
        assert isinstance(found, NetworkPlan), found
        return found

    def compute(self, x: Tensor) -> Tensor:
        """y by the network's kernel, from x of any dtype on the device or in pinned memory."""
        others = self.y, self.weights, self.biases, None, None, None
        if not self.launches.again((x.dtype,), x, *others):
            made = network_forward.network_forward(
                x, self.weights, self.biases, self.y, self.path.network, self.path.forward
            )
            self.launches.remember((x.dtype,), made)
        return self.y

    def nbytes(self, kind: str) -> int:
        """Of a batch."""
        return self.problem.rows * self.problem.widths[0] * KINDS[kind].itemsize

    def batches(self, kind: str) -> list[Tensor]:
        """In pinned memory; of bytes all values, else standard normal."""
        shape = self.problem.rows, self.problem.widths[0]
        sets = timing.rotation(self.nbytes(kind), timing.cache_bytes(self.device.type))
        make = partial(torch.randint, 256, shape) if kind == "uint8" else partial(torch.randn, shape)
        return [make(dtype=KINDS[kind]).pin_memory() for _ in range(sets)]

    def ways(self, kind: str) -> tuple[dict[str, Timed], Tensor]:
        """The forward by each of WAYS on batches of a kind; and y of the first of them by torch's modules."""
        pinned = self.batches(kind)
        there = [x.to(self.device) for x in pinned]
        ahead = iter(DevicePrefetcher(itertools.cycle(pinned), self.device))

        def arrived(i: int) -> Tensor:
            return pinned[i].to(self.device, non_blocking=True)

        calls: dict[str, Callable[[int], Tensor]] = {
            "copied": lambda i: self.compute(arrived(i).to(self.dtype)),
            "widened": lambda i: self.compute(arrived(i)),
            "prefetched": lambda i: self.compute(next(ahead)),
            "in_place": lambda i: self.compute(pinned[i]),
            "resident": lambda i: self.compute(there[i]),
        }
        if pinned[0].dtype == self.dtype:
            del calls["widened"]  # it is "copied"
        expected = nn.Sequential(*self.model)(there[0].to(self.dtype))
        ways = {name: Timed(call, sets=len(pinned)) for name, call in calls.items()}
        return {**ways, "prefetched": replace(ways["prefetched"], drain=partial(use_up, ahead))}, expected


@lru_cache(maxsize=1)
def from_host_of(problem: Problem, device: str) -> FromHost:
    """The one that is kept, between the measurement and what repeats it."""
    return FromHost(problem, device)
