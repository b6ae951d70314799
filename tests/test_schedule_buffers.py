"""The buffers of the layer path: tensors share memory in turn, and each step still reads what was written for it.

Networks are drawn at random, and so is the choice between torch, kernels and planes for each product.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from random import Random

import pytest
import torch
from torch import Tensor

from mlp_fused.engine.layer_path import LayerPath, LayerSection, layer_path
from mlp_fused.engine.layer_steps import Choose, Parameters
from mlp_fused.engine.schedule import Schedule, names_in
from mlp_fused.engine.tables import Choice
from mlp_fused.kernels.activations import ACTIVATIONS
from mlp_fused.kernels.devices import DEVICES, Device
from mlp_fused.kernels.tile_config import Problem, TileConfig

NETWORKS = 100  # in a test
KERNEL = TileConfig(64, 64, 32, 8, 4, 3)
TWO_PLANES = TileConfig(128, 128, 64, 8, 8, 3, precision="fp16x3", descriptors=True)
ONE_PLANE = replace(TWO_PLANES, precision="fp16x1")


@dataclass(frozen=True, eq=False)
class DrawnPath(LayerPath):
    """A layer path that draws the tile of each product, or torch."""

    random: Random = field(default_factory=Random)

    def choose(self, device: Device) -> Choose:
        def choose(problem: Problem, written: bool) -> Choice:
            tiles: list[TileConfig | None] = [KERNEL]
            if problem.kind != "output_gradient":
                tiles.append(None)
            # A wgrad with n = 1 computes db alone, which never takes planes.
            if problem.k and problem.n > 1 and problem.aligned and problem.dtype == torch.float32:
                tiles += [ONE_PLANE, *3 * [TWO_PLANES]]
            tile = self.random.choice(tiles)
            split = self.random.choice((1, 3)) if problem.kind == "wgrad" else 1
            return Choice(tile and replace(tile, split=split), "drawn")

        return choose


def draw_path(random: Random) -> DrawnPath:
    """The path of a network of one to six layers."""
    depth = random.randint(1, 6)
    widths = tuple(random.choice((1, 4, 4)) * random.randint(1, 12) for _ in range(depth + 1))
    activations = tuple(ACTIVATIONS[random.choice(("relu", "gelu", "identity", "tanh"))] for _ in range(depth))
    dtype = random.choice((torch.float32, torch.float32, torch.bfloat16))
    parameters = []
    for width in widths[:-1]:
        stored = random.choice((dtype, torch.float32))
        parameters.append(Parameters(stored, (width, 1), *random.choice(((None, 0), (stored, 1)))))
    dropouts = tuple(random.choice((0, 0, 0.5)) for _ in range(depth))
    path = layer_path(widths, activations, tuple(parameters), dtype, "ieee", True, dropouts)
    return DrawnPath(path.layers, dtype, True, path.multiply_adds, random=random)


def draw_schedules(section: LayerSection, random: Random) -> Iterator[Schedule]:
    """The forward of a section for a random batch and random gradients, and its backward if any are wanted."""
    specs, device, rows = section.layers, DEVICES["NVIDIA H200"], random.choice((0, 1, 17, 40))
    wanted = [random.random() < 0.7 for _ in range(1 + 2 * len(specs))]
    biases = [want and spec.parameters.bias is not None for want, spec in zip(wanted[1 + len(specs) :], specs)]
    needs = (*wanted[: 1 + len(specs)], *biases)
    x, dy = (rows, section.widths[0]), (rows, section.widths[-1])
    shapes = {"h": x, "x": x, "dy": dy, "seed": (1,), **section.saved_shapes(rows, needs)}
    for spec in specs:
        shapes[f"weight[{spec.index}]"] = (spec.width_out, spec.width_in)
        if spec.parameters.bias is not None:
            shapes[f"bias[{spec.index}]"] = (spec.width_out,)
    given = {name: torch.empty(shape, dtype=section.dtype, device="meta") for name, shape in shapes.items()}
    forward = {name: given.get(name) for name in ("h", "x", "seed", *section.parameters)}
    yield section.write_forward(forward, rows, needs if any(needs) else None, device)
    if any(needs):
        backward = {name: given.get(name) for name in section.saved(needs).given}
        yield section.write_backward(backward, rows, needs, device)


class Memory:
    """The memory of a schedule: for every two bytes, the number of the tensor that was written there last."""

    def __init__(self, schedule: Schedule) -> None:
        self.buffers = schedule.buffers
        self.numbers = {name: number for number, name in enumerate(self.buffers)}
        self.words = {
            name: torch.full((buffer.size * buffer.dtype.itemsize // 2,), -1, dtype=torch.int16)
            for name, buffer in self.buffers.items()
            if buffer.base is None
        }

    def words_at(self, name: str) -> Tensor:
        buffer = self.buffers[name]
        words = buffer.dtype.itemsize // 2
        shape, stride = (*buffer.shape, words), (*(words * step for step in buffer.stride), 1)
        return self.words[buffer.base or name].as_strided(shape, stride, words * buffer.start)

    def is_given(self, name: str) -> bool:
        """True for a tensor of the caller, and for a part of one."""
        return name not in self.buffers or (self.buffers[name].base or name) not in self.words

    def holds(self, name: str) -> bool:
        """True if a tensor was written, and nothing else over it. Partial sums are written as those of dW and of db."""
        kind, _, layer = name.partition("[")
        parts = [f"partial {total}[{layer}" for total in ("dw", "db")] if kind == "partial" else [name]
        present = [part for part in parts if part in self.buffers]
        return bool(present) and all(bool((self.words_at(part) == self.numbers[part]).all()) for part in present)


@pytest.mark.parametrize("seed", range(2))
def test_no_step_overwrites_what_a_later_step_reads(seed: int) -> None:
    random = Random(seed)
    for _ in range(NETWORKS):
        path = draw_path(random)
        end = len(path.layers)
        bounds = random.choice(([0, end], list(range(end + 1))))  # one section, or one for each layer
        for section in itertools.starmap(path.section, itertools.pairwise(bounds)):
            for schedule in draw_schedules(section, random):
                memory = Memory(schedule)
                for step in schedule.steps:
                    read, written = (
                        {name for name in names_in(map(step.operands.get, arguments)) if name is not None}
                        for arguments in (step.reads, step.writes)
                    )
                    read = {name for name in read if not memory.is_given(name)}
                    assert all(map(memory.holds, read)), step
                    for name in written:
                        memory.words_at(name).fill_(memory.numbers[name])
                    assert all(map(memory.holds, read | written)), step  # a step's own operands do not overlap either
                returned = {name for name in schedule.returned if name is not None and name not in schedule.given}
                if "kept" in returned:  # it is written in parts
                    kept = {f"{'z' if is_z else 'h'}[{spec.index}]" for spec, is_z in section.kept()}
                    returned = returned - {"kept"} | kept
                assert all(map(memory.holds, returned))
