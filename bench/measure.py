"""`measure(cell, device)`: one row of results. The only code that times a problem, under pytest and in gpu.py alike.

A row is a dict of plain values:

    id, family, phase, device, anchor, widths, rows, dtype, activation, layout
    path, reason, precision what FusedMLP runs on, and why, and how fp32 is multiplied (from `explain`)
    verified                relative errors against eager, and the bound they were held to
    first_call_s            the first call: compiling, or loading what was compiled before
    ms, kernel_ms, quartiles, rounds, calls    see timing.py; `repeat_ms` is ms again, after the baselines: the noise
    sets                    how many inputs were rotated
    flops, bytes            by `mlp_fused.plan.work`, of the path it runs on; a step adds the loss's and Adam's
    ceilings                FLOP/s and bytes/s of a large product and a large copy in the same process
    floor_s, bound, tflops, gbps, floor_ratio  the floor these imply, what it is bound by, and kernel_ms against it
    copy                    x from the host: for each way ms, host_ms, gbps, and `to_kernel`, the copy over the kernel
    baselines               by name: ms, kernel_ms, …, first_call_s, `speedup` = its ms over ours, `kernel_speedup` that
                            of kernel_ms; or {"error": text};
                            with `compile_s`, the first call of the graph, also where an earlier phase made it
                            (inductor's cache on disk is left as it is: a warm one shortens this)
    memory                  of a training row on a GPU, ours and eager's: `kept_bytes` between forward and backward, the
                            output included, `peak_bytes` of both, above what was allocated before; `kept_ratio` and
                            `peak_ratio`, ours over eager's

`copy` is None on a CPU. A copy row has `copy`, and under `phases` what it needs of the above for the forward, the
backward and the step; `link`, what the link reaches with pinned memory, bytes/s; and `throughput`, a forward and
backward in a loop on batches that come from the host (see WAYS):

    ways                    by name: `ms` a batch with its quartiles `low` and `high`, `examples_per_s`, rows over ms,
                            and, but for `resident`, `of_bound`, bound_ms over ms
    copy_ms, compute_ms     the pinned copy by itself; the loop on batches that are on the device, `resident`
    bound_ms                the larger of the two: what a loop takes that hides all of one behind the other
    cpu_ms                  a forward and backward on this CPU; None where it would take too long to be the fastest
    advised                 of the ways and the CPU, by `transfer.fastest`, as `mlp-fused transfer` advises
    over_fastest            the time of that one over the fastest's; of steps up to LONG_MS in a reading of its own

`first_touch`, `lecture` and `warmup` rows have `seconds` by name (see fresh.py).

A gemm row is one kernel's, and has instead of path, reason, copy and first_call_s:

    tile                    what the kernel ran with
    baselines               `matmul`, the bare product, and `eager`, torch's whole way (see gemm.py)
    errors                  of fp32: those of `ours` and `eager` against float64, by the norm and of the worst entry
"""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.gemm import Gemm, gemm_for, kernel_plan
from bench.machine import ROOT
from bench.problem import COPIED_PHASES, FRESH_PHASES, GEMM_PHASES, Cell, Problem
from mlp_fused import DevicePrefetcher, FusedMLP, capture_step, timing
from mlp_fused.agreement import BOUNDS, relative_error
from mlp_fused.compiling import Compilers, NotYetError, count_workers
from mlp_fused.functional import Layer, run_kernels
from mlp_fused.kernels import configs
from mlp_fused.kernels.activations import resolve
from mlp_fused.kernels.language import driver
from mlp_fused.plan import Work, float32_precision, work
from mlp_fused.prefetch import use_up
from mlp_fused.timing import Ceilings, Timed
from mlp_fused.training import DTYPES
from mlp_fused.transfer import copy_calls, fastest

Report = Callable[[dict[str, Any]], None]

# A CPU measures the rows of up to so many FLOPs and bytes, so that all of them together take a minute on two cores. In
# 16 bits many CPUs multiply a hundred times slower than in 32.
CPU_FLOPS = {"fp32": 10e9, "fp16": 0.1e9, "bf16": 0.1e9}
CPU_BYTES = 0.15e9
CPU_SECONDS = 0.05  # spent on one number there

