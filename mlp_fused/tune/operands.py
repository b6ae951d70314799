"""The tensors of what is measured, in several sets, and its ways: by torch, by our kernels."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..dtypes import ARITHMETIC
from ..engine import network_path
from ..engine.autograd import run_layers, run_network
from ..engine.layer_steps import product_schedule
from ..engine.paths import find_layers
from ..engine.schedule import Schedule, read
from ..engine.tables import Choice
from ..kernels import devices, layer_tiles, tile_config
from ..kernels.activations import ACTIVATIONS
from ..reference import Layer
from .tasks import Product, Whole, layer_activations

MOST_SETS = 1024  # of operands to take in turn


class Operands:
    """The tensors of a product, in several sets, and its two ways: by torch, by our kernel.

    Args:
        count: the number of sets; by default so many that each comes from memory, not from L2.
    """

    def __init__(self, product: Product, device: torch.device, count: int | None = None) -> None:
        self.kind = product.kind
        M, N, K = product.rows, product.width_out, product.width_in
        dtype, self.precision = ARITHMETIC[product.dtype]
        activation = ACTIVATIONS[product.activation]
        active, again = product.activation != "identity", activation.keeps_preactivation
        self.activation = activation
        # Shape and scale of each operand: sums of about 1. None is not needed.
        wanted: list[tuple[tuple[int, ...], float] | None]
        if self.kind == "forward":  # x, W, b, h, z
            wanted = [((M, K), 1.0), ((N, K), K**-0.5), ((N,), 1.0), ((M, N), 1.0), ((M, N), 1.0) if again else None]
        elif self.kind == "dgrad":  # dz, W, saved, dx, h
            side = ((M, K), 1.0)
            wanted = [((M, N), 1.0), ((N, K), N**-0.5), side if active else None, side, side if again else None]
        else:  # dz, h, dW, db
            wanted = [((M, N), M**-0.5), ((M, K), 1.0), ((N, K), 1.0), ((N,), 1.0)]
        self.inputs = 2 if self.kind == "wgrad" else 3  # the first tensors of a set are read, the others written
        nbytes = sum(math.prod(each[0]) for each in wanted if each) * dtype.itemsize
        self.count = _sets(device, nbytes) if count is None else count
        made = [
            _random(self.count, *each[0], dtype=dtype, device=device, scale=each[1]) if each else [None] * self.count
            for each in wanted
        ]
        self.sets: list[Any] = list(zip(*made))
        self.schedules: dict[tile_config.TileConfig | None, Schedule] = {}

    def written(self, run: Callable[[int], object]) -> list[Tensor]:
        """The tensors that a way writes, in the first set; elements that it leaves as they were are NaN."""
        results = [tensor for tensor in self.sets[0][self.inputs :] if tensor is not None]
        for result in results:
            result.fill_(torch.nan)
        run(0)
        return results

    def in_float32(self) -> list[Tensor]:
        """The results of the first set by torch in float32, from the same operands.

        In 16 bits torch's own results may be the worse side: over 2^20 rows, cuBLAS rounds partial sums to fp16.
        """
        tensors = self.sets[0]
        inputs = [None if each is None else each.float() for each in tensors[: self.inputs]]
        results = [
            None if each is None else torch.empty_like(each, dtype=torch.float32) for each in tensors[self.inputs :]
        ]
        tensors = [*inputs, *results]
        self._schedule(tensors, None).run(tensors, read(tensors)[0])
        return [each for each in results if each is not None]

    def by_torch(self, index: int) -> None:
        self.run(index, None)

    def by_kernel(self, index: int, tile: tile_config.TileConfig) -> None:
        self.run(index, tile)

    def run(self, index: int, tile: tile_config.TileConfig | None) -> None:
        """Run the product by a kernel of that tile; by torch without one."""
        tensors = self.sets[index]
        if tile not in self.schedules:
            self.schedules[tile] = self._schedule(tensors, tile)
        self.schedules[tile].run(tensors, read(tensors)[0])

    def _schedule(self, tensors: Sequence[Any], tile: tile_config.TileConfig | None) -> Schedule:
        device = devices.device_of(tensors[0])

        def choose(problem: tile_config.Problem) -> Choice:
            is_product = problem.kind == self.kind
            return Choice(tile if is_product else layer_tiles.choose(problem, device), "")

        return product_schedule(self.kind, tensors, self.activation, self.precision, choose)

    def turns(self, run: Callable[[int], object]) -> Callable[[], object]:
        """A call that takes the sets in turn."""
        indices = itertools.cycle(range(self.count))
        return lambda: run(next(indices))


class Passes:
    """A network's tensors, the input in several sets, and a pass through it by one path or another."""

    def __init__(self, whole: Whole, device: torch.device) -> None:
        work = whole.workload
        dtype, _ = ARITHMETIC[work.dtype]
        make = functools.partial(_random, dtype=dtype, device=device)
        self.dtype = dtype
        self.training = whole.training
        self.layers = [
            Layer(make(1, n, k, scale=k**-0.5)[0], make(1, n)[0], activation)
            for (k, n), activation in zip(itertools.pairwise(work.widths), layer_activations(work))
        ]
        self.weights, self.biases, self.activations, _ = zip(*self.layers)
        self.parameters = [*self.weights, *self.biases]
        for parameter in self.parameters:
            parameter.requires_grad_(self.training)
        nbytes = work.rows * (work.widths[0] + work.widths[-1]) * dtype.itemsize
        self.count = _sets(device, nbytes)
        self.xs = make(self.count, work.rows, work.widths[0])
        self.dys = make(self.count, work.rows, work.widths[-1], scale=work.rows**-0.5) if self.training else []

    def by_torch(self, x: Tensor) -> Tensor:
        return reference.mlp(x, self.weights, self.biases, self.activations)

    def by_layers(self, x: Tensor) -> Tensor:
        return run_layers(x, self.weights, self.biases, find_layers(x, self.layers, self.dtype, "auto"))

    def by_network(self, path: network_path.NetworkPath, x: Tensor) -> Tensor:
        return run_network(x, self.weights, self.biases, path)

    def __call__(self, path: Callable[[Tensor], Tensor], index: int) -> list[Tensor]:
        """y, and in training the parameters' gradients."""
        if not self.training:
            with torch.no_grad():
                return [path(self.xs[index])]
        y = path(self.xs[index])
        return [y.detach(), *torch.autograd.grad(y, self.parameters, self.dys[index])]

    def turns(self, path: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        """A call that takes the inputs in turn."""
        indices = itertools.cycle(range(self.count))
        return lambda: self(path, next(indices))


def _sets(device: torch.device, nbytes: int) -> int:
    """The sets of operands of `nbytes` that fill L2 twice, so that each comes from memory."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MOST_SETS, math.ceil(2 * cache / nbytes)))


def _random(sets: int, *shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> list[Tensor]:
    """As many tensors, of normal numbers; each begins at a multiple of 512 bytes, as torch allocates."""
    size = math.prod(shape)
    numbers = torch.randn(sets, -(-size // 256) * 256, dtype=dtype, device=device).mul_(scale)
    return [each[:size].view(shape) for each in numbers]


@contextlib.contextmanager
def float32_set_to(precision: str) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before
