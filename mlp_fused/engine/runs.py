"""A network's children, split into runs that kernels can take, whether they have changed, and a run's last paths."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from numbers import Real
from types import BuiltinFunctionType, MethodType, NoneType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..kernels.activation import Activation
from ..kernels.activations import IDENTITY
from ..reference import Layer
from . import paths
from .layer_path import LayerPath
from .network_path import NetworkPath
from .originals import (
    ADDMM,
    DROPOUT,
    LINEAR,
    PARAMETERS,
    Code,
    Dropout,
    Identity,
    Linear,
    Sequential,
    why_changed,
    why_hidden,
    why_mode,
    why_replaced,
)
from .recognize import POINTWISE, find, functions_called, path_of
from .settings import TensorGuards, are_hooked, has_function_mode, has_global_hooks, has_hooks, is_loaded_instance


class Parent(Protocol):
    """A module whose children are run."""

    def _links(self) -> tuple[Any, ...]: ...

    def _link_names(self) -> tuple[str, ...]: ...


class LinearWithActivation(nn.Module):
    """A module with a child `linear` and an `activation`: what FusedLinear is."""

    linear: nn.Linear
    activation: Activation
    declared: type  # the class that derives from this one itself, whose code a kernel stands for

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if LinearWithActivation in cls.__bases__:
            cls.declared = cls

    @property
    def parts(self) -> tuple[Any, Activation]:
        """`linear` and `activation`, what runs one after the other."""
        return self._modules["linear"], self.activation


class Decision:
    """The path that a call took; later calls that it holds for take it without deciding again.

    Whether it holds is asked of torch.compile's guards, which compare every tensor's type, dtype, device, sizes,
    strides, requires_grad and dispatch keys (inference mode, lazy negation …) in C++: a tenth of the time of deciding.
    """

    def __init__(
        self,
        x: Tensor,
        weights: tuple[Tensor, ...],
        biases: tuple[Tensor | None, ...],
        settings: tuple[object, ...],
        path: NetworkPath | LayerPath,
    ) -> None:
        self.path = path
        self.settings = settings
        self.biased = [bias is not None for bias in biases]
        self.all_biased = all(self.biased)
        parameters = [*weights, *(bias for bias in biases if bias is not None)]
        self.guards = TensorGuards(
            x,
            *parameters,
            dynamic_dims_sizes=[[None, x.shape[1]], *(list(each.shape) for each in parameters)],
            dynamic_dims_strides=[[None, None], *(list(each.stride()) for each in parameters)],
        )

    @staticmethod
    def can_hold(x: Tensor, weights: tuple[Tensor, ...]) -> bool:
        """True if such a call can be remembered: guards refuse a tensor that stands twice."""
        return TensorGuards is not None and not x.is_neg() and len(set(map(id, weights))) == len(weights)

    def holds(
        self, x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...], settings: tuple[object, ...]
    ) -> bool:
        """True if a call with these would take the same path."""
        if settings != self.settings:
            return False
        if not self.all_biased:
            if [bias is not None for bias in biases] != self.biased:
                return False
            biases = tuple(bias for bias in biases if bias is not None)
        same: bool = self.guards.check(x, *weights, *biases)  # not where a bias has become None
        return same


class Run:
    """Neighbouring children: Linear layers with activations, which kernels can take; or one that runs as itself."""

    def __init__(self, children: list[Any], reason: str | None = None) -> None:
        self.children = children
        self.linears: list[tuple[nn.Module, Activation]] = []
        self.dropouts: list[float] = []  # after each of them, 0 where nothing is dropped
        self.owned: list[dict[str, Any]] = []  # the linears' dicts of parameters
        self.transposed: list[bool] = []  # which of the linears' weights are (in, out)
        self.any_transposed = False
        self.reason = reason  # why it runs as itself
        self.decisions: list[Decision] = []  # the last two paths: training and evaluation alternate

    def call(self, input: Tensor) -> Tensor:
        """The children as they are."""
        for child in self.children:
            input = child(input)
        return input

    def parameters(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Weights (out, in) and biases."""
        weights = tuple([owned["weight"] for owned in self.owned])
        if self.any_transposed:
            weights = tuple([each.t() if across else each for each, across in zip(weights, self.transposed)])
        return weights, tuple([owned["bias"] for owned in self.owned])

    def layers(self) -> tuple[Layer, ...]:
        return tuple(map(Layer, *self.parameters(), (activation for _, activation in self.linears), self.dropouts))

    def gathered_layers(self, device: str | None = None, dtype: torch.dtype | None = None) -> tuple[Layer, ...]:
        """The layers as a call finds them: FSDP gathers parameters before a forward, and shares them out after it.

        Those are zeros here, on their own device and of their own dtype, or others.
        """
        layers = []
        for (linear, _), layer in zip(self.linears, self.layers()):
            if getattr(linear, "_is_fsdp_managed_module", False):
                where = device or layer.weight.device
                bias = None if layer.bias is None else stand_in(layer.bias, where, dtype)
                layer = layer._replace(weight=stand_in(layer.weight, where, dtype), bias=bias)
            layers.append(layer)
        return tuple(layers)