GRAPHED_SETS = 8  # a CUDA graph is tied to its input's address: one capture for each input rotated
COMPILE_SECONDS = 60
FRESH_SECONDS = 300  # for a child process; the lecture takes one on two cores
COPY_SECONDS = 0.01  # spent on one number of a copy row, of which there are a hundred with ten numbers each
COPIED_CPU_FLOPS = 0.1e9  # of a copy row's forward and backward, up to which the CPU's time stands beside the GPU's
LONG_MS = 3  # a step of which nobody has to read twice
LEARNING_RATE = 1e-5  # thousands of timed steps must not carry the parameters to infinity
EPS = 1e-3  # Adam's default of 1e-8 is 0 in fp16, where a gradient of 0 would then give 0 / 0
GRADIENT = 16.0  # standard deviation of a bias gradient: its square, which Adam keeps, has to fit in fp16


def why_not(cell: Cell, device: str) -> str | None:
    """The reason not to run a cell on a device here; None where it runs."""
    if device == "cuda":
        return None if torch.cuda.is_available() else f"no CUDA device (torch {torch.__version__})"
    if cell.phase == "lecture":
        if torch.cuda.is_available():
            return "the row on the GPU has the product on the CPU beside it"
        rows = cell.problem.rows
        return f"half a minute on a CPU: `python -m bench.fresh lecture --cpu --rows {rows}` runs it"
    limit, needed = CPU_FLOPS[cell.problem.dtype], work_of(cell.problem, cell.phase, device)
    if needed.flops > limit:
        bits = "16 bits" if cell.problem.dtype != "fp32" else "fp32"
        return f"more than {limit / 1e9:g} GFLOP in {bits}: not on a CPU"
    if needed.bytes > CPU_BYTES:
        return f"moves more than {CPU_BYTES / 1e9:g} GB: not on a CPU"
    return None


def seconds_for_a_number(device: str) -> float:
    """Seconds spent on one number of a row."""
    return CPU_SECONDS if device == "cpu" else timing.SECONDS


def work_of(problem: Problem, phase: str, device: str) -> Work:
    """FLOPs and bytes of a phase on the path that it takes on a device; of a step also what the loss and Adam move.

    Adam reads the parameter, its gradient and two moments, and writes all but the gradient; the cross entropy reads the
    logits and writes their gradient. Their FLOPs are not counted.
    """
    if phase == "lecture":
        n = problem.rows
        return Work(2 * n**3, 3 * n * n * DTYPES[problem.dtype].itemsize)
    if phase in GEMM_PHASES:
        return kernel_plan(problem, phase).work
    gpu = configs.describe("cuda") if device == "cuda" else None
    precision = float32_precision() if problem.dtype == "fp32" else "ieee"
    parts = work(
        problem.rows, problem.widths, DTYPES[problem.dtype], problem.activation, device=gpu, precision=precision
    )
    if phase in ("forward", "copy"):
        return parts["inference"]
    if phase == "backward":
        return parts["backward"]
    both = parts["forward"] + parts["backward"]
    if phase == "training":
        return both
    widths, size = problem.widths, DTYPES[problem.dtype].itemsize
    parameters = sum(k * n + n for k, n in pairwise(widths))
    logits = 2 * problem.rows * widths[-1] * problem.cross_entropy
    return both + Work(0, (7 * parameters + logits) * size)


def against_floor(work: Work, ceilings: Ceilings, ms: float) -> dict[str, Any]:
    """FLOPs and bytes, the rates at which they were done in `ms` milliseconds, the floor and the ratio to it."""
    seconds = 1e-3 * ms
    floor = work.floor(ceilings.flops_per_second, ceilings.bytes_per_second)
    by_flops = work.flops / ceilings.flops_per_second >= work.bytes / ceilings.bytes_per_second
    return {
        "flops": work.flops,
        "bytes": work.bytes,
        "tflops": 1e-12 * work.flops / seconds,
        "gbps": 1e-9 * work.bytes / seconds,
        "floor_s": floor,
        "bound": "compute" if by_flops else "memory",
        "floor_ratio": seconds / floor,
        "ceilings": asdict(ceilings),
    }


def bounds_in_force(dtype: str) -> tuple[float, float]:
    """BOUNDS of a dtype: those of tf32 for fp32 where torch's switch allows tf32."""
    tf32 = dtype == "fp32" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return BOUNDS["tf32" if tf32 else dtype]


