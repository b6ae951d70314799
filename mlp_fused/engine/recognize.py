"""Find the activation in the table for a name, a module or a function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.activation import ACTIVATIONS, Activation, bound
from ..kernels.activations import BUILT_IN

__all__ = ["resolve"]


def is_registered_by_user(kind: type) -> bool:
    """True if a user registered this module class as an activation. Its code is then not compared with a library's."""
    return any(activation.module is kind for name, activation in ACTIVATIONS.items() if name not in BUILT_IN)


_BY_MODULE: dict[Any, tuple[Activation, ...]] = {}  # a plain dict, which torch.compile sees through


def _by_module(kind: Any) -> tuple[Activation, ...]:
    """The activations of a module class, cached until another one is registered."""
    key = (kind, len(ACTIVATIONS))
    cached = _BY_MODULE.get(key)
    if cached is None:
        cached = tuple(activation for activation in ACTIVATIONS.values() if activation.module is kind)
        if not torch.compiler.is_compiling():
            _BY_MODULE[key] = cached
    return cached


# Module classes of other libraries that compute an activation. They are given by path, as they need not be installed.
CLASSES: dict[str, str] = {
    "transformers.activations.AccurateGELUActivation": "gelu_tanh",
    "transformers.activations.FastGELUActivation": "gelu_tanh",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.LinearActivation": "identity",
    "transformers.activations.MishActivation": "mish",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.PytorchGELUTanh": "gelu_tanh",  # GELUTanh's name before transformers 5
    "transformers.activations.QuickGELUActivation": "quick_gelu",
    "transformers.activations.ReLUSquaredActivation": "squared_relu",
    "transformers.activations.SiLUActivation": "silu",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "timm.layers.activations.HardSigmoid": "hardsigmoid",
    "timm.layers.activations.HardSwish": "hardswish",
    "timm.layers.activations.Mish": "mish",
    "timm.layers.activations.QuickGELU": "quick_gelu",
    "timm.layers.activations.Sigmoid": "sigmoid",
    "timm.layers.activations.Swish": "silu",
    "timm.layers.activations.Tanh": "tanh",
}

# Functions of torch that compute an activation, by the names under which modules and users look them up.
FUNCTIONS: dict[str, str] = {
    "torch.nn.functional.relu": "relu",
    "torch.relu": "relu",
    "torch.nn.functional.leaky_relu": "leaky_relu",
    "torch.nn.functional.hardtanh": "hardtanh",
    "torch.nn.functional.relu6": "relu6",
    "torch.nn.functional.elu": "elu",
    "torch.nn.functional.celu": "celu",
    "torch.nn.functional.selu": "selu",
    "torch.nn.functional.gelu": "gelu",
    "torch.nn.functional.silu": "silu",
    "torch.nn.functional.mish": "mish",
    "torch.nn.functional.sigmoid": "sigmoid",
    "torch.sigmoid": "sigmoid",
    "torch.nn.functional.softplus": "softplus",
    "torch.nn.functional.logsigmoid": "logsigmoid",
    "torch.nn.functional.tanh": "tanh",
    "torch.tanh": "tanh",
    "torch.nn.functional.tanhshrink": "tanhshrink",
    "torch.nn.functional.softsign": "softsign",
    "torch.nn.functional.softshrink": "softshrink",
    "torch.nn.functional.hardshrink": "hardshrink",
    "torch.nn.functional.hardsigmoid": "hardsigmoid",
    "torch.nn.functional.hardswish": "hardswish",
    "torch.exp": "exp",
    "torch.sin": "sine",
}

# Other functions that an activation's reference calls, or that a module class of this activation calls.
CALLED: dict[str, tuple[str, ...]] = {
    "squared_relu": ("torch.nn.functional.relu", "torch.relu"),
    "threshold": ("torch.nn.functional.threshold",),
    "relu6": ("torch.nn.functional.hardtanh",),
    "gelu_tanh": ("torch.nn.functional.gelu", "torch.tanh"),
    "quick_gelu": ("torch.sigmoid",),
}


@functools.cache
def _place(name: str) -> tuple[dict[str, Any], str]:
    """The `__dict__` of the torch module that has this function, and the function's name in it."""
    module, _, own_name = name.rpartition(".")
    return vars(F if module == F.__name__ else torch), own_name


def look_up(name: str) -> Any:
    """The function of torch that has this name now."""
    attributes, own_name = _place(name)
    return attributes[own_name]


