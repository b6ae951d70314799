"""A network as FusedMLP and as eager PyTorch with the same parameters, and random inputs: `Bench(problem, device)`."""

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

LEARNING_RATE = 1e-5  # so small that parameters stay finite over thousands of timed steps
EPS = 1e-3  # Adam's default of 1e-8 is 0 in fp16, where a gradient of 0 would give 0 / 0
GRADIENT = 16.0  # standard deviation of a bias gradient; its square, a state of Adam, has to fit in fp16


class Bench:
    """One problem on one device: the model, the eager network with the same parameters, and random inputs.

    They are made at their first use.
    """

    def __init__(self, problem: Problem, device: str) -> None:
        self.problem = problem
        self.device = device
        self.dtype = DTYPES[problem.dtype]
        self.copies: dict[str, Copied] | None = None
        self.compiled: dict[str | None, Callable[[Tensor], Tensor]] = {}
        self.compile_seconds: dict[tuple[str, bool], float] = {}

    @cached_property
    def model(self) -> FusedMLP:
        """The FusedMLP, with the same random parameters in every process."""
        if self.device == "cuda":
            torch.compiler.reset()  # graphs of the previous problem use memory and count towards dynamo's limit
        release(self.device)
        torch.manual_seed(0)
        first, *rest = self.problem.widths
        return FusedMLP(first, rest, activation_layer=self.problem.activation, device=self.device, dtype=self.dtype)

    @cached_property
    def eager(self) -> nn.Sequential:
        """The same modules in an nn.Sequential, without the Dropout modules, which do nothing here."""
        return nn.Sequential(*(child for child in self.model if not isinstance(child, nn.Dropout)))

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @cached_property
    def inputs(self) -> list[Tensor]:
        """Random inputs (M, d_0), enough that they are read from memory, not from L2."""
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
        """A target for each input: labels (M,) if the loss is the cross entropy, otherwise dY (M, d_L)."""
        rows, width = self.problem.rows, self.problem.widths[-1]
        if self.problem.cross_entropy:
            return [torch.randint(width, (rows,), device=self.device) for _ in self.inputs]
        scale = min(1.0, GRADIENT * rows**-0.5)  # because a bias gradient is a sum over the rows
        return [torch.randn(rows, width, device=self.device, dtype=self.dtype).mul_(scale) for _ in self.inputs]

    @cached_property
    def host(self) -> Tensor:
        """The first input in pageable host memory."""
        return self.inputs[0].cpu()

    @cached_property
    def pinned(self) -> Tensor:
        """The first input in pinned host memory."""
        return self.host.pin_memory()

    @cached_property
    def gradients(self) -> list[Tensor]:
        """dY (M, d_L) for each input: the target itself, or the gradient of the cross entropy of eager's output."""
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
        """Return a phase of `module` as a call, which returns the output (except in backward) and the gradients."""
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
            outputs: list[Tensor] = []  # the output of the forward in setup

            def setup(i: int) -> None:
                outputs[:] = [module(inputs[i])]

            def backward(i: int) -> tuple[Tensor, ...]:
                return torch.autograd.grad(outputs.pop(), parameters, gradients[i])

            return Timed(backward, setup, len(inputs))
        raise ValueError(f"phase is {phase!r}; it needs to be forward, backward, training or step")

    def optimizer(self) -> torch.optim.Optimizer:
        """Make Adam, with the same settings for ours and every baseline. On a GPU it is capturable, for CUDA graphs.

        With these `lr` and `eps`, parameters and state stay finite over thousands of steps in every dtype. The values
        do not change the time of Adam's kernels.
        """
        on_gpu = self.device == "cuda"
        return torch.optim.Adam(self.parameters, lr=LEARNING_RATE, eps=EPS, fused=on_gpu, capturable=on_gpu)

    def step(
        self, module: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer
    ) -> Callable[[int], tuple[Tensor, ...]]:
        """Return a training step of `module` as a function of i, which returns the output and the gradients."""
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
        """Return the relative errors of one call against eager (or `reference`), and the seconds of this first call.

        Raises:
            AssertionError: an error exceeds its bound, as in `compare`.
        """
        last = timed.sets - 1  # a graph only has the outputs of its last capture
        changed = self.parameters if phase == "step" else []
        before = [p.detach().clone() for p in changed]

        def restore() -> None:
            with torch.no_grad():
                for p, value in zip(changed, before, strict=True):
                    p.copy_(value)

        begin = time.perf_counter()
        timed.prepare(last)
        results = timed(last)
        synchronize(self.device)
        seconds = time.perf_counter() - begin
        results = [tensor.detach().clone() for tensor in results]  # the next replay of a graph overwrites its outputs
        restore()
        eager = self.timed(reference or self.eager, phase)
        eager.prepare(last)
        expected = eager(last)
        restore()
        outputs = 0 if phase == "backward" else 1
        return compare(results, expected, bounds_in_force(self.problem.dtype), outputs), seconds


@lru_cache(maxsize=1)
def bench_for(problem: Problem, device: str) -> Bench:
    """Return the Bench of a problem. One is cached, because cells of one problem follow each other in the grid."""
    return Bench(problem, device)


def synchronize(device: str) -> None:
    """Wait for the GPU; do nothing on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def release(device: str) -> None:
    """Free the memory of unreachable objects."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
