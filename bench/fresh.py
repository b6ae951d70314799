"""The cost of the first call alone, in a process of its own: `python -m bench.fresh first_touch|warmup`, and
`python -m bench.fresh lecture [--cpu] [--gpu]`.

Prints one line of JSON: seconds by name, read off the host clock, each after waiting for the device unless it says
"returned". Names that end in _2 are the same thing done a second time.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from torch import Tensor, nn

from bench.problem import FRESH_PHASES, Problem
from mlp_fused.agreement import BOUNDS, relative_error
from mlp_fused.dtypes import DTYPES
from mlp_fused.environment import distorted
from mlp_fused.module import FusedMLP
from mlp_fused.transfer import first_touch as steps
from mlp_fused.transfer.first_touch import seconds


def network(problem: Problem, device: str) -> FusedMLP:
    first, *rest = problem.widths
    return FusedMLP(first, rest, activation_layer=problem.activation, device=device, dtype=DTYPES[problem.dtype])


def warmup(model: FusedMLP, x: Tensor) -> dict[str, float]:
    """`model.warmup(rows)`, which compiles the kernels of a training step or loads them from Triton's cache, and then
    a forward and backward, twice: the second is what the first costs where warmup left it nothing to do.
    """
    parameters = list(model.parameters())
    found: dict[str, float] = {}
    found["warmup"], _ = seconds(lambda: model.warmup(len(x)))
    for again in ("", "_2"):
        found["training" + again], _ = seconds(lambda: torch.autograd.grad(model(x).sum(), parameters))
    return found


def first_touch(problem: Problem) -> dict[str, float]:
    """The steps from a bare process to a network's output, FusedMLP's (see `mlp_fused.first_touch`)."""
    model = network(problem, "cpu")
    x = torch.randn(problem.rows, problem.widths[0], dtype=DTYPES[problem.dtype])
    found = steps.first_touch(model, [x])
    with torch.no_grad():
        children = nn.Sequential(*model)  # torch's own modules, one after the other
        check(model(x.cuda()), children(x.cuda()), BOUNDS[problem.dtype][0])
    return found


def lecture(n: int, *, cpu: bool, gpu: bool) -> dict[str, float]:
    """An (n, n) fp32 product on the CPU; its operands copied to the GPU and multiplied there.

    `product_returned` is when the host has the call back, which is all that a clock without a wait sees;
    `product_device` is what passes on the device between events around it; `product` is when the product is there.
    """
    a, b = torch.randn(n, n), torch.randn(n, n)
    found: dict[str, float] = {}
    for again in ("", "_2") if cpu else ():
        found["cpu_product" + again], _ = seconds(lambda: a @ b)
    for again in ("", "_2") if gpu else ():
        found["copy" + again], (c, d) = seconds(lambda: (a.cuda(), b.cuda()))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun = time.perf_counter()
        start.record()
        product = c @ d
        end.record()
        found["product_returned" + again] = time.perf_counter() - begun
        torch.cuda.synchronize()
        found["product" + again] = time.perf_counter() - begun
        found["product_device" + again] = 1e-3 * start.elapsed_time(end)
        check(product[:8].cpu(), a[:8] @ b, BOUNDS["tf32"][0])  # where the user's setting allows it
        del c, d, product
    return found


def check(found: Tensor, expected: Tensor, bound: float) -> None:
    """Raise AssertionError where the relative error passes a bound."""
    error = relative_error(found, expected)
    assert error <= bound, f"wrong by {error}, the bound is {bound}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=FRESH_PHASES)
    parser.add_argument("--cpu", action="store_true", help="the lecture's product on the CPU")
    parser.add_argument("--gpu", action="store_true", help="the lecture's copy and product on the GPU")
    parser.add_argument("--widths", type=int, nargs="+", default=[784, 512, 512, 10])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--activation", default="relu")
    options = parser.parse_args(arguments)
    on_gpu = options.gpu or options.what != "lecture"
    if on_gpu and (reason := distorted()) is not None:
        parser.error(reason)
    problem = Problem(tuple(options.widths), options.rows, options.dtype, options.activation)
    if options.what == "first_touch":
        found = first_touch(problem)
    elif options.what == "warmup":
        x = torch.randn(problem.rows, problem.widths[0], device="cuda", dtype=DTYPES[problem.dtype])
        found = warmup(network(problem, "cuda"), x)
    else:
        found = lecture(options.rows, cpu=options.cpu, gpu=options.gpu)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
