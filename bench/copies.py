"""The copies of an input to the device, and a training loop whose batches come from the host."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from bench.network import Bench
from bench.rows import Copied, Throughput, Way
from bench.verify import bounds_in_force, compare
from bench.work import work_of
from mlp_fused import timing
from mlp_fused.prefetch import DevicePrefetcher, use_up
from mlp_fused.timing import Timed
from mlp_fused.transfer.findings import fastest
from mlp_fused.transfer.measurement import copy_calls

COPY_SECONDS = 0.01  # spent on one number of a copy row, of which there are a hundred with ten numbers each
COPIED_CPU_FLOPS = 0.1e9  # of a copy row's forward and backward, up to which the CPU's time stands beside the GPU's
LONG_MS = 3  # a step of which nobody has to read twice


def copies(host: Tensor, device: torch.device, seconds: float, clock: timing.Clock = timing.CLOCK) -> dict[str, Copied]:
    """Copies of a tensor of pageable memory to the device, into memory that is already there.

    From pageable memory, from pinned memory, and from pinned memory with non_blocking on a side stream.
    """
    calls = copy_calls([host], device)
    here, side = torch.cuda.current_stream(), torch.cuda.Stream()
    found = {}
    for kind, call, stream in (
        ("pageable", "pageable", here),
        ("pinned", "pinned", here),
        ("pinned_side_stream", "non_blocking", side),
    ):
        with torch.cuda.stream(stream):
            measured = timing.time_apart(calls[call], seconds, clock)
        ms = measured.device.ms
        found[kind] = Copied(ms, measured.returned.ms, 1e-6 * host.nbytes / ms)
    return found


def copies_of(bench: Bench, seconds: float = timing.SECONDS, clock: timing.Clock = timing.CLOCK) -> dict[str, Copied]:
    """The copies of the first input, measured once."""
    if bench.copies is None:
        bench.copies = copies(bench.host, bench.inputs[0].device, seconds, clock)
    return bench.copies


# The ways by which a batch comes to the device, and their names in the report.
WAYS = {
    "to_device": "x.to(device)",  # of pageable memory, as it is usually written
    "non_blocking": "pinned, non_blocking",  # in the stream that computes
    "prefetched": "DevicePrefetcher",  # from pinned memory
    "resident": "data on the GPU",
}


def ways(bench: Bench, prefetcher: Callable[..., Iterable[Tensor]] = DevicePrefetcher) -> dict[str, Timed]:
    """A forward and backward on a batch of the host by each of WAYS.

    Raises:
        AssertionError: a way brings another batch, or the gradients differ from eager's, as in `compare`.
    """
    model, parameters, device = bench.model, bench.parameters, bench.device
    there = [x.clone() for x in bench.inputs]  # a copy arrives dense, whatever the layout was
    host, pinned = bench.host, bench.pinned
    batches = iter(prefetcher(itertools.repeat(pinned), device))
    arrive: dict[str, Callable[[int], Tensor]] = {
        "to_device": lambda i: host.to(device),
        "non_blocking": lambda i: pinned.to(device, non_blocking=True),
        "prefetched": lambda i: next(batches),
        "resident": lambda i: there[i],
    }
    for name, batch in arrive.items():
        assert torch.equal(batch(0), bench.inputs[0]), f"{name} brings another batch"

    def training(name: str) -> Timed:
        batch = arrive[name]

        def step(i: int) -> tuple[Tensor, ...]:
            return torch.autograd.grad(model(batch(i)), parameters, bench.gradients[i])

        sets = len(there) if name == "resident" else 1
        return Timed(step, sets=sets, drain=partial(use_up, batches) if name == "prefetched" else None)

    found = {name: training(name) for name in WAYS}
    expected = torch.autograd.grad(bench.eager(there[0]), parameters, bench.gradients[0])
    compare(found["resident"](0), expected, bounds_in_force(bench.problem.dtype), 0)
    return found


def on_the_cpu(bench: Bench) -> Timed | None:
    """A forward and backward on this CPU, in fp32; None where it takes so long there that nobody would ask."""
    if bench.dtype != torch.float32 or work_of(bench.problem, "training", "cpu").flops > COPIED_CPU_FLOPS:
        return None
    model, host, gradient = copy.deepcopy(bench.eager).cpu(), bench.host, bench.gradients[0].cpu()
    parameters = list(model.parameters())
    return Timed(lambda _: torch.autograd.grad(model(host), parameters, gradient))


def throughput(
    ways: dict[str, Timed],
    rows: int,
    copy_ms: float,
    cpu: Timed | None = None,
    clock: timing.Clock = timing.CLOCK,
) -> Throughput:
    """Time the ways in loops on batches of so many rows."""

    def read(seconds: float) -> tuple[dict[str, timing.Spread], dict[str, float]]:
        found = {name: timing.time_loop(timed, seconds, clock) for name, timed in ways.items()}
        ms = {name: spread.ms for name, spread in found.items() if name != "resident"}
        return found, ms if cpu is None else {"cpu": timing.time_host(cpu, seconds / 2, clock).ms, **ms}

    found, ms = read(COPY_SECONDS)
    advised = fastest(ms)
    # Judged by another reading where chance has a part in one.
    again = ms if max(ms.values()) > LONG_MS else read(COPY_SECONDS / 4)[1]
    compute_ms = found["resident"].ms
    bound_ms = max(copy_ms, compute_ms)
    read_ways = {
        name: Way(
            spread.ms,
            spread.low,
            spread.high,
            examples_per_s=1e3 * rows / spread.ms,
            of_bound=None if name == "resident" else bound_ms / spread.ms,
        )
        for name, spread in found.items()
    }
    return Throughput(
        ways=read_ways,
        copy_ms=copy_ms,
        compute_ms=compute_ms,
        bound_ms=bound_ms,
        cpu_ms=ms.get("cpu"),
        advised=advised,
        over_fastest=again[advised] / min(again.values()),
    )
