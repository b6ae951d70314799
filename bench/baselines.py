"""The baselines of a network: eager, torch's fused epilogue, CUDA graphs, torch.compile."""

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

GRAPHED_SETS = 8  # a CUDA graph is tied to its input's address: one capture for each input rotated


@dataclass(frozen=True)
class Baseline:
    """One side of a comparison: `build` returns the phase's function, which is verified against `reference`."""

    name: str
    build: Callable[[Bench, str], Timed]
    applies: Callable[[Cell, str], bool] = lambda cell, device: device == "cuda"
    reference: Callable[[nn.Sequential], nn.Sequential] = lambda eager: eager


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


def captured(
    model_of: Callable[[Bench], nn.Module], capture: Callable[..., Any] = capture_step
) -> Callable[[Bench, str], Timed]:
    """capture_step of a network: each call copies its batch in, and is one launch."""

    def build(bench: Bench, phase: str) -> Timed:
        inputs, targets, parameters = bench.inputs, bench.targets, bench.parameters
        step = capture(model_of(bench), F.cross_entropy, bench.optimizer(), inputs[0], targets[0])
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
