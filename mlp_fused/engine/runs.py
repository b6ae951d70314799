"""Split a network's children into runs for the kernels, detect changes of the children, and cache each run's paths."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from types import BuiltinFunctionType, MethodType, NoneType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
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
from .recognize import POINTWISE, find, functions_called, import_path
from .settings import (
    TensorGuards,
    are_hooked,
    count_function_modes,
    has_global_hooks,
    has_hooks,
    is_intercepted,
    is_loaded_instance,
)


class Parent(Protocol):
    """A module whose children are run."""

    def _ordered_children(self) -> tuple[Any, ...]: ...

    def _ordered_names(self) -> tuple[str, ...]: ...


class LinearWithActivation(nn.Module):
    """A module with a child `linear` and an `activation`: the base class of FusedLinear."""

    linear: nn.Linear
    activation: Activation
    declared: type  # the direct subclass of this class, FusedLinear, whose code a kernel replaces

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if LinearWithActivation in cls.__bases__:
            cls.declared = cls

    @property
    def parts(self) -> tuple[Any, Activation]:
        """(linear, activation), which run in this order."""
        return self._modules["linear"], self.activation


class Decision:
    """The path that a call took. Later calls of the same kind take it without deciding again.

    The guards of torch.compile compare a call with this one: every tensor's type, dtype, device, sizes, strides,
    requires_grad and dispatch keys (inference mode, lazy negation …), in C++. This takes a tenth of the time of a new
    decision.
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
        self.kind = x.device.type
        self.settings = settings
        self.biased = [bias is not None for bias in biases]
        self.all_biased = all(self.biased)
        parameters = [*weights, *(bias for bias in biases if bias is not None)]
        self.guards = TensorGuards(
            x,
            *parameters,
            dynamic_dims_sizes=[[None, x.shape[1]], *(list(parameter.shape) for parameter in parameters)],
            dynamic_dims_strides=[[None, None], *(list(parameter.stride()) for parameter in parameters)],
        )

    @staticmethod
    def can_hold(x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...]) -> bool:
        """True if the decision for such a call can be cached. Guards do not accept the same tensor twice."""
        parameters = [*weights, *(bias for bias in biases if bias is not None)]
        return (
            TensorGuards is not None
            and not is_intercepted()
            and x.dim() == 2
            and x.device.type in ("cuda", "cpu")
            and not x.is_neg()
            and len(set(map(id, parameters))) == len(parameters)
        )

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
        same: bool = self.guards.check(x, *weights, *biases)  # False if a bias has become None
        return same