def compare(found: Sequence[Tensor], expected: Sequence[Tensor], dtype: str, outputs: int) -> dict[str, Any]:
    """Relative errors of the first `outputs` tensors, and of the others, which are gradients; and their bounds.

    Raises AssertionError, with the errors and the bounds, where one passes its bound or a tensor is missing.
    """
    bounds = bounds_in_force(dtype)
    assert len(found) == len(expected), f"{len(found)} tensors instead of {len(expected)}"
    errors = [relative_error(*pair) for pair in zip(found, expected, strict=True)]
    limits = [bounds[0]] * outputs + [bounds[1]] * len(errors[outputs:])
    wrong = [(i, error) for i, (error, limit) in enumerate(zip(errors, limits, strict=True)) if not error <= limit]
    assert not wrong, f"wrong against eager (tensor, relative error): {wrong}, bounds {list(bounds)}"
    return {
        "output": max(errors[:outputs], default=None),
        "gradients": max(errors[outputs:], default=None),
        "bounds": list(bounds),
    }


def verify_gemm(gemm: Gemm) -> dict[str, Any]:
    """Relative errors of one call of the kernel against eager. Raises AssertionError as `compare` does."""
    found = gemm.ours(0)
    outputs = len(found) if gemm.phase.startswith("layer_forward") else 0
    return {"verified": compare(found, gemm.expected(0), gemm.problem.dtype, outputs)}


@dataclass(frozen=True)
class Baseline:
    """What a row is compared with: `build` returns the phase's function, which is verified against `reference`."""

    name: str
    build: Callable[[Bench, str], Timed]
    applies: Callable[[Cell, str], bool] = lambda cell, device: device == "cuda"
    reference: Callable[[nn.Sequential], nn.Sequential] = lambda eager: eager


