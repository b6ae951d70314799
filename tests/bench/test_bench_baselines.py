"""The baselines of a network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from stand_ins import (
    SMALL,
)
from torch import nn

from bench.baselines import BASELINES, GRAPHED_SETS, addmm_activation, captured, graphed
from bench.network import Bench
from bench.problem import ANCHORS, select
from mlp_fused.timing import Timed


def test_baselines_of_a_cell() -> None:
    def names(pattern: str, device: str = "cuda") -> list[str]:
        (cell,) = select(pattern)
        return [baseline.name for baseline in BASELINES if baseline.applies(cell, device)]

    common = ["eager", "cuda_graph", "compile"]
    steps = ["eager", "cuda_graph", "captured", "captured_eager", "compile"]
    assert names(ANCHORS[0]) == [*steps, "compile_max_autotune"]
    assert names("seed-*-m64-step") == steps
    assert names("middle-256*-relu-*-m4096-forward") == ["eager", "addmm_activation", "cuda_graph", "compile"]
    assert names("middle-256*-relu-*-m4096-backward") == common
    assert names("seed-*-m64-step", "cpu") == ["eager"]


def test_graphs_are_captured_and_replayed_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Graph:
        count = 0

        def __init__(self) -> None:
            self.number = Graph.count
            Graph.count += 1

        def replay(self) -> None:
            log.append(f"replay {self.number}")

    @contextlib.contextmanager
    def capture(graph: Graph, pool: object, stream: object) -> Iterator[None]:
        log.append(f"capture {graph.number}")
        yield

    class Stream:
        def wait_stream(self, other: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)

    def call(i: int) -> int:
        log.append(f"call {i}")
        return i

    replayed = graphed(Timed(call, lambda i: log.append(f"setup {i}"), sets=100))
    assert log[:2] == ["setup 0", "call 0"]  # warm-up
    assert log[6:10] == ["capture 0", "setup 0", "capture 1", "call 0"]
    assert replayed.sets == GRAPHED_SETS
    log.clear()
    replayed.prepare(9)
    assert replayed(9) == replayed.sets - 1  # only outputs of the last capture are still valid
    assert log == ["replay 2", "replay 3"]


def test_addmm_activation_computes_the_model() -> None:
    bench = Bench(SMALL, "cpu")
    bench.verify(bench.timed(addmm_activation(bench), "forward"), "forward")


@pytest.mark.parametrize("name", ["captured", "captured_eager"])
def test_a_captured_step_is_verified_like_any_other(name: str) -> None:
    """Use a stand-in step that runs again instead of replaying a graph."""

    class Step:
        def __init__(
            self, model: nn.Module, loss: Any, optimizer: torch.optim.Optimizer, *example: torch.Tensor
        ) -> None:
            self.model, self.loss, self.optimizer = model, loss, optimizer

        def __call__(self, x: torch.Tensor, target: torch.Tensor) -> None:
            self.optimizer.zero_grad()
            self.output = self.model(x)
            self.loss(self.output, target).backward()
            self.optimizer.step()

    bench = Bench(replace(SMALL, cross_entropy=True), "cpu")
    model = bench.model if name == "captured" else bench.eager
    timed = captured(lambda bench: model, Step)(bench, "step")
    verified, _ = bench.verify(timed, "step")
    assert verified.gradients is not None
    assert all(parameter.grad is not None for parameter in model.parameters())
