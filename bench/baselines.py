"""The baselines of a network: eager, PyTorch's fused epilogue, CUDA graphs, torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.network import Bench
from bench.problem import Cell
from mlp_fused.capture import capture_step
from mlp_fused.timing import Timed

GRAPHED_SETS = 8  # the maximum number of inputs of a CUDA graph; each needs a capture of its own


@dataclass(frozen=True)
class Baseline:
    """A baseline.

    Attributes:
        name: its name.
        build: a function (bench, phase) that returns the call to time.
        applies: a function (cell, device) that returns True if the baseline is measured in that cell.
        reference: a function that makes, from the eager network, the network with which the results are compared.
    """

    name: str
    build: Callable[[Bench, str], Timed]
    applies: Callable[[Cell, str], bool] = lambda cell, device: device == "cuda"
    reference: Callable[[nn.Sequential], nn.Sequential] = lambda eager: eager


def addmm_activation(bench: Bench) -> Callable[[Tensor], Tensor]:
    """Return a forward with PyTorch's fused epilogue in hidden layers. On CUDA its gelu is always the tanh form."""
    layers = [child for child in bench.eager if isinstance(child, nn.Linear)]
    use_gelu = bench.problem.activation == "gelu"

    def forward(x: Tensor) -> Tensor:
        for layer in layers[:-1]:
            x = torch._addmm_activation(layer.bias, x, layer.weight.t(), use_gelu=use_gelu)
        return torch.addmm(layers[-1].bias, x, layers[-1].weight.t())

    return forward


def tanh_gelu(model: nn.Sequential) -> nn.Sequential:
    """Return the network with gelu in its tanh form, and the same parameters."""
    return nn.Sequential(*(nn.GELU("tanh") if isinstance(child, nn.GELU) else child for child in model))


def graphed(timed: Timed, parameters: Sequence[nn.Parameter] = ()) -> Timed:
    """Capture the calls as CUDA graphs, one for each input. The untimed setup is captured as a separate graph."""
    sets = min(timed.sets, GRAPHED_SETS)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # handles, workspaces and optimizer state must be allocated before the capture
            timed.prepare(0)
            timed(0)
    torch.cuda.current_stream().wait_stream(stream)
    # The graphs can share one pool, because replays do not overlap and only the outputs of the last graph are read.
    pool = torch.cuda.graph_pool_handle()
    setups, graphs, outputs = [], [], None
    for i in range(sets):
        outputs = None
        for parameter in parameters:
            parameter.grad = None  # like `outputs = None`, returns the memory of the previous capture to the pool
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
    """torch.compile for static shapes. Without fullgraph=True, dynamo could fall back to eager silently."""

    def build(bench: Bench, phase: str) -> Timed:
        if mode not in bench.compiled:
            bench.compiled[mode] = torch.compile(bench.eager, dynamic=False, fullgraph=True, mode=mode)
        return bench.timed(bench.compiled[mode], phase)

    return build


def captured(
    select_model: Callable[[Bench], nn.Module], capture: Callable[..., Any] = capture_step
) -> Callable[[Bench, str], Timed]:
    """`capture_step` of a network: each call copies its batch and launches one CUDA graph."""

    def build(bench: Bench, phase: str) -> Timed:
        inputs, targets, parameters = bench.inputs, bench.targets, bench.parameters
        step = capture(select_model(bench), F.cross_entropy, bench.optimizer(), inputs[0], targets[0])
        step(inputs[0], targets[0])  # the first call allocates Adam's state, and is not a replay

        def call(i: int) -> tuple[Any, ...]:
            step(inputs[i], targets[i])
            return step.output, *(p.grad for p in parameters)

        return Timed(call, sets=len(inputs))

    return build


def can_capture(cell: Cell, device: str) -> bool:
    """True for steps with a loss on a GPU, the only phase that `capture_step` captures."""
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