class Bench:
    """One problem on one device: the model, eager on the same parameters, random inputs; built when first asked for."""

    def __init__(self, problem: Problem, device: str) -> None:
        self.problem = problem
        self.device = device
        self.dtype = DTYPES[problem.dtype]
        self.compiled: dict[str | None, Callable[[Tensor], Tensor]] = {}
        self.compile_seconds: dict[tuple[str, bool], float] = {}

    @cached_property
    def model(self) -> FusedMLP:
        if self.device == "cuda":
            torch.compiler.reset()  # the last problem's graphs hold memory and count towards dynamo's limit
        release(self.device)
        torch.manual_seed(0)
        first, *rest = self.problem.widths
        return FusedMLP(first, rest, activation_layer=self.problem.activation, device=self.device, dtype=self.dtype)

    @cached_property
    def eager(self) -> nn.Sequential:
        """The same parameters in torch's own modules, as one would write them: without torchvision's idle Dropouts."""
        return nn.Sequential(*(child for child in self.model if not isinstance(child, nn.Dropout)))

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @cached_property
    def inputs(self) -> list[Tensor]:
        rows, width = self.problem.rows, self.problem.widths[0]
        nbytes = rows * width * self.dtype.itemsize
        sets = timing.rotation(nbytes, timing.cache_bytes(self.device))
        return [self._random_input(rows, width) for _ in range(sets)]

    def _random_input(self, rows: int, width: int) -> Tensor:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=self.device, dtype=self.dtype)

        if self.problem.layout == "transposed":
            return random(width, rows).t()
        if self.problem.layout == "sliced":
            return random(rows, 2 * width)[:, 1 : width + 1]
        return random(rows, width)

    @cached_property
    def targets(self) -> list[Tensor]:
        """One for each input: labels (M,) where the loss is the cross entropy, otherwise dY (M, d_L)."""
        rows, width = self.problem.rows, self.problem.widths[-1]
        if self.problem.cross_entropy:
            return [torch.randint(width, (rows,), device=self.device) for _ in self.inputs]
        scale = min(1.0, GRADIENT * rows**-0.5)  # a bias gradient is the sum over the rows
        return [torch.randn(rows, width, device=self.device, dtype=self.dtype).mul_(scale) for _ in self.inputs]

    @cached_property
    def host(self) -> Tensor:
        """The first input in pageable memory of the host."""
        return self.inputs[0].cpu()

    @cached_property
    def pinned(self) -> Tensor:
        """The same in pinned memory."""
        return self.host.pin_memory()

    @cached_property
    def copies(self) -> dict[str, dict[str, float]]:
        return copies(self.host, self.inputs[0].device)

    @cached_property
    def gradients(self) -> list[Tensor]:
        """dY (M, d_L) for each input: the target itself, or that of the cross entropy of eager's output."""
        return [self._gradient(*pair) for pair in zip(self.inputs, self.targets, strict=True)]

    def _gradient(self, x: Tensor, target: Tensor) -> Tensor:
        if not self.problem.cross_entropy:
            return target
        with torch.no_grad():
            y = self.eager(x)
        y.requires_grad_()
        return torch.autograd.grad(F.cross_entropy(y, target), y)[0]

    def timed(self, module: Callable[[Tensor], Tensor], phase: str) -> Timed:
        """A phase of `module`; its calls return what is verified: the output first (backward has none), gradients."""
        inputs, parameters = self.inputs, self.parameters
        if phase == "forward":

            def forward(i: int) -> tuple[Tensor, ...]:
                with torch.no_grad():
                    return (module(inputs[i]),)

            return Timed(forward, sets=len(inputs))
        if phase == "step":
            return Timed(self.step(module, self.optimizer()), sets=len(inputs))
        gradients = self.gradients
        if phase == "training":

            def training(i: int) -> tuple[Tensor, ...]:
                y = module(inputs[i])
                return y.detach(), *torch.autograd.grad(y, parameters, gradients[i])

            return Timed(training, sets=len(inputs))
        if phase == "backward":
            waiting: list[Tensor] = []

            def setup(i: int) -> None:
                waiting[:] = [module(inputs[i])]

            def backward(i: int) -> tuple[Tensor, ...]:
                return torch.autograd.grad(waiting.pop(), parameters, gradients[i])

            return Timed(backward, setup, len(inputs))
        raise ValueError(f"phase is {phase!r}, which is not a phase of a network")

    def optimizer(self) -> torch.optim.Optimizer:
        """Adam, the same for ours and for every baseline: capturable on a GPU, as a graphed step needs it.

        Parameters and state stay finite over thousands of steps in every dtype. This changes nothing of what a step
        costs: Adam's kernels read, compute and write the same, whatever the values, `lr` and `eps` are.
        """
        on_gpu = self.device == "cuda"
        return torch.optim.Adam(self.parameters, lr=LEARNING_RATE, eps=EPS, fused=on_gpu, capturable=on_gpu)

    def step(
        self, module: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer
    ) -> Callable[[int], tuple[Tensor, ...]]:
        """A training step of `module` on an input; its calls return the output and the gradients."""
        inputs, targets, parameters = self.inputs, self.targets, self.parameters
        cross_entropy = self.problem.cross_entropy

        def step(i: int) -> tuple[Tensor, ...]:
            optimizer.zero_grad(set_to_none=True)
            y = module(inputs[i])
            if cross_entropy:
                loss = F.cross_entropy(y, targets[i])
                loss.backward()
            else:
                y.backward(targets[i])
            optimizer.step()
            return y.detach(), *(p.grad for p in parameters if p.grad is not None)

        return step

    def verify(self, timed: Timed, phase: str, reference: nn.Module | None = None) -> dict[str, Any]:
        """Relative errors of one call against eager (or `reference`), and the seconds of that first call.

        Raises AssertionError as `compare` does.
        """
        last = timed.sets - 1  # of a graph's captures, only the last one's outputs were kept
        moved = self.parameters if phase == "step" else []
        before = [p.detach().clone() for p in moved]

        def restore() -> None:
            with torch.no_grad():
                for p, value in zip(moved, before, strict=True):
                    p.copy_(value)

        begun = time.perf_counter()
        timed.prepare(last)
        found = timed(last)
        synchronize(self.device)
        seconds = time.perf_counter() - begun
        found = [tensor.detach().clone() for tensor in found]  # a graph's outputs are written again by its next replay
        restore()
        eager = self.timed(reference or self.eager, phase)
        eager.prepare(last)
        expected = eager(last)
        restore()
        outputs = 0 if phase == "backward" else 1
        return {"verified": compare(found, expected, self.problem.dtype, outputs), "first_call_s": seconds}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def release(device: str) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


@lru_cache(maxsize=1)
def bench_for(problem: Problem, device: str) -> Bench:
    """The one Bench that is kept: cells of one problem stand side by side in the grid."""
    return Bench(problem, device)


