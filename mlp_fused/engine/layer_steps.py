"""The steps of a layer: forward, dz of its output, dgrad, wgrad; each a kernel, or torch's product and what follows it.

z = h_below W^T + b, h = a(z)                        forward
dz = dh ⊙ a'(saved)                                  output_gradient, of the network's last layer
dz_below = (dz W) ⊙ a_below'(saved_below)            dgrad
dW = dz^T h_below, db = Σ_rows dz                    wgrad
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..kernels import layer_tiles
from ..kernels.activation import Activation
from ..kernels.activations import IDENTITY
from ..kernels.devices import Device
from ..kernels.dropout import Dropout, keeps_preactivation
from ..kernels.layer_backward import dgrad, output_gradient, wgrad_products, wgrad_sums
from ..kernels.layer_forward import layer_forward, pointwise
from ..kernels.partial_sums import Partial, sum_partials, sum_partials_tile
from ..kernels.tile_config import Kind, Problem
from . import tables
from .schedule import Schedule, Step, Work, Writer
from .torch_products import cast_by_torch, dgrad_by_torch, linear_by_torch, linear_relu_by_torch, wgrad_by_torch

if TYPE_CHECKING:
    from ..reference import Layer

__all__ = [
    "Choose", "LayerSpec", "Parameters", "cast_step", "choose_tile", "dgrad_steps", "forward_steps",
    "output_gradient_step", "parameters_of", "product_schedule", "sum_step", "wgrad_steps",
]  # fmt: skip


class Parameters(NamedTuple):
    """The dtypes and strides of a layer's parameters: a schedule holds for parameters that lie so in memory."""

    weight: torch.dtype
    weight_stride: tuple[int, ...]
    bias: torch.dtype | None
    bias_stride: int


def parameters_of(layers: Sequence[Layer]) -> tuple[Parameters, ...]:
    """The dtypes and strides of the layers' parameters."""
    return tuple(
        Parameters(
            weight.dtype,
            tuple(map(int, weight.stride())),
            None if bias is None else bias.dtype,
            0 if bias is None else int(bias.stride(0)),
        )
        for weight, bias, *_ in layers
    )


Choose = Callable[[Problem], tables.Choice]  # a tile for a problem, or torch


def choose_tile(problem: Problem, device: Device, torch_too: bool) -> tables.Choice:
    """The tile for a problem on a device, or torch where that is expected to be faster, if it may be taken."""
    if problem.kind == "output_gradient":
        return tables.Choice(layer_tiles.choose(problem, device), "")
    choice = tables.choice_for(problem, device)
    if choice.tile is None and not torch_too:
        return tables.Choice(layer_tiles.choose(problem, device), "asked for")
    return choice


@dataclass(frozen=True)
class LayerSpec:
    """One layer of a path.

    Attributes:
        index: which one, from 0.
        below: the layer below's activation; the identity for the first layer.
        activation: its own.
        dtype: what it computes in.
        precision: torch's setting for fp32.
        width_in, width_out: how wide.
        parameters: of which dtypes they are, which their gradients have.
        dropout: of its output; None where nothing is dropped.
        dropout_below: of the layer below's.
    """

    index: int
    below: Activation
    activation: Activation
    dtype: torch.dtype
    precision: str
    width_in: int
    width_out: int
    parameters: Parameters
    dropout: Dropout | None
    dropout_below: Dropout | None

    @functools.cached_property
    def keeps_z(self) -> bool:
        """True if the pre-activation is kept for backward, rather than the output."""
        return keeps_preactivation(self.activation, self.dropout)

    @functools.cached_property
    def below_keeps_z(self) -> bool:
        return keeps_preactivation(self.below, self.dropout_below)

    @property
    def name(self) -> str:
        return f"layer {self.index} ({self.activation})"

    @property
    def label(self) -> str:
        return f"{self.index}: {self.width_in} -> {self.width_out}"

    def problem(
        self, kind: Kind, m: int, n: int, k: int = 0, aligned: bool = True, activation: Activation = IDENTITY
    ) -> Problem:
        """A problem of this layer: an (m, n) output and a reduction of length k."""
        precision = self.precision if k else "ieee"
        return Problem(kind, m, n, k, self.dtype, precision, aligned, activation.name)

    def step(
        self,
        kind: str,
        operands: Mapping[str, Any],
        writes: tuple[str, ...],
        run: Callable[..., Any],
        work: Work,
        problem: Problem,
        choice: tables.Choice,
    ) -> Step:
        """A step of this layer."""
        return Step(kind, self.name, self.label, operands, writes, run, work, problem, choice.tile, choice.source)


