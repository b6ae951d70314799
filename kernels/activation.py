"""class Activation: a pointwise activation, declared once; `register_activation` adds one to the table.

An activation is a pair of functions of one element, `forward(z) -> h` and `backward(dh, saved) -> dz`, written for
Triton and handed to the kernels, and their twins in plain torch. `saved` is the one tensor saved for backward: the
output h where the derivative can be computed from it accurately, the pre-activation z otherwise. Parameters (a slope,
an alpha) follow as compile-time constants, in the order of their declaration.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .language import HAS_TRITON, JIT_FUNCTION

__all__ = ["ACTIVATIONS", "Activation", "parse", "register_activation"]

Saved = Literal["output", "preactivation"]


@dataclass(frozen=True, eq=False)
class Activation:
    """h = forward(z), dz = backward(dh, saved): one pointwise activation, with the values of its parameters.

    Attributes:
        name: the name that users write.
        forward: `@triton.jit` function (z, *parameters) -> h.
        backward: `@triton.jit` function (dh, saved, *parameters) -> dz.
        saves: the tensor that `backward` reads, "output" or "preactivation"; or a function of the parameters that
            returns one of the two.
        reference: forward in plain torch, (z, *parameters) -> h. It looks up torch's function on every call, so that a
            user who has replaced that function (`F.gelu = ...`) gets the replacement.
        reference_backward: backward in plain torch, (dh, h, *parameters) -> dz. Needed where the output is saved.
        forward_and_slope: `@triton.jit` function z -> (h, a'(z)), for an activation without parameters. Given only
            if it takes fewer instructions than `forward` and `backward` together, once the compiler has merged the
            common parts of these two. Its results are accurate enough to be rounded to 16 bits.
        parameters: parameter names, in order, with their values.
        module: the `nn.Module` class of this activation. The parameters are its attributes, by the same names.
        matches: a test for the instances of `module` that are this activation; by default all.
        kinks: the points where the activation or its derivative jumps.
        rounds_parameters: True if parameters are rounded to the tensor's dtype, because outputs are compared with them.
        scales: True if the derivative can be computed from any positive multiple of the output, as after Dropout.
        piecewise: True if forward and backward are piecewise polynomials, a few instructions an element. The estimated
            time of a kernel depends on it.
    """

    name: str
    forward: Any
    backward: Any
    saves: Saved | Callable[..., Saved]
    reference: Callable[..., Tensor]
    reference_backward: Callable[..., Tensor] | None = None
    forward_and_slope: Any = None
    parameters: Mapping[str, float] = field(default_factory=dict)
    module: type[nn.Module] | None = None
    matches: Callable[[nn.Module], bool] = lambda module: True
    kinks: Callable[..., tuple[float, ...]] = lambda *parameters: ()
    rounds_parameters: bool = False
    scales: bool = False
    piecewise: bool = False

    # Computed once, because every call reads them.
    values: tuple[float, ...] = field(init=False, repr=False)  # the parameters' values, in order
    saved_tensor: Saved = field(init=False, repr=False)  # the value of `saves` for these parameters
    saves_preactivation: bool = field(init=False, repr=False)
    spec: str = field(init=False, repr=False)  # name and exact parameter values, in the form that `parse` reads

    def __post_init__(self) -> None:
        values = tuple(self.parameters.values())
        saved_tensor = self.saves(*values) if callable(self.saves) else self.saves
        derived = {
            "values": values,
            "saved_tensor": saved_tensor,
            "saves_preactivation": saved_tensor == "preactivation",
            "spec": ":".join([self.name, *(f"{name}={value!r}" for name, value in self.parameters.items())]),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def constants(self, dtype: torch.dtype) -> tuple[float, ...]:
        """The parameter values to compile into kernels for `dtype`."""
        return _rounded(self.values, dtype) if self.rounds_parameters else self.values

    def bind(self, **parameters: float) -> Activation:
        """The same activation with other parameter values.

        Raises:
            TypeError: the activation has no such parameter, or a value is not a number.
        """
        unknown = parameters.keys() - self.parameters.keys()
        if unknown:
            has = ", ".join(self.parameters) or "none"
            raise TypeError(
                f"activation {self.name!r} has no parameter {sorted(unknown)[0]!r}; its parameters are: {has}"
            )
        given: Mapping[str, Any] = parameters
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"activation {self.name!r}: {name} is {value!r}; it needs to be a number")
        merged = tuple((name, float(parameters.get(name, default))) for name, default in self.parameters.items())
        return bound(self, merged)

    def __call__(self, z: Tensor) -> Tensor:
        """h = a(z) in plain torch."""
        return self.reference(z, *self.values)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.name, tuple(self.parameters.items()))  # by name: the functions cannot be pickled

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={value:g}" for name, value in self.parameters.items())
        return f"{self.name}({arguments})" if arguments else self.name


_BOUND: dict[tuple[str, tuple[tuple[str, float], ...]], Activation] = {}


def bound(declared: Activation, parameters: tuple[tuple[str, float], ...]) -> Activation:
    """`declared` with these values. The same arguments give the same object, so caches may key on identity."""
    values = dict(parameters)
    if values == declared.parameters:
        return declared
    return _BOUND.setdefault((declared.name, parameters), replace(declared, parameters=values))


@functools.lru_cache(maxsize=256)
def _rounded(values: tuple[float, ...], dtype: torch.dtype) -> tuple[float, ...]:
    return tuple(torch.tensor(values, dtype=torch.float64).to(dtype).tolist())


def _restore(name: str, parameters: tuple[tuple[str, float], ...]) -> Activation:
    """The unpickled activation. Pickles look this function up in activations.py, so that loading fills the table."""
    if name not in ACTIVATIONS:
        raise ValueError(f"the activation {name!r} is not registered; call register_activation before loading")
    return ACTIVATIONS[name].bind(**dict(parameters))


_restore.__module__ = f"{__package__}.activations"


ACTIVATIONS: dict[str, Activation] = {}


@functools.lru_cache(maxsize=1024)
def parse(spec: str) -> Activation:
    """The activation with this `spec`.

    Raises:
        KeyError: no activation of this name is registered.
    """
    name, *values = spec.split(":")
    pairs = (value.split("=") for value in values)
    return ACTIVATIONS[name].bind(**{parameter: float(value) for parameter, value in pairs})


def register_activation(
    name: str,
    forward: Any,
    backward: Any,
    *,
    saves: Saved | Callable[..., Saved] = "preactivation",
    reference: Callable[..., Tensor],
    reference_backward: Callable[..., Tensor] | None = None,
    forward_and_slope: Any = None,
    parameters: Mapping[str, float] | None = None,
    module: type[nn.Module] | None = None,
    matches: Callable[[nn.Module], bool] = lambda module: True,
    kinks: Callable[..., tuple[float, ...]] = lambda *parameters: (),
    rounds_parameters: bool = False,
    scales: bool = False,
    piecewise: bool = False,
) -> Activation:
    """Add an activation to the table, under a new name: h = forward(z), dz = backward(dh, saved).

    `Activation` describes the arguments. `forward` and `backward` are `@triton.jit` functions of fp32 values (under the
    interpreter also fp64). `reference` runs wherever plain torch takes the place of the kernels, for example for CPU
    tensors and fp64 tensors, and when a gradient is differentiated.

    Raises:
        ValueError: the name is taken, `saves` is unknown, or the output is saved and `reference_backward` is missing.
        TypeError: the name is not a string or is empty, a function for kernels is not a `@triton.jit` function, or
            `reference` cannot be called.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"name is {name!r}; it needs to be a non-empty string")
    if name in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is registered already; choose another name")
    if not callable(saves) and saves not in ("output", "preactivation"):
        raise ValueError(f'saves is {saves!r}; it needs to be "output" or "preactivation"')
    if saves != "preactivation" and reference_backward is None:
        raise ValueError(
            f"activation {name!r} saves its output and has no reference_backward; give the derivative in plain torch, "
            "(dh, h) -> dz, so that a gradient can be differentiated"
        )
    if not callable(reference):
        raise TypeError(f"reference is {type(reference).__name__}; it needs to be a function z -> h in plain torch")
    functions = [("forward", forward), ("backward", backward)]
    if forward_and_slope is not None:
        functions.append(("forward_and_slope", forward_and_slope))
    for role, function in functions:
        if HAS_TRITON and not isinstance(function, JIT_FUNCTION):
            raise TypeError(f"{role} is {type(function).__name__}; it needs to be a @triton.jit function")
    ACTIVATIONS[name] = Activation(
        name=name,
        forward=forward,
        backward=backward,
        saves=saves,
        reference=reference,
        reference_backward=reference_backward,
        forward_and_slope=forward_and_slope,
        parameters=dict(parameters or {}),
        module=module,
        matches=matches,
        kinks=kinks,
        rounds_parameters=rounds_parameters,
        scales=scales,
        piecewise=piecewise,
    )
    return ACTIVATIONS[name]