def copies(host: Tensor, device: torch.device, seconds: float = timing.SECONDS) -> dict[str, dict[str, float]]:
    """Copies of a tensor of pageable memory to the device, into memory that is already there.

    For each of pageable, pinned, and pinned + non_blocking on a side stream: `ms` between device events around the
    copy, `host_ms` for which the host was held up, and `gbps` (1e9 bytes a second).
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
            measured = timing.time_apart(calls[call], seconds)
        ms = measured.device.ms
        gbps = 1e-6 * host.numel() * host.element_size() / ms
        found[kind] = {"ms": ms, "host_ms": measured.returned.ms, "gbps": gbps}
    return found


# By which ways a batch comes to the device, as they are told.
WAYS = {
    "to_device": "x.to(device)",  # of pageable memory, as it is usually written
    "non_blocking": "pinned, non_blocking",  # in the stream that computes
    "prefetched": "DevicePrefetcher",  # from pinned memory
    "resident": "data on the GPU",
}


def ways(bench: Bench) -> dict[str, Timed]:
    """A forward and backward on a batch of the host by each of WAYS.

    That each brings the batch is verified, and forward and backward against eager. Raises AssertionError as `compare`
    does.
    """
    model, parameters, device = bench.model, bench.parameters, bench.device
    there = [x.clone() for x in bench.inputs]  # a copy arrives dense, whatever the layout was
    host, pinned = bench.host, bench.pinned
    batches = iter(DevicePrefetcher(itertools.repeat(pinned), device))
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
    compare(found["resident"](0), expected, bench.problem.dtype, 0)
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
) -> dict[str, Any]:
    """A copy row's `throughput` (see the top of this file) of `ways` on batches of so many rows."""

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
    readings: dict[str, dict[str, float]] = {}
    for name, spread in found.items():
        readings[name] = {"ms": spread.ms, "low": spread.low, "high": spread.high}
        readings[name]["examples_per_s"] = 1e3 * rows / spread.ms
        if name != "resident":
            readings[name]["of_bound"] = bound_ms / spread.ms
    return {
        "ways": readings,
        "copy_ms": copy_ms,
        "compute_ms": compute_ms,
        "bound_ms": bound_ms,
        "cpu_ms": ms.get("cpu"),
        "advised": advised,
        "over_fastest": again[advised] / min(again.values()),
    }


def addmm_activation(bench: Bench) -> Callable[[Tensor], Tensor]:
    """Hidden layers by torch's own fused epilogue. On CUDA its gelu is the tanh form, whatever the model's is."""
    layers = [child for child in bench.eager if isinstance(child, nn.Linear)]
    use_gelu = bench.problem.activation == "gelu"

    def forward(x: Tensor) -> Tensor:
        for layer in layers[:-1]:
            x = torch._addmm_activation(layer.bias, x, layer.weight.t(), use_gelu=use_gelu)
        return torch.addmm(layers[-1].bias, x, layers[-1].weight.t())

    return forward


def tanh_gelu(model: nn.Sequential) -> nn.Sequential:
    """The same parameters with gelu in its tanh form."""
    return nn.Sequential(*(nn.GELU("tanh") if isinstance(child, nn.GELU) else child for child in model))


def graphed(timed: Timed, parameters: Sequence[nn.Parameter] = ()) -> Timed:
    """The same calls as CUDA graphs, one a rotated input; an untimed setup is a graph of its own, replayed before."""
    sets = min(timed.sets, GRAPHED_SETS)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # handles, workspaces and optimizer state are made outside of the capture
            timed.prepare(0)
            timed(0)
    torch.cuda.current_stream().wait_stream(stream)
    # The graphs share one pool: each is replayed whole before the next, and only the last one's outputs are read.
    pool = torch.cuda.graph_pool_handle()
    setups, graphs, outputs = [], [], None
    for i in range(sets):
        outputs = None
        for parameter in parameters:
            parameter.grad = None  # as `outputs`: the last capture's memory goes back to the pool
        if timed.setup is not None:
            setups.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(setups[-1], pool=pool, stream=stream):
                timed.prepare(i)
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], pool=pool, stream=stream):
            outputs = timed(i)

    def replay(i: int) -> Any:
        graphs[i].replay()
        return outputs

    def replay_setup(i: int) -> None:
        setups[i].replay()

    return Timed(replay, replay_setup if setups else None, sets)


