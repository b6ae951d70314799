"""The layers as registered operators, for torch.compile, torch.export and dispatch modes.

    mlp_fused::mlp           x, weights, biases -> y, saved tensors
    mlp_fused::mlp_backward  dy, x, y, saved tensors, weights, biases -> the gradients that are needed

`calls.run_operator` calls the first, and autograd the second. Other calls do not come here, because the dispatcher
would add microseconds to each.

The path of an operator and its saved tensors do not depend on the number of rows, which may be symbolic.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import traceback
from torch.overrides import TorchFunctionMode

from .. import reference
from ..kernels.activation import parse
from ..reference import Layer
from .autograd import plain_gradient
from .layer_path import LayerPath
from .network_path import NetworkPath
from .paths import find_path, why_device
from .section import Section

_SETTINGS = "bool[] biased, str[] activations, ScalarType dtype, str precision, bool? recompute, str backend"
_library = torch.library.Library("mlp_fused", "DEF")
_library.define(f"mlp(Tensor x, Tensor[] weights, Tensor[] biases, {_SETTINGS}, bool keep) -> (Tensor, Tensor[])")
_library.define(
    "mlp_backward(Tensor dy, Tensor x, Tensor y, Tensor[] kept, Tensor[] weights, Tensor[] biases, "
    f"{_SETTINGS}, bool[] needs) -> Tensor[]"
)


class _Settings(NamedTuple):
    """The arguments of both operators after their tensors, as in `_SETTINGS`."""

    biased: Sequence[bool]  # for each layer: True if it has a bias; only existing biases are passed
    activations: Sequence[str]
    dtype: torch.dtype
    precision: str
    recompute: bool | None
    backend: Any

    def section(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], keep: bool
    ) -> tuple[Section, bool]:
        """All layers as one section, and True if its forward saves nothing and its backward runs the forward again."""
        layers = tuple(map(Layer, weights, biases, map(parse, self.activations)))
        path = find_path(x, layers, self.dtype, self.recompute, self.backend, self.precision, keep)
        if isinstance(path, LayerPath):
            return path.section(0, len(layers)), bool(self.recompute)
        return path, False

    def biases_of_layers(self, biases: Sequence[Tensor]) -> list[Tensor | None]:
        """A bias or None for each layer. Operators get lists without None: otherwise no tensor would get a gradient."""
        given = iter(biases)
        return [next(given) if has_bias else None for has_bias in self.biased]


def _parsed(arguments: tuple[Any, ...]) -> tuple[_Settings, Any]:
    """(settings, the last argument of the operator) from the arguments after its tensors."""
    *settings, last = arguments
    return _Settings(*settings), last


def _mlp(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *settings: Any) -> tuple[Tensor, list[Tensor]]:
    call, keep = _parsed(settings)
    all_biases = call.biases_of_layers(biases)
    reason = why_device(x.device, call.backend)
    if reason is not None and not keep:  # a program that was exported on a GPU runs without one
        return _mlp_by_torch(call, x, weights, all_biases), []
    if reason is not None:
        raise RuntimeError(f"mlp_fused::mlp cannot save tensors for its backward kernels: {reason}")
    section, again = call.section(x, weights, all_biases, keep)
    x = _kernel_input(section, x)
    needs = _all_needs(section) if keep and not again else None
    y, _, *saved = section.forward((x, x, None, *_plain(weights), *_plain(all_biases)), needs)
    if needs is None:
        return y, []
    return y, [tensor for name, tensor in zip(section.saved(needs).names, saved) if name not in NOT_KEPT]


NOT_KEPT = ("x", "y")  # saved tensors that are the operator's input and its first output


def _all_needs(section: Section) -> tuple[bool, ...]:
    """The `needs` of an operator's forward, which does not know which gradients are needed."""
    return (True,) * (1 + len(section.parameters))


def _kernel_input(section: Section, x: Tensor) -> Tensor:
    """The input as the section's kernels read it. The network path casts it itself."""
    x = x.resolve_neg()
    return x if isinstance(section, NetworkPath) else x.to(section.dtype)


