"""`Bench(problem, device)`: a network as FusedMLP and as eager torch on the same parameters, and random inputs."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.problem import Problem
from bench.rows import Copied, Verified
from bench.verify import bounds_in_force, compare
from mlp_fused import timing
from mlp_fused.dtypes import DTYPES
from mlp_fused.module import FusedMLP
from mlp_fused.timing import Timed

LEARNING_RATE = 1e-5  # thousands of timed steps must not carry the parameters to infinity
EPS = 1e-3  # Adam's default of 1e-8 is 0 in fp16, where a gradient of 0 would then give 0 / 0
GRADIENT = 16.0  # standard deviation of a bias gradient: its square, which Adam keeps, has to fit in fp16


class Bench:
    """One problem on one device: the model, eager on the same parameters, random inputs; built when first asked for."""

    def __init__(self, problem: Problem, device: str) -> None:
        self.problem = problem
        self.device = device
        self.dtype = DTYPES[problem.dtype]
        self.copies: dict[str, Copied] | None = None
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
    def gradients(self) -> list[Tensor]:
        """dY (M, d_L) for each input: the target itself, or that of the cross entropy of eager's output."""
        return [self._gradient(*pair) for pair in zip(self.inputs, self.targets, strict=True)]

    def _gradient(self, x: Tensor, target: Tensor) -> Tensor:
        if not self.problem.cross_entropy:
            return target
        with torch.no_grad():
            y = self.eager(x)
        y.requires_grad_()
        gradient: Tensor = torch.autograd.grad(F.cross_entropy(y, target), y)[0]
        return gradient

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

    def verify(self, timed: Timed, phase: str, reference: nn.Module | None = None) -> tuple[Verified, float]:
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
        return compare(found, expected, bounds_in_force(self.problem.dtype), outputs), seconds


@lru_cache(maxsize=1)
def bench_for(problem: Problem, device: str) -> Bench:
    """The one Bench that is kept: cells of one problem stand side by side in the grid."""
    return Bench(problem, device)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def release(device: str) -> None:
    """Free the memory that nothing refers to any more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