def compiled(mode: str | None) -> Callable[[Bench, str], Timed]:
    """torch.compile for this very shape; fullgraph, or dynamo's limits would hand eager back without a word."""

    def build(bench: Bench, phase: str) -> Timed:
        if mode not in bench.compiled:
            bench.compiled[mode] = torch.compile(bench.eager, dynamic=False, fullgraph=True, mode=mode)
        return bench.timed(bench.compiled[mode], phase)

    return build


def captured(model_of: Callable[[Bench], nn.Module]) -> Callable[[Bench, str], Timed]:
    """capture_step of a network: each call copies its batch in, and is one launch."""

    def build(bench: Bench, phase: str) -> Timed:
        inputs, targets, parameters = bench.inputs, bench.targets, bench.parameters
        step = capture_step(model_of(bench), F.cross_entropy, bench.optimizer(), inputs[0], targets[0])
        step(inputs[0], targets[0])  # the first makes Adam's state, and is no replay

        def call(i: int) -> tuple[Any, ...]:
            step(inputs[i], targets[i])
            return step.output, *(p.grad for p in parameters)

        return Timed(call, sets=len(inputs))

    return build


def can_capture(cell: Cell, device: str) -> bool:
    """Where launches are all there is: steps with a loss of their own."""
    return device == "cuda" and cell.phase == "step" and cell.problem.cross_entropy


BASELINES = (
    Baseline("eager", lambda bench, phase: bench.timed(bench.eager, phase), lambda cell, device: True),
    Baseline(
        "addmm_activation",
        lambda bench, phase: bench.timed(addmm_activation(bench), phase),
        lambda cell, device: (
            device == "cuda" and cell.phase == "forward" and cell.problem.activation in ("relu", "gelu")
        ),
        tanh_gelu,
    ),
    Baseline("cuda_graph", lambda bench, phase: graphed(bench.timed(bench.eager, phase), bench.parameters)),
    Baseline("captured", captured(lambda bench: bench.model), can_capture),
    Baseline("captured_eager", captured(lambda bench: bench.eager), can_capture),
    Baseline("compile", compiled(None)),
    Baseline(
        "compile_max_autotune",
        compiled("max-autotune"),
        lambda cell, device: device == "cuda" and cell.anchor,
    ),
)
GEMM_BASELINES = ("matmul", "eager")  # of a kernel by itself (see gemm.py)


def compile_ahead(problems: Sequence[Problem]) -> None:
    """Compile what FusedMLP launches for these on the current GPU, on all cores but two, before anything is timed.

    One after the other, where they are first launched, the kernels of the copy rows would take longer to compile than
    their rows to measure. What is not compiled here, for whatever reason, is compiled there.
    """
    target = driver.active.get_current_target()
    with Compilers(_compile, configs.describe("cuda"), target, count_workers()) as compilers:
        # Those that differ in rows alone are often the same kernels: they are not to be compiled side by side.
        compilers.ask({problem: problem for problem in sorted(problems, key=lambda problem: problem.rows)})
        deadline = time.monotonic() + COMPILE_SECONDS
        with contextlib.suppress(NotYetError):
            for problem in problems:
                compilers.wait(problem, deadline - time.monotonic())