def _mlp_by_torch(call: _Settings, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """y, computed in plain torch and in the operator's dtype."""
    cast_biases = [None if bias is None else bias.to(call.dtype) for bias in biases]
    cast_weights = [weight.to(call.dtype) for weight in weights]
    return reference.mlp(x.to(call.dtype), cast_weights, cast_biases, list(map(parse, call.activations)))


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The operator `mlp_fused::mlp` as torch's Linear and activation, for `ExportedProgram.run_decompositions`.

    A program that was exported on a GPU contains this operator. Tools that translate or quantise programs only know
    torch's own operators:

        program = program.run_decompositions(mlp_fused.decompositions())  # aten.linear, aten.relu, …

    The results are those of plain torch.

    Raises:
        RuntimeError: by `run_decompositions`, if the program has a backward. That needs saved tensors, which the
            decomposed forward does not compute.
    """
    return {torch.ops.mlp_fused.mlp.default: _decompose, torch.ops.mlp_fused.mlp_backward.default: _refuse_backward}


def _refuse_backward(*_: Any) -> None:
    raise RuntimeError(
        "the program has a backward of mlp_fused; decompositions() needs a program for inference: export the model "
        "without its backward"
    )


def _decompose(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *settings: Any
) -> tuple[Tensor, list[Tensor]]:
    call, _ = _parsed(settings)
    _, kept = _mlp_fake(x, weights, biases, *settings)
    with _NamesFunctions():
        return _mlp_by_torch(call, x, weights, call.biases_of_layers(biases)), kept


class _NamesFunctions(TorchFunctionMode):
    """A function mode that writes the name of each function into the graph. Quantisers find Linear layers by it."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        self.counts[name] += 1
        traceback.get_current_meta()["source_fn_stack"] = [(f"{name}_{self.counts[name]}", func)]
        return func(*args, **(kwargs or {}))


def _needs_of_layers(needs: Sequence[bool], biased: Sequence[bool]) -> list[bool]:
    """The needs of x, of every weight and of every layer's bias. `needs` has only the biases that exist."""
    bias_needs = iter(needs[1 + len(biased) :])
    return [*needs[: 1 + len(biased)], *(has_bias and next(bias_needs) for has_bias in biased)]


def _plain(tensors: Sequence[Any]) -> list[Any]:
    """The tensors without lazy negation, which kernels would not see."""
    return [tensor if tensor is None else tensor.resolve_neg() for tensor in tensors]


def _mlp_fake(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *settings: Any
) -> tuple[Tensor, list[Tensor]]:
    call, keep = _parsed(settings)
    dtype = call.dtype
    rows = x.shape[0]
    y = x.new_empty((rows, weights[-1].shape[0]), dtype=dtype)
    if not keep:
        return y, []
    section, again = call.section(x, weights, call.biases_of_layers(biases), keep)
    shapes = {} if again else section.saved_shapes(rows, _all_needs(section))
    return y, [x.new_empty(shape, dtype=dtype) for name, shape in shapes.items() if name not in NOT_KEPT]


def _mlp_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    kept: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *settings: Any,
) -> list[Tensor]:
    call, needs = _parsed(settings)
    weights, all_biases, x_dtype = _plain(weights), _plain(call.biases_of_layers(biases)), x.dtype
    section, again = call.section(x, weights, all_biases, True)
    parameters, needs = (*weights, *all_biases), tuple(_needs_of_layers(needs, call.biased))
    dy, x = plain_gradient(dy), _kernel_input(section, x)
    if again:
        _, _, *saved = section.forward((x, x, None, *parameters), needs)
    else:
        names = [name for name in section.saved(_all_needs(section)).names if name not in NOT_KEPT]
        kept = [tensor.contiguous() for tensor in kept]
        named = {"x": x, "y": y.contiguous(), **dict(zip(names, kept, strict=True))}
        saved = [named[name] for name in section.saved(needs).names]
    dx, *gradients = section.backward(dy, saved, parameters, needs)
    return [gradient for gradient in (None if dx is None else dx.to(x_dtype), *gradients) if gradient is not None]