def cast_step(spec: LayerSpec, writer: Writer, cast: str) -> Step:
    """A weight as the kernels read it: in the dtype that they compute in."""
    elements = spec.width_in * spec.width_out
    writer.allocate(cast, spec.width_out, spec.width_in)
    operands = {"weight": f"weight[{spec.index}]", "cast": cast}
    work = Work(0, elements * (spec.parameters.weight.itemsize + spec.dtype.itemsize))
    return Step("cast", spec.name, spec.label, operands, ("cast",), cast_by_torch, work)


def forward_steps(
    spec: LayerSpec, writer: Writer, x: str, weight: str, h: str, z: str | None, choose: Choose
) -> list[Step]:
    """h = a(x Wᵀ + b), and z where it is kept: one kernel, or torch's product and a(·) as a kernel."""
    rows, n, k = writer.rows, spec.width_out, spec.width_in
    bias = writer.has(f"bias[{spec.index}]")
    are_describable = writer.are_describable(x, weight, h, z)
    problem = spec.problem("forward", rows, n, k, are_describable, spec.activation)
    choice = choose(problem)
    elements = rows * k + n * k + n * (bias is not None) + (1 + (z is not None)) * rows * n
    work = Work(2 * rows * n * k, elements * spec.dtype.itemsize)
    operands: dict[str, Any] = {"x": x, "weight": weight, "bias": bias}
    if choice.tile is not None:
        options: dict[str, Any] = {"activation": spec.activation, "precision": spec.precision, "tile": choice.tile}
        run = partial(layer_forward, **options, dropout=spec.dropout)
        operands |= {"h": h, "z": z, **_seed(spec.dropout)}
        return [spec.step("forward", operands, ("h", "z"), run, work, problem, choice)]
    is_plain_relu = spec.activation.name == "relu" and spec.dropout is None
    if is_plain_relu and z is None and bias is not None and writer.on_gpu:
        return [spec.step("forward", operands | {"h": h}, ("h",), linear_relu_by_torch, work, problem, choice)]
    product = z or h
    steps = [spec.step("forward", operands | {"z": product}, ("z",), linear_by_torch, work, problem, choice)]
    if spec.activation is not IDENTITY or spec.dropout is not None:
        pass_over = spec.problem("output_gradient", rows, n)
        choice = choose(pass_over)
        run = partial(pointwise, activation=spec.activation, tile=choice.tile, dropout=spec.dropout)
        moved = Work(0, 2 * rows * n * spec.dtype.itemsize)
        names = {"z": product, "h": h, **_seed(spec.dropout)}
        steps.append(spec.step("activation", names, ("h",), run, moved, pass_over, choice))
    return steps


def output_gradient_step(spec: LayerSpec, writer: Writer, dh: str, saved: str | None, dz: str, choose: Choose) -> Step:
    """dz = dh ⊙ a'(saved), through Dropout."""
    rows, n = writer.rows, spec.width_out
    problem = spec.problem("output_gradient", rows, n)
    choice = choose(problem)
    run = partial(output_gradient, activation=spec.activation, tile=choice.tile, dropout=spec.dropout)
    operands = {"dh": dh, "saved": saved, "dz": dz, "h": None, **_seed(spec.dropout)}
    work = Work(0, (2 + (saved is not None)) * rows * n * spec.dtype.itemsize)
    return spec.step("output_gradient", operands, ("dz",), run, work, problem, choice)


def dgrad_steps(
    spec: LayerSpec,
    writer: Writer,
    dz: str,
    weight: str,
    saved: str | None,
    dx: str,
    rebuilt: str | None,
    choose: Choose,
) -> list[Step]:
    """dx = (dz W) ⊙ a_below'(saved), and the layer below's output again: one kernel, or torch's product and one."""
    rows, n, k = writer.rows, spec.width_out, spec.width_in
    are_describable = writer.are_describable(dz, weight, saved, dx, rebuilt)
    problem = spec.problem("dgrad", rows, k, n, are_describable, spec.below)
    choice = choose(problem)
    tensors = 1 + (saved is not None) + (rebuilt is not None)
    work = Work(2 * rows * n * k, (rows * n + n * k + tensors * rows * k) * spec.dtype.itemsize)
    operands: dict[str, Any] = {"dz": dz, "weight": weight}
    if choice.tile is not None:
        options: dict[str, Any] = {"below": spec.below, "precision": spec.precision, "tile": choice.tile}
        run = partial(dgrad, **options, dropout=spec.dropout_below)
        operands |= {"saved": saved, "dx": dx, "h": rebuilt, **_seed(spec.dropout_below)}
        return [spec.step("dgrad", operands, ("dx", "h"), run, work, problem, choice)]
    steps = [spec.step("dgrad", operands | {"dx": dx}, ("dx",), dgrad_by_torch, work, problem, choice)]
    if saved is not None or spec.dropout_below is not None:
        pass_over = spec.problem("output_gradient", rows, k)
        choice = choose(pass_over)
        run = partial(output_gradient, activation=spec.below, tile=choice.tile, dropout=spec.dropout_below)
        moved = Work(0, (1 + tensors) * rows * k * spec.dtype.itemsize)
        names = {"dh": dx, "saved": saved, "dz": dx, "h": rebuilt, **_seed(spec.dropout_below)}
        steps.append(spec.step("derivative", names, ("dz", "h"), run, moved, pass_over, choice))
    return steps


