"""CASES: the table of problems that every numerical test uses, and the bound on their errors.

A case is a network: rows, widths, dtype, activations, bias, the memory layout of its tensors, the gradients that are
wanted, and Dropout. Its oracle is plain torch in float64. The bound allows twice torch's own error in the same dtype,
and a few roundings (`bound`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from mlp_fused.kernels.activation import Activation
from mlp_fused.kernels.activations import ACTIVATIONS
from mlp_fused.kernels.dropout import draw_seed

Layout = Literal[
    "contiguous", "transposed", "sliced", "expanded", "strided parameters", "expanded gradient", "transposed gradient",
    "one row", "3-d", "permuted 3-d",
]  # fmt: skip
Needs = Literal["everything", "parameters", "input", "first layer", "last layer", "weights", "biases", "nothing"]


@dataclass(frozen=True)
class Case:
    """One problem. `parameters` holds the hidden activation's parameters that differ from torch's defaults."""

    rows: int = 33
    widths: tuple[int, ...] = (20, 31, 17)
    dtype: torch.dtype = torch.float32
    activation: str = "relu"
    output_activation: str = "identity"
    parameters: tuple[tuple[str, float], ...] = ()
    bias: bool = True
    layout: Layout = "contiguous"
    needs: Needs = "everything"
    tf32: bool = False
    dropout: float = 0.0  # after every layer

    @property
    def id(self) -> str:
        """The sizes, the activation, and the other fields that differ from their defaults."""
        sizes = f"{self.rows}x{'-'.join(map(str, self.widths))}"
        default = Case()
        others = []
        for field in fields(self)[2:]:
            value = getattr(self, field.name)
            if value != getattr(default, field.name) or field.name == "activation":
                others.append(field.name if value is True else f"no {field.name}" if value is False else str(value))
        return ",".join([sizes, *others]).replace("torch.", "")

    @property
    def activations(self) -> list[Activation]:
        """The activation of each layer."""
        hidden = ACTIVATIONS[self.activation].bind(**dict(self.parameters))
        return [hidden] * (len(self.widths) - 2) + [ACTIVATIONS[self.output_activation]]

    @property
    def unit_roundoff(self) -> float:
        return torch.finfo(self.dtype).eps / 2


HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32)

SEED = 7  # the seed of torch's generator for cases with Dropout

# Parameters other than torch's defaults, for activations whose code branches on them.
_VARIANTS: dict[str, list[dict[str, float]]] = {
    "leaky_relu": [{"negative_slope": 0.2}, {"negative_slope": -0.5}],
    "hardtanh": [{"min_val": -0.3, "max_val": 0.7}],
    "elu": [{"alpha": 0.3}],
    "celu": [{"alpha": 2.0}],
    "softplus": [{"beta": 2.0}, {"threshold": 1.0}],
    "softshrink": [{"lambd": 0.1}],
    "hardshrink": [{"lambd": 0.1}],
    "threshold": [{"threshold": 0.2, "value": -1.0}],
}


def _cases() -> list[Case]:
    cases = []
    # Every activation, hidden and last, in every dtype.
    for name, dtype in itertools.product(ACTIVATIONS, DTYPES):
        cases.append(Case(activation=name, dtype=dtype))
        cases.append(Case(widths=(20, 17), output_activation=name, dtype=dtype))
    for name, variants in _VARIANTS.items():
        for variant, dtype in itertools.product(variants, (torch.float32, torch.bfloat16)):
            cases.append(Case(activation=name, parameters=tuple(variant.items()), dtype=dtype))
    # Every layout and every choice of gradients, for a saved output and for a saved pre-activation.
    for name in ("relu", "gelu"):
        wide = Case(activation=name, widths=(20, 31, 24, 17), output_activation=name)
        for layout in Layout.__args__:
            cases.append(replace(wide, layout=layout))
        for needs in Needs.__args__:
            cases.append(replace(wide, needs=needs))
            cases.append(replace(wide, needs=needs, dtype=torch.bfloat16, output_activation="identity"))
        cases.append(replace(wide, bias=False))
        cases.append(replace(wide, bias=False, dtype=torch.float16, needs="parameters"))
        cases.append(replace(wide, tf32=True))
    # Sizes: zero, one, odd, around the side of a tile; one layer and many layers.
    for rows in (0, 1, 2, 15, 16, 17, 64, 65, 130):
        cases.append(Case(rows=rows, activation="tanh"))
        cases.append(Case(rows=rows, activation="silu", dtype=torch.bfloat16, output_activation="silu"))
    for widths in ((1, 1), (1, 1, 1), (5, 1), (1, 7), (64, 64), (129, 65), (33, 100, 1), (3, 130, 70, 2), (8,) * 7):
        for dtype in DTYPES:
            cases.append(Case(widths=widths, dtype=dtype, activation="gelu"))
        cases.append(Case(rows=1, widths=widths, output_activation="sigmoid"))
    # Further cases of network kernels: a wide input, hidden layers at the limits, more rows than all programs take at
    # once.
    for dtype in DTYPES:
        cases.append(Case(widths=(300, 24, 10), dtype=dtype))
        cases.append(Case(widths=(20, 200, 10), dtype=dtype, activation="gelu"))
        cases.append(Case(rows=2100, widths=(5, 16, 7), dtype=dtype, activation="gelu"))
    cases.append(Case(rows=1100, widths=(300, 24, 33, 10), dtype=torch.bfloat16, output_activation="silu"))
    # Dropout after every layer: if the output is saved, if z is saved, and if z is saved only because of Dropout.
    for name in ("identity", "relu", "gelu", "tanh"):
        for dtype in (torch.float32, torch.bfloat16):
            cases.append(Case(activation=name, output_activation=name, dtype=dtype, dropout=0.3))
    cases.append(Case(activation="relu6", output_activation="relu6", dtype=torch.float16, dropout=0.3))
    wide = Case(activation="tanh", widths=(20, 31, 24, 17), output_activation="relu", dropout=0.3)
    for layout in ("transposed", "sliced", "expanded gradient", "3-d"):
        cases.append(replace(wide, layout=layout))
    for needs in Needs.__args__:
        cases.append(replace(wide, needs=needs))
    for needs in ("parameters", "input", "first layer"):
        cases.append(replace(wide, needs=needs, activation="relu", output_activation="identity"))
    # If nine of ten elements are dropped, one row has too few for a norm: with torch's products, 4 of 300 random draws
    # of tensors and masks exceeded the bound. With 64 rows, or with one row that keeps half, none did.
    for rows, p in ((0, 0.9), (1, 0.5), (64, 0.9), (130, 0.9)):
        cases.append(Case(rows=rows, activation="silu", dtype=torch.bfloat16, dropout=p))
    # For network kernels too: a wide input, and several tiles of rows for each program.
    for name in ("relu", "gelu"):
        cases.append(Case(rows=130, widths=(300, 24, 33, 10), dtype=torch.bfloat16, activation=name, dropout=0.3))
        cases.append(Case(rows=2100, widths=(5, 16, 7), activation=name, dropout=0.3))
    for widths in ((1, 1), (3, 130, 70, 2)):
        cases.append(Case(widths=widths, dropout=0.5))
        cases.append(Case(widths=widths, dropout=1.0))
    return list(dict.fromkeys(cases))


@dataclass
class Data:
    """The tensors of a case: x, weights, biases (or None) and dy. Those that need a gradient have requires_grad."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    dy: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Every input by name: x, W0, b0, W1 …"""
        named = {"x": self.x}
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            named[f"W{index}"] = weight
            if bias is not None:
                named[f"b{index}"] = bias
        return named

    def to(self, dtype: torch.dtype) -> Data:
        """Fresh leaves of another dtype with the same values."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype).clone().requires_grad_(tensor.requires_grad)

        return Data(
            leaf(self.x),
            [leaf(weight) for weight in self.weights],
            [None if bias is None else leaf(bias) for bias in self.biases],
            self.dy.detach().to(dtype),
        )


def philox(seed: int, counter: Sequence[numpy.ndarray], rounds: int) -> list[numpy.ndarray]:
    """Philox 4x32: four random 32-bit numbers, computed from a counter of four 32-bit words and a 64-bit key.

    Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
    """
    c = [numpy.asarray(word, numpy.uint64) for word in counter]
    keys = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(rounds):
        first, second = c[0] * numpy.uint64(0xD2511F53), c[2] * numpy.uint64(0xCD9E8D57)
        high = [second >> numpy.uint64(32), first >> numpy.uint64(32)]
        low = [second & numpy.uint64(0xFFFFFFFF), first & numpy.uint64(0xFFFFFFFF)]
        c = [high[0] ^ c[1] ^ numpy.uint64(keys[0]), low[0], high[1] ^ c[3] ^ numpy.uint64(keys[1]), low[1]]
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def factors(seed: int, layer: int, rows: int, width: int, p: float, first: int = 0) -> Tensor:
    """The factors of Dropout in float64, (rows, width): 1 / (1 - p) where an element is kept, else 0.

    `first` is the index of the first row.
    """
    row, column = numpy.meshgrid(numpy.arange(first, first + rows), numpy.arange(width), indexing="ij")
    block = column // 16 * 4 + column // 2 % 4
    bits = numpy.stack(philox(seed, [block, row, numpy.full_like(row, layer), numpy.zeros_like(row)], 7))
    lane = column // 8 % 2 * 2 + column % 2
    uniform = numpy.take_along_axis(bits, lane[None], 0)[0] // 2**8 / 2**24
    return torch.from_numpy((uniform < numpy.float32(1 - p)) / (1 - p or 1.0))


def dropout_factors(case: Case, device: torch.device | str) -> list[Tensor]:
    """The factors of each layer of a case, when kernels draw from torch's generator at SEED."""
    torch.manual_seed(SEED)
    seed = int(draw_seed(torch.device(device)))
    return [
        factors(seed, layer, case.rows, width, case.dropout).to(device)
        if case.dropout
        else torch.ones((), dtype=torch.float64, device=device)
        for layer, width in enumerate(case.widths[1:])
    ]