def _compile(problem: Problem) -> None:
    """In a process where `compiling.compile_only` holds: the path of a call, in inference and in training."""
    dtype, widths = DTYPES[problem.dtype], problem.widths

    def make(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    activations = [problem.activation] * (len(widths) - 2) + ["identity"]
    layers = [
        Layer(make(n, k).requires_grad_(), make(n).requires_grad_(), resolve(activation))
        for (k, n), activation in zip(pairwise(widths), activations, strict=True)
    ]
    parameters = [parameter for layer in layers for parameter in layer[:2] if parameter is not None]
    x = make(problem.rows, widths[0])
    device = configs.device_of(x)
    configs.describe = lambda kind, index=0: device  # type: ignore[assignment]
    with torch.no_grad():
        run_kernels(x, layers, dtype, None, "auto")
    y = run_kernels(x, layers, dtype, None, "auto")
    torch.autograd.grad(y, parameters, torch.empty_like(y))


def prepare(cell: Cell, device: str) -> Timed:
    """The function that a row times, verified: FusedMLP's phase, a kernel, or a copy row's pinned copy.

    Raises AssertionError where it is wrong.
    """
    if cell.phase in GEMM_PHASES:
        gemm = gemm_for(cell.problem, cell.phase, device)
        verify_gemm(gemm)
        return gemm.timed("ours")
    bench = bench_for(cell.problem, device)
    if cell.phase == "copy":
        pinned, target = bench.pinned, torch.empty_like(bench.inputs[0])
        assert torch.equal(target.copy_(pinned), bench.inputs[0])
        return Timed(lambda _: target.copy_(pinned))
    timed = bench.timed(bench.model, cell.phase)
    bench.verify(timed, cell.phase)
    return timed


def measure(cell: Cell, device: str, report: Report = lambda row: None, *, full: bool = True) -> dict[str, Any]:
    """The row of a cell (see the top of this file). `report` is handed the unfinished row after each baseline.

    Not `full`: a lecture on the GPU leaves out the product on the CPU.

    Raises AssertionError where FusedMLP is wrong, and what torch raises where it does not run; a baseline that fails is
    a text in the row.
    """
    problem = cell.problem
    row: dict[str, Any] = {
        "id": str(cell),
        "family": cell.family,
        "phase": cell.phase,
        "device": device,
        "anchor": cell.anchor,
        "widths": list(problem.widths),
        "rows": problem.rows,
        "dtype": problem.dtype,
        "activation": problem.activation,
        "layout": problem.layout,
    }
    if cell.phase in FRESH_PHASES:
        return row | {"seconds": _fresh(cell, device, cpu=full)}
    if cell.phase in GEMM_PHASES:
        return _measure_gemm(row, gemm_for(problem, cell.phase, device), report)
    bench = bench_for(problem, device)
    try:
        if cell.phase == "copy":
            row["copy"] = bench.copies = copies(bench.host, bench.inputs[0].device, COPY_SECONDS)
            row["link"] = asdict(timing.link(f"cuda:{torch.cuda.current_device()}"))
            copied = row["copy"]["pinned_side_stream"]["ms"]
            row["throughput"] = throughput(ways(bench), problem.rows, copied, on_the_cpu(bench))
            report(row)
            row["phases"] = {}
            for phase in COPIED_PHASES:
                row["phases"][phase] = _measure_model(bench, phase, COPY_SECONDS)[0]
                report(row)
            return row
        ours, timed = _measure_model(bench, cell.phase, seconds_for_a_number(device))
        row |= ours
        if cell.phase == "training" and device == "cuda":
            row["memory"] = memory(bench)
        row["baselines"] = {}
        for baseline in BASELINES:
            if baseline.applies(cell, device):
                row["baselines"][baseline.name] = _measure_baseline(bench, baseline, cell.phase, row)
                report(row)
        row["repeat_ms"] = timing.time_call(timed, device, seconds_for_a_number(device)).ms
        return row
    finally:
        for parameter in bench.parameters:
            parameter.grad = None


def _measure_model(bench: Bench, phase: str, seconds: float) -> tuple[dict[str, Any], Timed]:
    """Our own part of a row, and what was timed."""
    problem, device = bench.problem, bench.device
    plan = bench.model.explain(problem.rows, bench.dtype)
    timed = bench.timed(bench.model, phase)
    row = {"path": plan.path, "reason": plan.reason, "precision": plan.precision, "sets": timed.sets}
    row |= bench.verify(timed, phase)
    measured = timing.time_call(timed, device, seconds)
    row |= measured.as_dict()
    row |= against_floor(work_of(problem, phase, device), timing.ceilings(device, problem.dtype), measured.kernel_ms)
    row["copy"] = None
    if device == "cuda":
        row["copy"] = {
            kind: reading | {"to_kernel": reading["ms"] / measured.kernel_ms} for kind, reading in bench.copies.items()
        }
    return row, timed


def _measure_gemm(row: dict[str, Any], gemm: Gemm, report: Report) -> dict[str, Any]:
    """The row of a kernel by itself."""
    release(gemm.device)
    timed = gemm.timed("ours")
    row |= {"tile": str(gemm.tile), "precision": gemm.precision, "sets": timed.sets} | verify_gemm(gemm)
    measured = timing.time_call(timed, gemm.device)
    ceilings = timing.ceilings(gemm.device, gemm.problem.dtype)
    row |= measured.as_dict() | against_floor(gemm.plan.work, ceilings, measured.kernel_ms)
    row["baselines"] = {}
    for name in GEMM_BASELINES:
        row["baselines"][name] = _beside(row, timing.time_call(gemm.timed(name), gemm.device))
        report(row)
    row["repeat_ms"] = timing.time_call(timed, gemm.device).ms
    if gemm.problem.dtype == "fp32":
        row["errors"] = gemm.errors()
    return row


def _beside(ours: dict[str, Any], measured: timing.Timing) -> dict[str, Any]:
    """A baseline's timing, and how many times ours it takes."""
    ratios = {"speedup": measured.ms / ours["ms"], "kernel_speedup": measured.kernel_ms / ours["kernel_ms"]}
    return measured.as_dict() | ratios


def memory(bench: Bench) -> dict[str, Any]:
    """Bytes of a forward and backward, ours and eager's (see the top of this file)."""
    ours, eager = _memory(bench, bench.model), _memory(bench, bench.eager)
    ratios = {f"{name}_ratio": ours[f"{name}_bytes"] / eager[f"{name}_bytes"] for name in ("kept", "peak")}
    return {"ours": ours, "eager": eager, **ratios}


def _memory(bench: Bench, module: nn.Module) -> dict[str, int]:
    x, dy, parameters = bench.inputs[0], bench.gradients[0], bench.parameters
    synchronize(bench.device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = module(x)
    kept = torch.cuda.memory_allocated() - before
    gradients = torch.autograd.grad(y, parameters, dy)
    peak = torch.cuda.max_memory_allocated() - before
    del y, gradients
    return {"kept_bytes": kept, "peak_bytes": peak}


def _measure_baseline(bench: Bench, baseline: Baseline, phase: str, ours: dict[str, Any]) -> dict[str, Any]:
    """A baseline's part of a row; {"error": text} where it fails, out of memory or otherwise. `ours` is that row.

    Raises what it failed with where that left the device unusable: nothing after it would run.
    """
    try:
        timed = baseline.build(bench, phase)
        row = bench.verify(timed, phase, baseline.reference(bench.eager))
        if baseline.name.startswith("compile"):  # one graph for inference, one for the three phases with gradients
            graph = baseline.name, phase == "forward"
            row["compile_s"] = bench.compile_seconds.setdefault(graph, row["first_call_s"])
        row |= _beside(ours, timing.time_call(timed, bench.device, seconds_for_a_number(bench.device)))
    except Exception as error:
        row = {"error": describe(error)}
    finally:
        timed = None  # type: ignore[assignment]  # frees a graph's pool before the next baseline asks for memory
        for parameter in bench.parameters:
            parameter.grad = None
        synchronize(bench.device)
        release(bench.device)
    return row


def describe(error: BaseException) -> str:
    """The error's class and the first lines of its text."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:500]}"


def _fresh(cell: Cell, device: str, *, cpu: bool = True) -> dict[str, Any]:
    """Seconds by name from fresh.py; but for a lecture twice: Triton's cache empty ("cold"), then filled ("warm").

    `cpu` is whether a lecture on the GPU is set beside the same product on the CPU.
    """
    problem = cell.problem
    command = [sys.executable, "-m", "bench.fresh", cell.phase, "--rows", str(problem.rows), "--dtype", problem.dtype]
    command += ["--activation", problem.activation, "--widths", *map(str, problem.widths)]
    if cell.phase == "lecture":
        command += ["--gpu"] * (device == "cuda") + ["--cpu"] * (cpu or device == "cpu")
        return _json_of(command)
    with tempfile.TemporaryDirectory() as cache:
        return {state: _json_of(command, TRITON_CACHE_DIR=cache) for state in ("cold", "warm")}


def _json_of(command: Sequence[str], **environment: str) -> Any:
    """The last line that a child process prints; RuntimeError with the end of its stderr where it fails."""
    child = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=FRESH_SECONDS
    )
    if child.returncode:
        raise RuntimeError(f"{' '.join(command[1:4])} ended with status {child.returncode}: {child.stderr[-500:]}")
    return json.loads(child.stdout.splitlines()[-1])