def _mlp_backward_fake(
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    kept: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *settings: Any,
) -> list[Tensor]:
    *_, needs = settings
    wanted = zip((x, *weights, *biases), needs)
    return [tensor.new_empty(tensor.shape) for tensor, need in wanted if need]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    x, weights, biases, *ctx.settings, ctx.keep = inputs
    y, kept = output
    ctx.sizes = len(kept), len(weights), len(biases)
    ctx.needs = [tensor.requires_grad for tensor in (x, *weights, *biases)]
    if not _reads_output(ctx, x, weights, biases):  # then the caller may change y in place
        y = y.new_empty(0)
    ctx.save_for_backward(x, y, *kept, *weights, *biases)
    ctx.set_materialize_grads(False)


def _reads_output(ctx: Any, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> bool:
    """True if the backward reads y."""
    call = _Settings(*ctx.settings)
    section, again = call.section(x, weights, call.biases_of_layers(biases), True)
    return not again and "y" in section.saved(tuple(_needs_of_layers(ctx.needs, call.biased))).names


def _differentiate(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Any, ...]:
    if not ctx.keep:
        raise RuntimeError("mlp_fused::mlp was called with keep=False, and saved nothing for a backward")
    x, y, *saved = ctx.saved_tensors
    kept, weights, biases = _parted(saved, ctx.sizes)
    rest = (None,) * (len(ctx.settings) + 1)
    if dy is None:
        return None, [None] * len(weights), [None] * len(biases), *rest
    results = iter(torch.ops.mlp_fused.mlp_backward(dy, x, y, kept, weights, biases, *ctx.settings, ctx.needs))
    dx, *gradients = [next(results) if need else None for need in ctx.needs]
    return dx, *_parted(gradients, ctx.sizes[1:]), *rest


def _parted(items: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    """`items` split into consecutive lists of these sizes."""
    iterator = iter(items)
    return [list(itertools.islice(iterator, size)) for size in sizes]


def _refuse(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(
        "the gradient of mlp_fused's operators cannot be differentiated again; run the network outside torch.compile "
        'and of dispatch modes, or with backend="reference"'
    )


_library.impl("mlp", _mlp, "CompositeExplicitAutograd")
_library.impl("mlp_backward", _mlp_backward, "CompositeExplicitAutograd")
torch.library.register_fake("mlp_fused::mlp", _mlp_fake, lib=_library)
torch.library.register_fake("mlp_fused::mlp_backward", _mlp_backward_fake, lib=_library)
torch.library.register_autograd("mlp_fused::mlp", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("mlp_fused::mlp_backward", _refuse, lib=_library)


def _flop_formula(operator: Any) -> Callable[[Any], Any]:
    """Register the decorated function as torch's formula for the FLOPs of an operator.

    torch's module imports Triton. Without Triton it logs a line, which is silenced here. If a broken Triton raises
    anything but ImportError, the import fails. Then nothing can count FLOPs, and nothing is registered.
    """
    logger = logging.getLogger("torch.utils.flop_counter")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from torch.utils.flop_counter import register_flop_formula
    except Exception:
        return lambda formula: formula
    finally:
        logger.setLevel(level)
    return register_flop_formula(operator)


@_flop_formula(torch.ops.mlp_fused.mlp)
def _mlp_flops(x: tuple[int, ...], weights: list[tuple[int, ...]], *settings: Any, **others: Any) -> int:
    """2 M N K for each layer, as torch counts a Linear."""
    return sum(2 * x[0] * n * k for n, k in weights)


@_flop_formula(torch.ops.mlp_fused.mlp_backward)
def _mlp_backward_flops(
    dy: tuple[int, ...], x: Any, y: Any, kept: Any, weights: list[tuple[int, ...]], *settings: Any, **others: Any
) -> int:
    """2 M N K for each weight's gradient, and for each layer whose input needs a gradient."""
    _, biased, *_, needs = settings
    layers, needs = len(weights), _needs_of_layers(needs, biased)
    flops = 0
    for index, (n, k) in enumerate(weights):
        below = any(needs[: 1 + index]) or any(needs[1 + layers : 1 + layers + index])
        flops += 2 * dy[0] * n * k * (needs[1 + index] + below)
    return flops
