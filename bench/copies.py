"""Copies of an input to the device, and training loops whose batches come from the host."""

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
from bench.work import phase_work
from mlp_fused import timing
from mlp_fused.prefetch import DevicePrefetcher, use_up
from mlp_fused.timing import Timed
from mlp_fused.transfer.findings import fastest
from mlp_fused.transfer.measurement import copy_calls

COPY_SECONDS = 0.01  # the time for one number of a copy row; there are about a hundred rows with ten numbers each
COPIED_CPU_FLOPS = 0.1e9  # the CPU is measured too if a forward and backward has at most this many FLOPs
LONG_MS = 3  # a step longer than this is measured only once


def copies(host: Tensor, device: torch.device, seconds: float, clock: timing.Clock = timing.CLOCK) -> dict[str, Copied]:
    """Measure three copies of a pageable tensor to allocated memory of the device, by name.

    They are from pageable memory, from pinned memory, and from pinned memory with non_blocking=True on a side stream.
    """
    calls = copy_calls([host], device)
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    copied = {}
    for kind, call, stream in (
        ("pageable", "pageable", current),
        ("pinned", "pinned", current),
        ("pinned_side_stream", "non_blocking", side),
    ):
        with torch.cuda.stream(stream):
            measured = timing.time_apart(calls[call], seconds, clock)
        ms = measured.device.ms
        copied[kind] = Copied(ms, measured.returned.ms, 1e-6 * host.nbytes / ms)
    return copied


def measured_copies(
    bench: Bench, seconds: float = timing.SECONDS, clock: timing.Clock = timing.CLOCK
) -> dict[str, Copied]:
    """Measure the copies of a bench's first input, unless they were measured before."""
    if bench.copies is None:
        bench.copies = copies(bench.host, bench.inputs[0].device, seconds, clock)
    return bench.copies


# The ways to copy a batch to the device, and their names in the report.
WAYS = {
    "to_device": "x.to(device)",  # from pageable memory
    "non_blocking": "pinned, non_blocking",  # in the stream of the kernels
    "prefetched": "DevicePrefetcher",  # from pinned memory
    "resident": "data on the GPU",
}


def ways(bench: Bench, prefetcher: Callable[..., Iterable[Tensor]] = DevicePrefetcher) -> dict[str, Timed]:
    """Return, for each of WAYS, a call that copies a batch from the host and computes forward and backward.

    Raises:
        AssertionError: a copied batch is wrong, or the gradients differ from eager's (see `compare`).
    """
    model, parameters, device = bench.model, bench.parameters, bench.device
    resident = [x.clone() for x in bench.inputs]  # contiguous like a copied batch, whatever the layout of the input
    host, pinned = bench.host, bench.pinned
    batches = iter(prefetcher(itertools.repeat(pinned), device))
    to_device: dict[str, Callable[[int], Tensor]] = {
        "to_device": lambda i: host.to(device),
        "non_blocking": lambda i: pinned.to(device, non_blocking=True),
        "prefetched": lambda i: next(batches),
        "resident": lambda i: resident[i],
    }
    for name, batch in to_device.items():
        assert torch.equal(batch(0), bench.inputs[0]), f"{name} copies a wrong batch"

    def training(name: str) -> Timed:
        batch = to_device[name]

        def step(i: int) -> tuple[Tensor, ...]:
            return torch.autograd.grad(model(batch(i)), parameters, bench.gradients[i])

        sets = len(resident) if name == "resident" else 1
        return Timed(step, sets=sets, drain=partial(use_up, batches) if name == "prefetched" else None)

    calls = {name: training(name) for name in WAYS}
    expected = torch.autograd.grad(bench.eager(resident[0]), parameters, bench.gradients[0])
    compare(calls["resident"](0), expected, bounds_in_force(bench.problem.dtype), 0)
    return calls


def on_the_cpu(bench: Bench) -> Timed | None:
    """Return a call of forward and backward on this CPU in fp32; None if it has more FLOPs than COPIED_CPU_FLOPS."""
    if bench.dtype != torch.float32 or phase_work(bench.problem, "training", "cpu").flops > COPIED_CPU_FLOPS:
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
    """Time the ways in loops, on batches of `rows` rows."""

    def read(seconds: float) -> tuple[dict[str, timing.Spread], dict[str, float]]:
        spreads = {name: timing.time_loop(timed, seconds, clock) for name, timed in ways.items()}
        ms = {name: spread.ms for name, spread in spreads.items() if name != "resident"}
        return spreads, ms if cpu is None else {"cpu": timing.time_host(cpu, seconds / 2, clock).ms, **ms}

    spreads, ms = read(COPY_SECONDS)
    advised = fastest(ms)
    # The advice is judged by a second reading; the same reading would favour the way that was fastest by chance.
    second = ms if max(ms.values()) > LONG_MS else read(COPY_SECONDS / 4)[1]
    compute_ms = spreads["resident"].ms
    bound_ms = max(copy_ms, compute_ms)
    measured_ways = {
        name: Way(
            spread.ms,
            spread.low,
            spread.high,
            examples_per_s=1e3 * rows / spread.ms,
            bound_share=None if name == "resident" else bound_ms / spread.ms,
        )
        for name, spread in spreads.items()
    }
    return Throughput(
        ways=measured_ways,
        copy_ms=copy_ms,
        compute_ms=compute_ms,
        bound_ms=bound_ms,
        cpu_ms=ms.get("cpu"),
        advised=advised,
        over_fastest=second[advised] / min(second.values()),
    )