class Segments:
    """The runs of a network, and what tells whether they still are: looked at on every call, as children may change."""

    def __init__(self, model: Parent) -> None:
        self.children = model._links()
        self.runs = runs_of(self.children)
        inner = [child._modules["linear"] for child in self.children if isinstance(child, LinearWithActivation)]
        self.parts = (*self.children, *inner)
        self.types = [*map(type, self.parts)]
        self.dicts = [part.__dict__ for part in self.parts if isinstance(part, nn.Module)]
        self.plain = self._are_called_plainly()
        if not self.plain:
            return  # the next call parts the children again
        self.code = _code_of(self.parts)
        self.state = self.code.now()
        # What an activation is by, whether Dropout drops, and which Linear a FusedLinear has.
        settings: list[tuple[dict[str, Any], str]] = []
        for child in self.children:
            if isinstance(child, LinearWithActivation):
                settings += [(child._modules, "linear"), (child.__dict__, "activation")]
        for child in (child for run in self.runs if run.linears for child in run.children):
            if type(child) is Dropout:
                names = ["p", "training"] if child.p else ["p"]
            elif is_linear(child) or not isinstance(child, nn.Module):
                continue
            else:
                names = [name for name in child.__dict__ if not name.startswith("_") and name not in UNREAD]
                activation = find(child)
                decisive = (
                    {"activation"}
                    if path_of(type(child)) == POINTWISE
                    else set(activation.parameters if activation else ())
                )
                # What is computed, or a buffer, or no plain value, may change unseen.
                self.plain &= decisive <= set(names)
                self.plain &= all(isinstance(child.__dict__[name], PLAIN) for name in names)
            settings += [(child.__dict__, name) for name in names]
        # As columns, which `map` goes through without a call a row.
        self.holders = [holder for holder, _ in settings]
        self.names = [name for _, name in settings]
        self.values = [*map(dict.get, self.holders, self.names)]
        self.owned = [owned for run in self.runs for owned in run.owned for _ in PARAMETERS]
        self.owned_names = [name for run in self.runs for _ in run.owned for name in PARAMETERS]

    def hold(self, model: Parent) -> bool:
        """True if the children are the same, of the same kind, settings and code, without hooks or patches."""
        return (
            self.plain
            and model._links() == self.children
            and [*map(type, self.parts)] == self.types
            and self._are_called_plainly()
            and self.code.now() == self.state
            and all(map(dict.__contains__, self.owned, self.owned_names))
            and [*map(dict.get, self.holders, self.names)] == self.values
        )

    def _are_called_plainly(self) -> bool:
        """True if no child has a hook or a patched forward, and nothing else makes all of them run as modules."""
        return not (are_hooked(self.dicts) or has_global_hooks() or (has_function_mode() and why_mode()))

    def log_reasons(self) -> None:
        """Log each reason, once a process, for which a Linear layer runs as a module."""
        for run in self.runs:
            if run.reason and is_linear(run.children[0]):
                paths.log_once(run.reason)

    def refuse_split(self, model: Parent) -> None:
        """Refuse layers that no one process has. (Others with hooks run as themselves, whatever the backend.)

        Raises:
            RuntimeError: a Linear is split over processes.
        """
        split = [child for run in self.runs if run.reason == SPLIT for child in run.children]
        names = [
            name for name, child in zip(model._link_names(), self.children) if any(child is each for each in split)
        ]
        if names:
            raise RuntimeError(f'backend is "triton", but of child {", ".join(names)}, {SPLIT}; or use backend="auto"')


def runs_of(children: Iterable[Any], training: bool | None = None, drops: bool = True) -> list[Run]:
    """The children of a network, parted into runs.

    Args:
        training: as if in that mode, instead of each child's own.
        drops: whether a run may drop; otherwise Dropout that does runs as itself.
    """
    runs: list[Run] = []
    run: Run | None = None
    takes_activation = False  # whether the run's last Linear is still without one, and nothing dropped from it
    everywhere = why_modules()
    for child in children:
        why = everywhere or why_unfused(child)
        if why is None:
            linear, activation = child.parts if isinstance(child, LinearWithActivation) else (child, IDENTITY)
            if run is None:
                run = Run([])
                runs.append(run)
            run.linears.append((linear, activation))
            run.dropouts.append(0.0)
            run.owned.append(linear._parameters)
            run.transposed.append(_is_transposed(linear))
            run.any_transposed = any(run.transposed)
            takes_activation = activation is IDENTITY
        elif (
            run is not None
            and everywhere is None
            and (p := _dropout(child, training)) is not None
            and not (p and (run.dropouts[-1] or not drops))  # a second one has a mask of its own
        ):
            if p:
                run.dropouts[-1] = p
                takes_activation = False
        elif (
            run is not None
            and takes_activation
            and everywhere is None
            and (found := find(child))
            and why_called(child, activation=found) is None
        ):
            run.linears[-1] = (run.linears[-1][0], found)
            takes_activation = found is IDENTITY
        else:
            if everywhere is None and not is_linear(child) and (found := find(child)):
                why = why_called(child, activation=found) or "it follows no Linear layer that it could be fused with"
            runs.append(Run([child], why))
            run = None
            continue
        run.children.append(child)
    return runs