_BY_FUNCTION: dict[Callable[..., Tensor], str] = {look_up(name): activation for name, activation in FUNCTIONS.items()}


@functools.lru_cache(maxsize=256)
def functions_called(activation: str) -> tuple[str, ...]:
    """The names of the functions of torch that the activation of this name calls."""
    return (*(name for name, computed in FUNCTIONS.items() if computed == activation), *CALLED.get(activation, ()))


def import_path(kind: type) -> str:
    """The full name of a class, such as "torch.nn.modules.activation.GELU"."""
    return f"{kind.__module__}.{kind.__qualname__}"


POINTWISE = "mlp_fused.module.Pointwise"  # the module class that has its activation as an attribute


def find(module: Callable[..., Any]) -> Activation | None:
    """The activation that a module or function computes, with its parameters; None if it is not in the table."""
    if isinstance(module, Activation):
        return module
    if not isinstance(module, nn.Module):
        return _find_function(module)
    kind: Any = type(module)
    if import_path(kind) == POINTWISE:
        carried: Any = module.activation
        return carried if isinstance(carried, Activation) else None
    for activation in _by_module(kind):
        if activation.matches(module):
            if not activation.parameters:
                return activation
            return bound(activation, tuple((name, float(getattr(module, name))) for name in activation.parameters))
    name = CLASSES.get(import_path(kind))
    if name is None:
        return None
    inner = getattr(module, "act", None)  # some of these classes call a function: torch's, or a method of their own
    known = inner is None or getattr(inner, "__self__", None) is module or find(inner) is ACTIVATIONS[name]
    return ACTIVATIONS[name] if known else None


def _find_function(function: Callable[..., Any]) -> Activation | None:
    """The activation that a function of torch computes; None if it is not in the table.

    A `functools.partial` of a function gives the activation's parameters by keyword.
    """
    keywords: dict[str, Any] = {}
    if isinstance(function, functools.partial):
        if function.args:
            return None
        keywords, function = dict(function.keywords), function.func
    if not isinstance(function, FunctionType | BuiltinFunctionType) or function not in _BY_FUNCTION:
        return None
    name = _BY_FUNCTION[function]
    keywords.pop("inplace", None)
    if function is F.gelu and (approximate := keywords.pop("approximate", "none")) != "none":
        if approximate != "tanh":  # torch refuses it
            return None
        name = "gelu_tanh"
    activation = ACTIVATIONS[name]
    return activation.bind(**keywords) if keywords.keys() <= activation.parameters.keys() else None


def resolve(
    activation: str | Activation | nn.Module | type[nn.Module] | Callable[..., Tensor] | None,
    argument: str = "activation",
) -> Activation:
    """The activation for a name, an `nn.Module` class or instance, or a function of torch; the identity for None.

    Raises:
        ValueError: the name, the module or the function is not in the table.
        TypeError: it is something else, or a class that cannot be made without arguments.
    """
    if activation is None:
        return ACTIVATIONS["identity"]
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"{argument} is {activation!r}; it needs to be one of: {', '.join(ACTIVATIONS)}; "
                "or add it with register_activation"
            )
        return ACTIVATIONS[activation]
    module: Any = activation
    if isinstance(activation, type) and issubclass(activation, nn.Module):
        try:
            module = activation()
        except TypeError as error:
            raise TypeError(
                f"{argument} is {name_in_sentences(activation)}, which cannot be made without arguments ({error}); "
                "pass an instance"
            ) from None
    if isinstance(module, nn.Module) or (callable(module) and not isinstance(module, type)):
        known = find(module)
        if known is None:
            raise ValueError(
                f"{argument} is {name_in_sentences(module)}, which has no kernel; it needs to be one of: "
                f"{', '.join(ACTIVATIONS)}; or add it with register_activation"
            )
        return known
    raise TypeError(
        f"{argument} is {type(activation).__name__}; it needs to be a name, an nn.Module class or instance, a function "
        "such as torch.relu, or None"
    )


def name_in_sentences(activation: Any) -> str:
    """A name, for error messages, of a module, class or function that was given as an activation."""
    if isinstance(activation, nn.Module):
        return type(activation).__name__
    if isinstance(activation, type):
        return f"the class {activation.__name__}"
    function = activation.func if isinstance(activation, functools.partial) else activation
    return f"the function {getattr(function, '__name__', type(function).__name__)}"