def through_torch(case: Case, data: Data) -> Tensor:
    """y in plain torch, in the dtype of `data`. Dropout multiplies the rounded output and is rounded, as in torch."""
    h = data.x.reshape(-1, data.x.shape[-1])
    for weight, bias, activation, factor in zip(
        data.weights, data.biases, case.activations, dropout_factors(case, data.x.device)
    ):
        h = activation(F.linear(h, weight, bias))
        if case.dropout:
            wide = torch.promote_types(h.dtype, torch.float32)
            h = (h.to(wide) * factor.to(wide)).to(h.dtype)
    return h.view(*data.x.shape[:-1], h.shape[-1])


def make(case: Case, device: str = "cpu", seed: int = 0) -> Data:
    """Random tensors for a case. Rows with a pre-activation next to a kink are drawn again."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype)

    weights = [draw(n, k) / max(1, k) ** 0.5 for k, n in itertools.pairwise(case.widths)]
    biases: list[Tensor | None] = [draw(n) / 2 if case.bias else None for n in case.widths[1:]]
    distinct = min(case.rows, 1) if case.layout == "expanded" else 1 if case.layout == "one row" else case.rows
    x = draw(distinct, case.widths[0])
    layer_factors = [factor.cpu() for factor in dropout_factors(case, device)]
    for _ in range(1000):
        near = _near_kink(case, x, weights, biases, layer_factors)
        if not near.any():
            break
        x[near] = draw(int(near.sum()), case.widths[0])
    else:
        raise AssertionError(f"{case.id}: no rows clear of the kinks were found")
    rows = x.shape[0] if case.layout != "expanded" else case.rows
    dy = draw(rows, case.widths[-1])

    if case.layout == "strided parameters":
        weights = [_strided(weight) for weight in weights]
        biases = [bias if bias is None else torch.stack([bias, -bias], 1).flatten()[::2] for bias in biases]
    x, dy = x.to(device), dy.to(device)
    weights = [_keep_strides(weight, device) for weight in weights]
    biases = [bias if bias is None else _keep_strides(bias, device) for bias in biases]
    x, dy = _lay_out(case.layout, x, dy, case.rows)

    x = x.detach().requires_grad_(case.needs in ("everything", "input"))
    last = len(weights) - 1
    for index in range(last + 1):
        layer = (
            case.needs in ("everything", "parameters")
            or (case.needs == "first layer" and index == 0)
            or (case.needs == "last layer" and index == last)
        )
        weights[index] = weights[index].detach().requires_grad_(layer or case.needs == "weights")
        bias = biases[index]
        if bias is not None:
            biases[index] = bias.detach().requires_grad_(layer or case.needs == "biases")
    return Data(x, weights, biases, dy)


def _strided(weight: Tensor) -> Tensor:
    """A tensor with the same values, in column-major order with a stride of two."""
    n, k = weight.shape
    storage = torch.full((k, 2 * n), torch.nan, dtype=weight.dtype)
    storage[:, ::2] = weight.t()
    return storage[:, ::2].t()


def _keep_strides(tensor: Tensor, device: str) -> Tensor:
    if device == "cpu" or tensor.is_contiguous():
        return tensor.to(device)
    size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
    storage = torch.full((size,), torch.nan, dtype=tensor.dtype, device=device)
    return storage.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def _lay_out(layout: Layout, x: Tensor, dy: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    if layout == "transposed":
        return x.t().contiguous().t(), dy
    if layout == "sliced":
        wide = torch.full((x.shape[0] + 3, 2 * x.shape[1] + 1), torch.nan, dtype=x.dtype, device=x.device)
        view = wide[2:-1, 1::2]
        return view.copy_(x), dy
    if layout == "expanded":
        return x.expand(rows, x.shape[1]), dy
    if layout == "expanded gradient":
        return x, dy[:1, :1].expand_as(dy) if dy.numel() else dy
    if layout == "transposed gradient":
        return x, dy.t().contiguous().t()
    if layout == "one row":
        return x[0], dy[0]
    if layout in ("3-d", "permuted 3-d"):
        shape = (3, rows // 3)
        x, dy = x.view(*shape, x.shape[1]), dy.view(*shape, dy.shape[1])
        return (x, dy) if layout == "3-d" else (x.transpose(0, 1), dy.transpose(0, 1))
    return x, dy


def _near_kink(
    case: Case, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], layer_factors: Sequence[Tensor]
) -> Tensor:
    """A mask of the rows with a pre-activation so near a kink that rounding decides its side."""
    h = x.double()
    near = torch.zeros(h.shape[0], dtype=torch.bool)
    for weight, bias, activation, factor in zip(weights, biases, case.activations, layer_factors):
        wide, shift = weight.double(), 0 if bias is None else bias.double()
        z = h @ wide.t() + shift
        scale = (h.square() @ wide.t().square() + (shift * shift)).sqrt()
        for kink in activation.kinks(*activation.values):
            near |= ((z - kink).abs() <= 4 * case.unit_roundoff * (scale + abs(kink))).any(1)
        h = activation(z) * factor
    return near


@dataclass
class Truth:
    """The float64 oracle: y and every gradient by name, each with the magnitude that its rounding errors scale with."""

    values: dict[str, Tensor]
    magnitudes: dict[str, Tensor]


def oracle(case: Case, data: Data) -> Truth:
    """y, dx, dW and db in float64, each with its magnitude, such as |x||W|ᵀ + |b| for y."""
    wide = data.to(torch.float64)
    inputs, zs = [], []
    h = wide.x.reshape(-1, wide.x.shape[-1])
    for weight, bias, activation, factor in zip(
        wide.weights, wide.biases, case.activations, dropout_factors(case, wide.x.device)
    ):
        inputs.append(h)
        z = F.linear(h, weight, bias)
        if z.requires_grad:
            z.retain_grad()
        zs.append(z)
        h = activation(z) * factor
    y = h.view(*wide.x.shape[:-1], h.shape[-1])
    if y.requires_grad:
        y.backward(wide.dy)
    values, magnitudes = {"y": y.detach()}, {}
    with torch.no_grad():
        bias = wide.biases[-1]
        magnitude = F.linear(inputs[-1].abs(), wide.weights[-1].abs(), None if bias is None else bias.abs())
        magnitudes["y"] = magnitude.view_as(y)
        for name, leaf in wide.leaves.items():
            if leaf.grad is None:
                continue
            values[name] = leaf.grad
            index = int(name[1:] or 0)
            dz = zs[index].grad
            assert dz is not None
            dz = dz.abs()
            if name == "x":
                magnitudes[name] = (dz @ wide.weights[0].abs()).view_as(leaf)
            else:
                magnitudes[name] = dz.t() @ inputs[index].abs() if name[0] == "W" else dz.sum(0)
    return Truth(values, magnitudes)


def gradients(data: Data, y: Tensor) -> dict[str, Tensor]:
    """y, and the gradient of every leaf that requires one, after y.backward(dy)."""
    if y.requires_grad:
        y.backward(data.dy)
    results = {"y": y.detach()}
    results.update({name: leaf.grad for name, leaf in data.leaves.items() if leaf.grad is not None})
    return results


def bound(true: Tensor, torchs: Tensor, magnitude: Tensor, unit_roundoff: float, norm: float) -> float:
    """The error allowed in a norm: twice torch's own, a rounding of the result, and four fp32 roundings of the sum."""
    parts = ((2, torchs.double() - true), (unit_roundoff, true), (4 * 2**-24, magnitude))
    return sum(factor * torch.linalg.vector_norm(part, norm).item() for factor, part in parts)


def check(case: Case, truth: Truth, ours: dict[str, Tensor], torchs: dict[str, Tensor]) -> None:
    """Check every tensor against the bound, by norm and in its largest entry.

    A failure states the case, the error and the bound.
    """
    assert ours.keys() == truth.values.keys(), f"{case.id}: gradients of {list(ours)}, wanted {list(truth.values)}"
    for name, true in truth.values.items():
        assert ours[name].shape == true.shape, (
            f"{case.id}: {name} is {tuple(ours[name].shape)}, not {tuple(true.shape)}"
        )
        if true.numel() == 0:
            continue
        for norm, kind in ((2, "norm"), (torch.inf, "largest entry")):
            error = torch.linalg.vector_norm(ours[name].double() - true, norm).item()
            limit = bound(true, torchs[name], truth.magnitudes[name], case.unit_roundoff, norm)
            assert error <= limit, f"{case.id}: {kind} of the error of {name} is {error:.3e}, the bound {limit:.3e}"


CASES = _cases()
assert len({case.id for case in CASES}) == len(CASES), "two cases have one id"