def why_modules() -> str | None:
    """The reason why every child of every network runs as a module; None where there is none."""
    if has_global_hooks():
        return "a global module hook is registered"
    return why_changed(Sequential, Sequential) or why_mode()


# Linear layers whose weight is (in, out), by path as none of these need be installed.
TRANSPOSED = ("transformers.pytorch_utils.Conv1D",)


def _is_transposed(module: Any) -> bool:
    """True if a module is a Linear layer whose weight is (in, out)."""
    return path_of(type(module)) in TRANSPOSED


def is_linear(module: Any) -> bool:
    """True if a module is a Linear layer of any kind."""
    # Tuples of classes here and below: torch 2.9 does not compile isinstance with a union.
    return isinstance(module, (Linear, LinearWithActivation)) or _is_transposed(module)


def linear_weight(linear: Any) -> Tensor:
    """The weight of a Linear layer as (out, in)."""
    weight: Tensor = linear.weight
    return weight.t() if _is_transposed(linear) else weight


def name_of(child: Any) -> str:
    """The name of a module, function or activation in sentences."""
    if isinstance(child, Activation):
        return str(child)
    return type(child).__name__ if isinstance(child, nn.Module) else getattr(child, "__name__", type(child).__name__)


def why_unfused(module: Any) -> str | None:
    """The reason why a module is no plain Linear layer, which kernels may take in place of a call; None where it is."""
    if not is_linear(module):
        return f"{name_of(module)} has no kernel"
    if isinstance(module, LinearWithActivation):
        linear = module._modules["linear"]
        if (why := why_called(module, module.declared)) is not None:
            return why
        if not isinstance(linear, Linear):
            return f"its linear is {name_of(linear)}, which has no kernel"
        return why_unfused(linear) or why_replaced((), module.activation.name)
    known, function = (type(module), ADDMM) if _is_transposed(module) else (Linear, LINEAR)
    if (why := why_called(module, known, (function,))) is not None:
        return why
    if "weight" not in module._parameters:
        return "its weight is parametrized"
    if "bias" not in module._parameters:
        return "its bias is no parameter of its own"
    return why_hidden(type(module))


def why_called(
    child: Any, known: type | None = None, functions: tuple[str, ...] = (), activation: Activation = IDENTITY
) -> str | None:
    """The reason why a child must be called: a hook, or code that is not the library's; None where there is none.

    Args:
        child: a module or a function.
        known: the class that a kernel stands for, by default the child's own.
        functions: the names of torch's functions that a call looks up.
        activation: what the child computes, if it is an activation.
    """
    if isinstance(child, nn.Module):
        if has_hooks(child):
            return _why_hooked(child)
        kind = type(child)
        if (why := why_changed(kind, known or kind)) is not None:
            return why
    return why_replaced(functions, activation.name)


def _why_hooked(module: nn.Module) -> str:
    if is_loaded_instance(module, "torch.distributed.fsdp", "FSDPModule"):
        return "fully_shard was called on it, whose hooks gather its parameters; on the whole network it stays fused"
    return SPLIT if is_split(module._parameters.get("weight")) else "it has hooks, or a forward patched onto it"


def _code_of(parts: Iterable[Any]) -> Code:
    """The code that calls of those parts of a network come down to that a kernel could take the place of."""
    kinds: list[type] = []
    functions: list[str] = []
    for part in parts:
        found = None if is_linear(part) else find(part)
        if is_linear(part):
            functions.append(ADDMM if _is_transposed(part) else LINEAR)
        elif found is not None:
            functions += functions_called(found.name)
        elif type(part) is Dropout:
            functions.append(DROPOUT)
        else:
            continue
        if isinstance(part, nn.Module):
            kinds.append(type(part))
        if isinstance(part, LinearWithActivation):
            functions += functions_called(part.activation.name)
    return Code(kinds, functions)


SPLIT = "the weight is a DTensor, split over processes, whose parts hooks bring together"
UNREAD = ("training", "inplace", "in_features", "out_features")  # public attributes that no activation is by
PLAIN = (bool, int, float, str, NoneType, Activation, BuiltinFunctionType, MethodType, functools.partial)


def is_split(tensor: object) -> bool:
    return is_loaded_instance(tensor, "torch.distributed.tensor", "DTensor")


def stand_in(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros like a tensor; like the whole of a DTensor."""
    like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype or tensor.dtype, device=device)
    return like.zero_().requires_grad_(tensor.requires_grad)


def _dropout(module: Any, training: bool | None) -> float | None:
    """The probability with which a module drops, 0 where it is idle or the identity; None: it is neither."""
    if type(module) is Identity:
        return 0.0 if why_called(module) is None else None
    p: Any = module.p if type(module) is Dropout else None
    if not (type(p) in (int, float) or isinstance(p, Real)) or not 0 <= float(p) <= 1:
        return None  # or Dropout that torch refuses
    if why_called(module, functions=(DROPOUT,)) is not None:
        return None
    return float(p) if (module.training if training is None else training) else 0.0
