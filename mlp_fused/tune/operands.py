"""The tensors of the tuner's measurements, and the calls that it times: by PyTorch and by the kernels."""

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
from ..engine.schedule import Schedule, read_pointers
from ..engine.tables import Choice
from ..kernels import devices, layer_tiles, tile_config
from ..kernels.activations import ACTIVATIONS
from ..reference import Layer
from .tasks import Product, Whole, layer_activations

MOST_SETS = 1024  # the maximum number of sets of operands


class Operands:
    """The tensors of a product, in several sets, and the product by PyTorch or by a kernel.

    Args:
        count: the number of sets; by default enough that operands are read from memory, not from L2.
    """

    def __init__(self, product: Product, device: torch.device, count: int | None = None) -> None:
        self.kind = product.kind
        M, N, K = product.rows, product.width_out, product.width_in
        dtype, self.precision = ARITHMETIC[product.dtype]
        activation = ACTIVATIONS[product.activation]
        active, saves_z = product.activation != "identity", activation.saves_preactivation
        self.activation = activation
        # The shape and scale of each tensor, so that sums are about 1; None for a tensor that is not needed.
        specs: list[tuple[tuple[int, ...], float] | None]
        if self.kind == "forward":  # x, W, b, h, z
            specs = [((M, K), 1.0), ((N, K), K**-0.5), ((N,), 1.0), ((M, N), 1.0), ((M, N), 1.0) if saves_z else None]
        elif self.kind == "dgrad":  # dz, W, saved, dx, h
            x = ((M, K), 1.0)
            specs = [((M, N), 1.0), ((N, K), N**-0.5), x if active else None, x, x if saves_z else None]
        else:  # dz, h, dW, db
            specs = [((M, N), M**-0.5), ((M, K), 1.0), ((N, K), 1.0), ((N,), 1.0)]
        self.inputs = 2 if self.kind == "wgrad" else 3  # the first tensors of a set are read, the others written
        nbytes = sum(math.prod(spec[0]) for spec in specs if spec) * dtype.itemsize
        self.count = _sets(device, nbytes) if count is None else count
        tensors = [
            _random(self.count, *spec[0], dtype=dtype, device=device, scale=spec[1]) if spec else [None] * self.count
            for spec in specs
        ]
        self.sets: list[Any] = list(zip(*tensors))
        self.schedules: dict[tile_config.TileConfig | None, Schedule] = {}

    def written(self, run: Callable[[int], object]) -> list[Tensor]:
        """Run on the first set, and return the output tensors. Elements that `run` does not write are NaN."""
        results = [tensor for tensor in self.sets[0][self.inputs :] if tensor is not None]
        for result in results:
            result.fill_(torch.nan)
        run(0)
        return results

    def in_float32(self) -> list[Tensor]:
        """Return the results of the first set, computed by PyTorch in float32 from the same operands.

        In 16 bits, PyTorch could be less accurate than the kernels: over 2^20 rows, cuBLAS rounds partial sums to fp16.
        """
        tensors = self.sets[0]
        inputs = [None if tensor is None else tensor.float() for tensor in tensors[: self.inputs]]
        results = [
            None if tensor is None else torch.empty_like(tensor, dtype=torch.float32)
            for tensor in tensors[self.inputs :]
        ]
        tensors = [*inputs, *results]
        self._schedule(tensors, None).run(tensors, read_pointers(tensors)[0])
        return [result for result in results if result is not None]

    def by_torch(self, index: int) -> None:
        """Compute the product of a set by PyTorch."""
        self.run(index, None)

    def by_kernel(self, index: int, tile: tile_config.TileConfig) -> None:
        """Compute the product of a set by the kernel with this tile."""
        self.run(index, tile)

    def run(self, index: int, tile: tile_config.TileConfig | None) -> None:
        """Compute the product of a set, by the kernel with this tile or, if it is None, by PyTorch."""
        tensors = self.sets[index]
        if tile not in self.schedules:
            self.schedules[tile] = self._schedule(tensors, tile)
        self.schedules[tile].run(tensors, read_pointers(tensors)[0])

    def _schedule(self, tensors: Sequence[Any], tile: tile_config.TileConfig | None) -> Schedule:
        device = devices.device_record(tensors[0])

        def choose(problem: tile_config.Problem, written: bool) -> Choice:
            is_product = problem.kind == self.kind
            return Choice(tile if is_product else layer_tiles.choose(problem, device), "")

        return product_schedule(self.kind, tensors, self.activation, self.precision, choose)

    def turns(self, run: Callable[[int], object]) -> Callable[[], object]:
        """Return a call without arguments that cycles through the sets."""
        indices = itertools.cycle(range(self.count))
        return lambda: run(next(indices))


class Passes:
    """The tensors of a network, with several inputs, and a pass through it on different paths."""

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
        """Compute y by PyTorch."""
        return reference.mlp(x, self.weights, self.biases, self.activations)

    def by_layers(self, x: Tensor) -> Tensor:
        """Compute y on the layer path."""
        return run_layers(x, self.weights, self.biases, find_layers(x, self.layers, self.dtype, "auto"))

    def by_network(self, path: network_path.NetworkPath, x: Tensor) -> Tensor:
        """Compute y on a network path."""
        return run_network(x, self.weights, self.biases, path)

    def __call__(self, path: Callable[[Tensor], Tensor], index: int) -> list[Tensor]:
        """Return y and, in training, the gradients of the parameters."""
        if not self.training:
            with torch.no_grad():
                return [path(self.xs[index])]
        y = path(self.xs[index])
        return [y.detach(), *torch.autograd.grad(y, self.parameters, self.dys[index])]

    def turns(self, path: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        """Return a call without arguments that cycles through the inputs."""
        indices = itertools.cycle(range(self.count))
        return lambda: self(path, next(indices))


def _sets(device: torch.device, nbytes: int) -> int:
    """Return the number of sets of `nbytes` that fill L2 twice, so that operands are read from memory."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MOST_SETS, math.ceil(2 * cache / nbytes)))


def _random(sets: int, *shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> list[Tensor]:
    """Return tensors of normal random numbers, aligned to 256 elements: at least to 512 bytes, as in PyTorch."""
    size = math.prod(shape)
    numbers = torch.randn(sets, -(-size // 256) * 256, dtype=dtype, device=device).mul_(scale)
    return [row[:size].view(shape) for row in numbers]


@contextlib.contextmanager
def float32_set_to(precision: str) -> Iterator[None]:
    """Set PyTorch's precision of float32 products within the `with` block."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before