class Run:
    """Consecutive children that the kernels compute together; or a single child that is called as a module."""

    def __init__(self, children: list[Any], reason: str | None = None) -> None:
        self.children = children
        self.linears: list[tuple[nn.Module, Activation]] = []
        self.dropouts: list[float] = []  # for each Linear, the probability of its Dropout; 0 if nothing is dropped
        self.owned: list[dict[str, Any]] = []  # for each Linear, its dict `_parameters`
        self.transposed: list[bool] = []  # for each Linear, True if its weight is (in, out)
        self.any_transposed = False
        self.reason = reason  # the reason why the child is called as a module
        self.decisions: list[Decision] = []  # the last two paths: training and evaluation alternate

    def call(self, input: Tensor) -> Tensor:
        """Call the children as modules, one after the other."""
        for child in self.children:
            input = child(input)
        return input

    def fixed_call(self) -> Callable[..., Tensor]:
        """A function (input, weights, biases) that computes the same as `call` does now, even after children change."""
        children = [child if is_linear(child) else copy.copy(child) for child in self.children]
        activations = [child.activation for child in children if isinstance(child, LinearWithActivation)]

        def call(input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
            parameters, own = zip(weights, biases), iter(activations)
            for child in children:
                if is_linear(child):
                    input = F.linear(input, *next(parameters))
                    child = next(own) if isinstance(child, LinearWithActivation) else IDENTITY
                input = child(input)
            return input

        return call

    def parameters(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """(weights, biases), the weights as (out, in)."""
        weights = tuple([owned["weight"] for owned in self.owned])
        if self.any_transposed:
            weights = tuple([weight.t() if across else weight for weight, across in zip(weights, self.transposed)])
        return weights, tuple([owned["bias"] for owned in self.owned])

    def layers(self) -> tuple[Layer, ...]:
        return tuple(map(Layer, *self.parameters(), (activation for _, activation in self.linears), self.dropouts))

    def gathered_layers(self, device: str | None = None, dtype: torch.dtype | None = None) -> tuple[Layer, ...]:
        """The layers with parameters of the shapes that they have in a call.

        Between calls, FSDP shards the parameters that it manages. Zeros of the whole shape replace them here, with
        `device` and `dtype` if given, else with the device and dtype of the parameter.
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
    """The runs of a network, and a record of its children by which every call checks that the runs are still valid."""

    def __init__(self, model: Parent) -> None:
        self.children = model._ordered_children()
        self.runs = find_runs(self.children)
        inner = [child._modules["linear"] for child in self.children if isinstance(child, LinearWithActivation)]
        self.parts = (*self.children, *inner)
        self.types = [*map(type, self.parts)]
        self.dicts = [part.__dict__ for part in self.parts if isinstance(part, nn.Module)]
        self.plain = self._are_called_plainly()
        if not self.plain:
            return  # the next call splits the children into runs again
        self.code = _replaceable_code(self.parts)
        self.state = self.code.now()
        # The attributes on which the runs depend: parameters of activations, Dropout's p and mode, FusedLinear's child.
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
                    if import_path(type(child)) == POINTWISE
                    else set(activation.parameters if activation else ())
                )
                # Properties, buffers and values that are not plain may change without notice.
                self.plain &= decisive <= set(names)
                self.plain &= all(isinstance(child.__dict__[name], PLAIN) for name in names)
            settings += [(child.__dict__, name) for name in names]
        # Three parallel lists, which `map` reads without a Python call for each attribute.
        self.holders = [holder for holder, _ in settings]
        self.names = [name for _, name in settings]
        self.values = [*map(dict.get, self.holders, self.names)]
        self.owned = [owned for run in self.runs for owned in run.owned for _ in PARAMETERS]
        self.owned_names = [name for run in self.runs for _ in run.owned for name in PARAMETERS]

    def hold(self, model: Parent) -> bool:
        """True if the children are the same, with the same classes, settings and code, and without hooks or patches."""
        return (
            self.plain
            and model._ordered_children() == self.children
            and [*map(type, self.parts)] == self.types
            and self._are_called_plainly()
            and self.code.now() == self.state
            and all(map(dict.__contains__, self.owned, self.owned_names))
            and [*map(dict.get, self.holders, self.names)] == self.values
        )

    def _are_called_plainly(self) -> bool:
        """True if no child has a hook or a patched forward, and nothing else makes all of them run as modules."""
        return not (are_hooked(self.dicts) or has_global_hooks() or (count_function_modes() and why_mode()))

    def log_reasons(self) -> None:
        """Log the reasons why Linear layers run as modules, each once in a process."""
        for run in self.runs:
            if run.reason and is_linear(run.children[0]):
                paths.log_once(run.reason)

    def refuse_split(self, model: Parent) -> None:
        """Raise an error if a layer is split over processes. (Others with hooks run as modules, with any backend.)

        Raises:
            RuntimeError: a Linear is split over processes.
        """
        split = [child for run in self.runs if run.reason == SPLIT for child in run.children]
        names = [
            name for name, child in zip(model._ordered_names(), self.children) if any(child is other for other in split)
        ]
        if names:
            listed = ", ".join(names)
            raise RuntimeError(
                f'backend is "triton", but child {listed} cannot run on kernels: {SPLIT}; '
                'backend="auto" runs plain torch'
            )


def find_runs(children: Iterable[Any], training: bool | None = None, drops: bool = True) -> list[Run]:
    """The children of a network, split into runs.

    Args:
        training: the mode to assume for all children; None: each child's own.
        drops: False if a run must not have active Dropout, which is then called as a module.
    """
    if everywhere := why_modules():
        return [Run([child], everywhere) for child in children]
    runs: list[Run] = []
    run: Run | None = None
    takes_activation = False  # True if the run's last Linear has neither an activation nor Dropout yet
    for child in children:
        why = why_unfused(child)
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
            and (p := _dropout(child, training)) is not None
            and not (p and (run.dropouts[-1] or not drops))  # a second Dropout would need a mask of its own
        ):
            if p:
                run.dropouts[-1] = p
                takes_activation = False
        elif (
            run is not None
            and takes_activation
            and (following := find(child))
            and why_called(child, activation=following) is None
        ):
            run.linears[-1] = (run.linears[-1][0], following)
            takes_activation = following is IDENTITY
        else:
            if not is_linear(child) and (following := find(child)):
                why = (
                    why_called(child, activation=following) or "it follows no Linear layer that it could be fused with"
                )
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


# Linear layers whose weight is (in, out). They are given by path, as they need not be installed.
TRANSPOSED = ("transformers.pytorch_utils.Conv1D",)


def _is_transposed(module: Any) -> bool:
    """True if a module is a Linear layer whose weight is (in, out)."""
    return import_path(type(module)) in TRANSPOSED


def is_linear(module: Any) -> bool:
    """True if a module is a Linear layer of any kind."""
    # Tuples of classes here and below: torch 2.9 does not compile isinstance with a union.
    return isinstance(module, (Linear, LinearWithActivation)) or _is_transposed(module)


def linear_weight(linear: Any) -> Tensor:
    """The weight of a Linear layer as (out, in)."""
    weight: Tensor = linear.weight
    return weight.t() if _is_transposed(linear) else weight


def module_name(child: Any) -> str:
    """The name of a module, function or activation, for error messages."""
    if isinstance(child, Activation):
        return str(child)
    return type(child).__name__ if isinstance(child, nn.Module) else getattr(child, "__name__", type(child).__name__)


def why_unfused(module: Any) -> str | None:
    """The reason why kernels cannot replace a call of this module; None if it is a plain Linear layer."""
    if not is_linear(module):
        return f"{module_name(module)} has no kernel"
    if isinstance(module, LinearWithActivation):
        linear = module._modules["linear"]
        if (why := why_called(module, module.declared)) is not None:
            return why
        if not isinstance(linear, Linear):
            return f"its linear is {module_name(linear)}, which has no kernel"
        return why_unfused(linear) or why_replaced((), module.activation.name)
    known, function = (type(module), ADDMM) if _is_transposed(module) else (Linear, LINEAR)
    if (why := why_called(module, known, (function,))) is not None:
        return why
    if "weight" not in module._parameters:
        return "its weight is parametrized"
    if "bias" not in module._parameters:
        return "its bias is not one of its parameters"
    return why_hidden(type(module))


def why_called(
    child: Any, known: type | None = None, functions: tuple[str, ...] = (), activation: Activation = IDENTITY
) -> str | None:
    """The reason why a child must be called: it has a hook, or its code is not the library's. None otherwise.

    Args:
        child: a module or a function.
        known: the class whose code a kernel replaces; by default the child's own class.
        functions: the names of torch's functions that a call looks up.
        activation: the activation that the child computes, if it is one.
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
        return "fully_shard was called on it, and hooks gather its parameters; call it on the whole network instead"
    return SPLIT if is_split(module._parameters.get("weight")) else "it has hooks, or a forward patched onto it"


def _replaceable_code(parts: Iterable[Any]) -> Code:
    """The methods and functions that calls of these parts of a network run. Parts without a kernel are left out."""
    kinds: list[type] = []
    functions: list[str] = []
    for part in parts:
        activation = None if is_linear(part) else find(part)
        if is_linear(part):
            functions.append(ADDMM if _is_transposed(part) else LINEAR)
        elif activation is not None:
            functions += functions_called(activation.name)
        elif type(part) is Dropout:
            functions.append(DROPOUT)
        else:
            continue
        if isinstance(part, nn.Module):
            kinds.append(type(part))
        if isinstance(part, LinearWithActivation):
            functions += functions_called(part.activation.name)
    return Code(kinds, functions)


SPLIT = "the weight is a DTensor, split over processes, and hooks gather its parts"
UNREAD = ("training", "inplace", "in_features", "out_features")  # public attributes on which no activation depends
PLAIN = (bool, int, float, str, NoneType, Activation, BuiltinFunctionType, MethodType, functools.partial)


def is_split(tensor: object) -> bool:
    return is_loaded_instance(tensor, "torch.distributed.tensor", "DTensor")


def stand_in(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros with a tensor's shape and strides; for a DTensor, those of the whole tensor."""
    like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype or tensor.dtype, device=device)
    return like.zero_().requires_grad_(tensor.requires_grad)


def _dropout(module: Any, training: bool | None) -> float | None:
    """The probability with which a Dropout drops; 0 if it is inactive or an Identity; None for other modules."""
    if type(module) is Identity:
        return 0.0 if why_called(module) is None else None
    p: Any = module.p if type(module) is Dropout else None
    if not (type(p) in (int, float) or isinstance(p, Real)) or not 0 <= float(p) <= 1:
        return None  # not Dropout, or with a p for which torch raises an error
    if why_called(module, functions=(DROPOUT,)) is not None:
        return None
    return float(p) if (module.training if training is None else training) else 0.0