def _seed(dropout: Dropout | None) -> dict[str, str]:
    """The operand of a step that drops."""
    return {"seed": "seed"} if dropout else {}


def wgrad_steps(
    spec: LayerSpec, writer: Writer, dz: str, h: str, dw: str | None, db: str | None, choose: Choose
) -> list[Step]:
    """dW = dzᵀ h and db = Σ_rows dz: one kernel, and where it splits the rows one that adds its partial sums."""
    rows, n, k = writer.rows, spec.width_out, spec.width_in if dw else 1
    problem = spec.problem("wgrad", n, k, rows, writer.are_describable(dz, h if dw else None))
    choice = choose(problem)
    size_w, size_b = n * k * (dw is not None), n * (db is not None)
    elements = rows * n + rows * k * (dw is not None) + size_w + size_b
    work = Work(2 * rows * size_w, elements * spec.dtype.itemsize)
    operands: dict[str, Any] = {"dz": dz, "h": h if dw else None, "dw": dw, "db": db}
    if choice.tile is None:
        return [spec.step("wgrad", operands, ("dw", "db"), wgrad_by_torch, work, problem, choice)]
    sums = wgrad_sums(rows, choice.tile, spec.dtype, size_w, size_b)
    run = partial(wgrad_products, width_in=k, tile=choice.tile, partial=sums)
    if dw is None:  # the kernel takes a tensor, and does not read it
        operands["h"] = dz
    if sums.splits == 1:
        return [spec.step("wgrad", operands, ("dw", "db"), run, work, problem, choice)]
    whole = writer.share(f"partial[{spec.index}]", "partial", sums.splits, sums.columns, dtype=sums.dtype)
    operands["dw"] = whole if dw else None
    if db:
        shape, strides = (sums.splits, n), (sums.columns, 1)
        operands["db"] = writer.part(f"partial db[{spec.index}]", "partial", sums.start_b, *shape, strides=strides)
    totals = tuple(total for total in (dw, db) if total)
    return [
        spec.step("wgrad", operands, ("dw", "db"), run, work, problem, choice),
        sum_step(spec.name, spec.label, whole, totals, sums, sums.starts),
    ]


def sum_step(
    name: str, label: str, whole: str, totals: tuple[str, ...], sums: Partial, starts: Sequence[int] | None = None
) -> Step:
    """Add partial sums of gradients, in a fixed order."""
    work = Work(0, sums.splits * sums.columns * sums.dtype.itemsize)
    run = partial(sum_partials, starts=starts)
    operands = {"partial": whole, "sums": totals}
    return Step("sum_partials", name, label, operands, ("sums",), run, work, None, sum_partials_tile(sums.splits))


def product_schedule(
    kind: str, tensors: Sequence[Any], activation: Activation, precision: str, choose: Choose
) -> Schedule:
    """One product over tensors that are all given: for measuring it.

    Args:
        tensors: forward: x, W, b, h, z; dgrad: dz, W, saved, dx, h; wgrad: dz, h, dW, db. The last of each may be None.
        activation: the layer's own in a forward, the one below in a dgrad.
    """
    a, b, c, d, e = (*tensors, None)[:5]
    rows, dtype = a.shape[0], a.dtype
    k, n = (b.shape[1], a.shape[1]) if kind != "forward" else (a.shape[1], b.shape[0])
    own, below = (activation, IDENTITY) if kind == "forward" else (IDENTITY, activation)
    spec = LayerSpec(0, below, own, dtype, precision, k, n, Parameters(dtype, (k, 1), dtype, 1), None, None)
    names = {
        "forward": ("x", "weight[0]", "bias[0]", "h", "z"),
        "dgrad": ("dz", "weight[0]", "saved", "dx", "rebuilt"),
        "wgrad": ("dz", "h", "dw", "db"),
    }[kind]
    writer = Writer(dict(zip(names, (a, b, c, d, e))), dtype, rows)
    if kind == "forward":
        writer.steps += forward_steps(spec, writer, "x", "weight[0]", "h", writer.has("z"), choose)
    elif kind == "dgrad":
        saved, rebuilt = writer.has("saved"), writer.has("rebuilt")
        writer.steps += dgrad_steps(spec, writer, "dz", "weight[0]", saved, "dx", rebuilt, choose)
    else:
        writer.steps += wgrad_steps(spec, writer, "dz", "h", writer.has("dw"), writer.has("db"), choose)
    return writer.finish()
