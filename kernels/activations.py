"""ACTIVATIONS: every activation, declared once.

An activation is a pair of functions of one element, `forward(z) -> h` and `backward(dh, saved) -> dz`, written for
Triton and handed to the kernels, and their twins in plain torch. `saved` is the one tensor kept for backward: the
output h where the derivative can be read off it accurately, the pre-activation z otherwise. Parameters (a slope, an
alpha) follow as compile-time constants, in their declared order.

Names, error texts, the mapping from `nn.Module` classes, test ids and the README's list all come from the table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import BuiltinFunctionType, FunctionType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .language import HAS_TRITON, tl, triton

__all__ = ["ACTIVATIONS", "Activation", "parse", "register_activation", "resolve"]

Kept = Literal["output", "preactivation"]


@dataclass(frozen=True, eq=False)
class Activation:
    """h = forward(z), dz = backward(dh, saved): one pointwise activation, its parameters bound.

    Attributes:
        name: what users write.
        forward: `@triton.jit` function (z, *parameters) -> h.
        backward: `@triton.jit` function (dh, saved, *parameters) -> dz.
        saves: which tensor `backward` reads, "output" or "preactivation"; or a function of the parameters that says so.
        reference: forward in plain torch, (z, *parameters) -> h. It looks torch's functions up on every call, so that
            one that is replaced is seen.
        reference_backward: backward in plain torch where the output is kept, (dh, h, *parameters) -> dz.
        parameters: parameter names, in order, with their values.
        module: the `nn.Module` class that this is, its parameters being attributes of the same names.
        matches: which instances of `module`, where not all of them.
        kinks: the points where the derivative jumps.
        rounds_parameters: whether parameters act as values of the tensor's dtype (bounds to compare an output with).
        scales: whether the derivative may be read off any positive multiple of the output, as Dropout leaves it.
        piecewise: whether forward and backward are piecewise polynomials, a few instructions an element; the estimated
            time of a kernel depends on it.
    """

    name: str
    forward: Any
    backward: Any
    saves: Kept | Callable[..., Kept]
    reference: Callable[..., Tensor]
    reference_backward: Callable[..., Tensor] | None = None
    parameters: Mapping[str, float] = field(default_factory=dict)
    module: type[nn.Module] | None = None
    matches: Callable[[nn.Module], bool] = lambda module: True
    kinks: Callable[..., tuple[float, ...]] = lambda *parameters: ()
    rounds_parameters: bool = False
    scales: bool = False
    piecewise: bool = False

    # Derived once: they are read on the path of every call.
    values: tuple[float, ...] = field(init=False, repr=False)  # the parameters' values, in order
    keeps: Kept = field(init=False, repr=False)  # which tensor backward reads with these parameters
    keeps_preactivation: bool = field(init=False, repr=False)
    spec: str = field(init=False, repr=False)  # name and parameter values, exactly, as `parse` reads them

    def __post_init__(self) -> None:
        values = tuple(self.parameters.values())
        keeps = self.saves(*values) if callable(self.saves) else self.saves
        derived = {
            "values": values,
            "keeps": keeps,
            "keeps_preactivation": keeps == "preactivation",
            "spec": ":".join([self.name, *(f"{name}={value!r}" for name, value in self.parameters.items())]),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def constants(self, dtype: torch.dtype) -> tuple[float, ...]:
        """The parameters as the kernels for `dtype` take them."""
        return _rounded(self.values, dtype) if self.rounds_parameters else self.values

    def bind(self, **parameters: float) -> Activation:
        """The same activation with other parameter values.

        Raises:
            TypeError: a parameter it does not have, or a value that is not a number.
        """
        unknown = parameters.keys() - self.parameters.keys()
        if unknown:
            has = ", ".join(self.parameters) or "none"
            raise TypeError(
                f"activation {self.name!r} has no parameter {sorted(unknown)[0]!r}; its parameters are: {has}"
            )
        for name, value in parameters.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"activation {self.name!r}: {name} is {value!r}; it needs to be a number")
        merged = tuple((name, float(parameters.get(name, default))) for name, default in self.parameters.items())
        return _bound(self, merged)

    def __call__(self, z: Tensor) -> Tensor:
        """h = a(z) in plain torch."""
        return self.reference(z, *self.values)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.name, tuple(self.parameters.items()))  # by name: functions are not for pickling

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={value:g}" for name, value in self.parameters.items())
        return f"{self.name}({arguments})" if arguments else self.name


_BOUND: dict[tuple[str, tuple[tuple[str, float], ...]], Activation] = {}


def _bound(declared: Activation, parameters: tuple[tuple[str, float], ...]) -> Activation:
    """One object per activation and parameter values, so that caches may key on identity."""
    values = dict(parameters)
    if values == declared.parameters:
        return declared
    return _BOUND.setdefault((declared.name, parameters), replace(declared, parameters=values))


@functools.lru_cache(maxsize=256)
def _rounded(values: tuple[float, ...], dtype: torch.dtype) -> tuple[float, ...]:
    return tuple(torch.tensor(values, dtype=torch.float64).to(dtype).tolist())


def _restore(name: str, parameters: tuple[tuple[str, float], ...]) -> Activation:
    return resolve(name).bind(**dict(parameters))


ACTIVATIONS: dict[str, Activation] = {}


@functools.lru_cache(maxsize=1024)
def parse(spec: str) -> Activation:
    """The activation of which that is the `spec`.

    Raises:
        KeyError: it is not registered.
    """
    name, *values = spec.split(":")
    pairs = (value.split("=") for value in values)
    return ACTIVATIONS[name].bind(**{parameter: float(value) for parameter, value in pairs})


def register_activation(
    name: str,
    forward: Any,
    backward: Any,
    *,
    saves: Kept | Callable[..., Kept] = "preactivation",
    reference: Callable[..., Tensor],
    reference_backward: Callable[..., Tensor] | None = None,
    parameters: Mapping[str, float] | None = None,
    module: type[nn.Module] | None = None,
    matches: Callable[[nn.Module], bool] = lambda module: True,
    kinks: Callable[..., tuple[float, ...]] = lambda *parameters: (),
    rounds_parameters: bool = False,
    scales: bool = False,
    piecewise: bool = False,
) -> Activation:
    """h = forward(z), dz = backward(dh, saved): add an activation to the table, under a new name.

    See `Activation` for what each argument is. `forward` and `backward` are `@triton.jit` functions of fp32 values
    (fp64 under the interpreter); `reference` is what runs on a CPU, for fp64, and when a gradient is differentiated.

    Raises:
        ValueError: the name is taken, `saves` is unknown, or the output is kept and `reference_backward` is missing.
        TypeError: `forward` or `backward` is not a `@triton.jit` function, or `reference` cannot be called.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"name is {name!r}; it needs to be a non-empty string")
    if name in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is registered already; choose another name")
    if not callable(saves) and saves not in ("output", "preactivation"):
        raise ValueError(f'saves is {saves!r}; it needs to be "output" or "preactivation"')
    if saves != "preactivation" and reference_backward is None:
        raise ValueError(
            f"activation {name!r} keeps its output and has no reference_backward; give the derivative in plain torch, "
            "(dh, h) -> dz, so that a gradient can be differentiated"
        )
    if not callable(reference):
        raise TypeError(f"reference is {type(reference).__name__}; it needs to be a function z -> h in plain torch")
    for role, function in (("forward", forward), ("backward", backward)):
        if HAS_TRITON and not isinstance(function, triton.runtime.jit.KernelInterface):
            raise TypeError(f"{role} is {type(function).__name__}; it needs to be a @triton.jit function")
    ACTIVATIONS[name] = Activation(
        name=name,
        forward=forward,
        backward=backward,
        saves=saves,
        reference=reference,
        reference_backward=reference_backward,
        parameters=dict(parameters or {}),
        module=module,
        matches=matches,
        kinks=kinks,
        rounds_parameters=rounds_parameters,
        scales=scales,
        piecewise=piecewise,
    )
    _BY_MODULE.clear()
    return ACTIVATIONS[name]


def is_users(kind: type) -> bool:
    """True if a user registered a module class, whose word is taken for what it computes."""
    return any(activation.module is kind for name, activation in ACTIVATIONS.items() if name not in BUILT_IN)


_BY_MODULE: dict[Any, tuple[Activation, ...]] = {}


def _by_module(kind: Any) -> tuple[Activation, ...]:
    """Remembered in a plain dict, which torch.compile sees through."""
    found = _BY_MODULE.get(kind)
    if found is None:
        found = tuple(activation for activation in ACTIVATIONS.values() if activation.module is kind)
        if not torch.compiler.is_compiling():
            _BY_MODULE[kind] = found
    return found


# The same functions as other libraries' modules: by path, as none of these need be installed.
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

# Functions of torch that compute an activation, by the names under which modules and their users look them up.
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

# Functions that a part of an activation is computed with, in its reference or in a module that it stands for.
CALLED: dict[str, tuple[str, ...]] = {
    "squared_relu": ("torch.nn.functional.relu", "torch.relu"),
    "threshold": ("torch.nn.functional.threshold",),
    "relu6": ("torch.nn.functional.hardtanh",),
    "gelu_tanh": ("torch.nn.functional.gelu", "torch.tanh"),
    "quick_gelu": ("torch.sigmoid",),
}


@functools.cache
def _place(name: str) -> tuple[dict[str, Any], str]:
    """The attributes of the module in which a function of torch is found, and its name there."""
    module, _, own_name = name.rpartition(".")
    return vars(F if module == F.__name__ else torch), own_name


def look_up(name: str) -> Any:
    """The function of torch that has this name now."""
    attributes, own_name = _place(name)
    return attributes[own_name]


_BY_FUNCTION: dict[Callable[..., Tensor], str] = {look_up(name): activation for name, activation in FUNCTIONS.items()}


@functools.lru_cache(maxsize=256)
def functions_called(activation: str) -> tuple[str, ...]:
    """The names of torch's functions that an activation of that name is computed with."""
    return (*(name for name, computed in FUNCTIONS.items() if computed == activation), *CALLED.get(activation, ()))


def path_of(kind: type) -> str:
    """A class by its full name, such as "torch.nn.modules.activation.GELU"."""
    return f"{kind.__module__}.{kind.__qualname__}"


POINTWISE = "mlp_fused.module.Pointwise"  # the module class that computes the record in its `activation`


def find(module: Callable[..., Any]) -> Activation | None:
    """The activation that a module or function is, its parameters read off it; None where it is none of the table's."""
    if isinstance(module, Activation):
        return module
    if not isinstance(module, nn.Module):
        return _find_function(module)
    kind: Any = type(module)
    if path_of(kind) == POINTWISE:
        carried: Any = module.activation
        return carried if isinstance(carried, Activation) else None
    for activation in _by_module(kind):
        if activation.matches(module):
            if not activation.parameters:
                return activation
            return _bound(activation, tuple((name, float(getattr(module, name))) for name in activation.parameters))
    name = CLASSES.get(path_of(kind))
    if name is None:
        return None
    inner = getattr(module, "act", None)  # the function that some of them call, torch's or a method of their own
    known = inner is None or getattr(inner, "__self__", None) is module or find(inner) is ACTIVATIONS[name]
    return ACTIVATIONS[name] if known else None


def _find_function(function: Callable[..., Any]) -> Activation | None:
    """The activation that a function of torch's is, or a `functools.partial` of one with its parameters."""
    keywords: dict[str, Any] = {}
    if isinstance(function, functools.partial):
        if function.args:
            return None
        keywords, function = dict(function.keywords), function.func
    if not isinstance(function, FunctionType | BuiltinFunctionType) or function not in _BY_FUNCTION:
        return None
    activation = ACTIVATIONS[_BY_FUNCTION[function]]
    keywords.pop("inplace", None)
    if function is F.gelu and keywords.pop("approximate", "none") == "tanh":
        activation = ACTIVATIONS["gelu_tanh"]
    return activation.bind(**keywords) if keywords.keys() <= activation.parameters.keys() else None


def resolve(
    activation: str | Activation | nn.Module | type[nn.Module] | None, argument: str = "activation"
) -> Activation:
    """The table's row for a name, an `nn.Module` class or instance; None is the identity.

    Raises:
        ValueError: the name is not in the table, or the module is none of the table's.
        TypeError: anything else.
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
    module = activation
    if isinstance(activation, type) and issubclass(activation, nn.Module):
        try:
            module = activation()
        except TypeError as error:
            raise TypeError(
                f"{argument} is the class {activation.__name__}, which cannot be made without arguments ({error}); "
                "pass an instance"
            ) from None
    if isinstance(module, nn.Module):
        found = find(module)
        if found is None:
            raise ValueError(
                f"{argument} is {type(module).__name__}, which has no kernel; it needs to be one of: "
                f"{', '.join(ACTIVATIONS)}; or add it with register_activation"
            )
        return found
    raise TypeError(
        f"{argument} is {type(activation).__name__}; it needs to be a name, an nn.Module class or instance, or None"
    )


# --- Elementary functions that Triton's language lacks, each relatively accurate near 0 and safe at infinity. ---


@triton.jit
def expm1(x):
    """e^x - 1: its Taylor polynomial for |x| < 0.35 (truncated below 1e-12 relatively), exp(x) - 1 beyond."""
    p = x * (1 / 11) + 1
    p = p * x * (1 / 10) + 1
    p = p * x * (1 / 9) + 1
    p = p * x * (1 / 8) + 1
    p = p * x * (1 / 7) + 1
    p = p * x * (1 / 6) + 1
    p = p * x * (1 / 5) + 1
    p = p * x * (1 / 4) + 1
    p = p * x * (1 / 3) + 1
    p = p * x * (1 / 2) + 1
    return tl.where(tl.abs(x) < 0.35, p * x, tl.exp(x) - 1)


@triton.jit
def log1p_unit(x):
    """log(1 + x) for 0 <= x <= 1, as 2 artanh(s), s = x / (2 + x) <= 1/3, by its power series (to 1e-11 relatively)."""
    s = x / (2 + x)
    t = s * s
    p = t * (1 / 21) + 1 / 19
    p = p * t + 1 / 17
    p = p * t + 1 / 15
    p = p * t + 1 / 13
    p = p * t + 1 / 11
    p = p * t + 1 / 9
    p = p * t + 1 / 7
    p = p * t + 1 / 5
    p = p * t + 1 / 3
    return 2 * s * (p * t + 1)


@triton.jit
def tanh(x):
    """The hyperbolic tangent, from expm1(-2|x|), which lies in [-1, 0]."""
    t = expm1(-2 * tl.abs(x))
    magnitude = -t / (t + 2)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1 / (1 + tl.exp(-x))


# --- The table. Forward, derivative and their torch twins stand together; whoever changes one sees the others. ---


@triton.jit
def identity_forward(z):
    return z


@triton.jit
def identity_backward(dh, h):
    return dh


register_activation(
    "identity",
    identity_forward,
    identity_backward,
    saves="output",
    reference=lambda z: z,
    reference_backward=lambda dh, h: dh,
    module=nn.Identity,
    scales=True,
    piecewise=True,
)


@triton.jit
def relu_forward(z):
    return tl.where(z < 0, 0.0, z)  # a comparison, not a maximum: NaN stays NaN


@triton.jit
def relu_backward(dh, h):
    return tl.where(h <= 0, 0.0, dh)  # at NaN the gradient passes, as in torch


register_activation(
    "relu",
    relu_forward,
    relu_backward,
    saves="output",
    reference=lambda z: F.relu(z),
    reference_backward=lambda dh, h: dh.masked_fill(h <= 0, 0),
    module=nn.ReLU,
    kinks=lambda: (0.0,),
    scales=True,
    piecewise=True,
)


@triton.jit
def leaky_relu_forward(z, negative_slope):
    return tl.where(z > 0, z, z * negative_slope)


@triton.jit
def leaky_relu_backward(dh, saved, negative_slope):
    return tl.where(saved > 0, dh, dh * negative_slope)


register_activation(
    "leaky_relu",
    leaky_relu_forward,
    leaky_relu_backward,
    saves=lambda negative_slope: "output" if negative_slope >= 0 else "preactivation",  # else h has lost z's sign
    reference=lambda z, negative_slope: F.leaky_relu(z, negative_slope),
    reference_backward=lambda dh, h, negative_slope: torch.where(h > 0, dh, dh * negative_slope),
    parameters={"negative_slope": 0.01},
    module=nn.LeakyReLU,
    kinks=lambda negative_slope: (0.0,),
    scales=True,
    piecewise=True,
)


@triton.jit
def hardtanh_forward(z, min_val, max_val):
    return tl.where(z < min_val, min_val, tl.where(z > max_val, max_val, z))


@triton.jit
def hardtanh_backward(dh, h, min_val, max_val):
    return tl.where((h <= min_val) | (h >= max_val), 0.0, dh)


def _hardtanh_reference_backward(dh: Tensor, h: Tensor, min_val: float, max_val: float) -> Tensor:
    return dh.masked_fill((h <= min_val) | (h >= max_val), 0)


register_activation(
    "hardtanh",
    hardtanh_forward,
    hardtanh_backward,
    saves="output",
    reference=lambda z, min_val, max_val: F.hardtanh(z, min_val, max_val),
    reference_backward=_hardtanh_reference_backward,
    parameters={"min_val": -1.0, "max_val": 1.0},
    module=nn.Hardtanh,
    kinks=lambda min_val, max_val: (min_val, max_val),
    rounds_parameters=True,  # an output that was clamped equals the rounded bound
    piecewise=True,
)


@triton.jit
def relu6_forward(z):
    return hardtanh_forward(z, 0.0, 6.0)


@triton.jit
def relu6_backward(dh, h):
    return hardtanh_backward(dh, h, 0.0, 6.0)


register_activation(
    "relu6",
    relu6_forward,
    relu6_backward,
    saves="output",
    reference=lambda z: F.relu6(z),
    reference_backward=lambda dh, h: _hardtanh_reference_backward(dh, h, 0.0, 6.0),
    module=nn.ReLU6,
    kinks=lambda: (0.0, 6.0),
    piecewise=True,
)


@triton.jit
def squared_relu_forward(z):
    h = relu_forward(z)
    return h * h


@triton.jit
def squared_relu_backward(dh, z):
    return dh * 2 * relu_forward(z)


register_activation(
    "squared_relu",
    squared_relu_forward,
    squared_relu_backward,
    reference=lambda z: F.relu(z).square(),
    piecewise=True,
)


@triton.jit
def threshold_forward(z, threshold, value):
    return tl.where(z <= threshold, value, z)


@triton.jit
def threshold_backward(dh, z, threshold, value):
    return tl.where(z <= threshold, 0.0, dh)


register_activation(
    "threshold",
    threshold_forward,
    threshold_backward,
    reference=lambda z, threshold, value: F.threshold(z, threshold, value),
    parameters={"threshold": 0.0, "value": 0.0},
    module=nn.Threshold,
    kinks=lambda threshold, value: (threshold,),
    piecewise=True,
)


@triton.jit
def elu_forward(z, alpha):
    return tl.where(z > 0, z, alpha * expm1(z))


@triton.jit
def elu_backward(dh, z, alpha):
    return tl.where(z <= 0, dh * alpha * tl.exp(z), dh)


register_activation(
    "elu",
    elu_forward,
    elu_backward,
    reference=lambda z, alpha: F.elu(z, alpha),
    parameters={"alpha": 1.0},
    module=nn.ELU,
    kinks=lambda alpha: (0.0,),
)


@triton.jit
def celu_forward(z, alpha):
    return tl.where(z > 0, z, alpha * expm1(z / alpha))


@triton.jit
def celu_backward(dh, z, alpha):
    return tl.where(z <= 0, dh * tl.exp(z / alpha), dh)


register_activation(
    "celu",
    celu_forward,
    celu_backward,
    reference=lambda z, alpha: F.celu(z, alpha),
    parameters={"alpha": 1.0},
    module=nn.CELU,
    kinks=lambda alpha: (0.0,),
)


@triton.jit
def selu_forward(z):
    # scale and alpha: Klambauer et al., "Self-Normalizing Neural Networks", arXiv 1706.02515, equation 14
    return 1.0507009873554805 * tl.where(z > 0, z, 1.6732632423543772 * expm1(z))


@triton.jit
def selu_backward(dh, z):
    return dh * 1.0507009873554805 * tl.where(z <= 0, 1.6732632423543772 * tl.exp(z), 1.0)


register_activation(
    "selu", selu_forward, selu_backward, reference=lambda z: F.selu(z), module=nn.SELU, kinks=lambda: (0.0,)
)


@triton.jit
def gelu_forward(z):
    """z Φ(z), the tail Φ(-|z|) as 2^p(|z|).

    p is log2 Φ(-t), fitted on 0 <= t <= 6 for the least largest error of Φ (4e-8, that of fp32 itself); beyond, its
    leading coefficient takes it to -inf. A polynomial and one exponential, with no branch, are a third of erf's
    instructions, and the tail has no cancellation.
    """
    t = tl.abs(z)
    p = t * -2.6499466e-08 + 8.0473228e-07
    p = p * t - 1.0441249e-05
    p = p * t + 7.3639421e-05
    p = p * t - 0.00027050293
    p = p * t - 1.8598843e-05
    p = p * t + 0.0069698878
    p = p * t - 0.052457333
    p = p * t - 0.45921531
    p = p * t - 1.1511049
    tail = tl.exp2(p * t - 1)
    return z * tl.where(z < 0, tail, 1 - tail)


@triton.jit
def gelu_backward(dh, z):
    """dh (Φ(z) + z φ(z)), which at -t is 1 minus its value at t, and there exp(-t²/2) p(t).

    p is fitted on 0 <= t <= 6 for the least largest error of the product (2e-8).
    """
    t = tl.abs(z)
    e = tl.exp2(t * t * -0.7213475204444817)  # log2(e) / 2
    t = tl.minimum(t, 8.0)  # where e is all that counts, and p must not overflow
    p = t * -3.1554299e-07 + 7.708778e-06
    p = p * t - 8.4770982e-05
    p = p * t + 0.00056365272
    p = p * t - 0.0025900903
    p = p * t + 0.0090038478
    p = p * t - 0.025471818
    p = p * t + 0.061923932
    p = p * t - 0.13280578
    p = p * t + 0.24997257
    p = p * t - 0.79788285
    p = p * t + 0.49999997
    tail = e * p
    return dh * tl.where(z < 0, tail, 1 - tail)


register_activation(
    "gelu",
    gelu_forward,
    gelu_backward,
    reference=lambda z: F.gelu(z),
    module=nn.GELU,
    matches=lambda module: module.approximate == "none",
)


@triton.jit
def gelu_tanh_gate(z):
    # (1 + tanh u) / 2 = sigmoid(2u), with u = sqrt(2 / pi) (z + 0.044715 z^3): no cancellation where tanh u is near -1.
    return sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))


@triton.jit
def gelu_tanh_forward(z):
    return z * gelu_tanh_gate(z)


@triton.jit
def gelu_tanh_backward(dh, z):
    gate = gelu_tanh_gate(z)
    slope = 1.5957691216057308 * (1 + 3 * 0.044715 * z * z)
    return dh * (gate + z * gate * (1 - gate) * slope)


register_activation(
    "gelu_tanh",
    gelu_tanh_forward,
    gelu_tanh_backward,
    reference=lambda z: F.gelu(z, approximate="tanh"),
    module=nn.GELU,
    matches=lambda module: module.approximate == "tanh",
)


@triton.jit
def quick_gelu_forward(z):
    return z / (1 + tl.exp(-1.702 * z))


@triton.jit
def quick_gelu_backward(dh, z):
    gate = sigmoid(1.702 * z)
    return dh * gate * (1 + 1.702 * z * (1 - gate))


register_activation(
    "quick_gelu", quick_gelu_forward, quick_gelu_backward, reference=lambda z: z * torch.sigmoid(1.702 * z)
)


@triton.jit
def silu_forward(z):
    return z / (1 + tl.exp(-z))


@triton.jit
def silu_backward(dh, z):
    gate = sigmoid(z)
    return dh * gate * (1 + z * (1 - gate))


register_activation("silu", silu_forward, silu_backward, reference=lambda z: F.silu(z), module=nn.SiLU)


@triton.jit
def mish_gate(z):
    """tanh(softplus(z)) = n / d, and 1 - gate = rest / d, from e = exp(-|z|) alone, so that nothing overflows."""
    e = tl.exp(-tl.abs(z))
    n = tl.where(z < 0, e * (e + 2), 1 + 2 * e)
    rest = tl.where(z < 0, 2.0, 2 * e * e)
    return n, rest, n + rest


@triton.jit
def mish_forward(z):
    n, _, d = mish_gate(z)
    return z * (n / d)


@triton.jit
def mish_backward(dh, z):
    n, rest, d = mish_gate(z)
    gate = n / d
    return dh * (gate + z * sigmoid(z) * (rest / d) * (1 + gate))


register_activation("mish", mish_forward, mish_backward, reference=lambda z: F.mish(z), module=nn.Mish)


@triton.jit
def sigmoid_backward(dh, h):
    return dh * h * (1 - h)


register_activation(
    "sigmoid",
    sigmoid,
    sigmoid_backward,
    saves="output",
    reference=lambda z: torch.sigmoid(z),
    reference_backward=lambda dh, h: dh * h * (1 - h),
    module=nn.Sigmoid,
)


@triton.jit
def softplus_forward(z, beta, threshold):
    scaled = z * beta
    smooth = (tl.where(scaled > 0, scaled, 0.0) + log1p_unit(tl.exp(-tl.abs(scaled)))) / beta
    return tl.where(scaled > threshold, z, smooth)


LINEAR_FROM = 17.0  # sigmoid is 1 in fp32 from here on: 1 - sigmoid(17) < 2^-24
SOFTPLUS_LINEAR = tl.constexpr(LINEAR_FROM)


@triton.jit
def softplus_backward(dh, saved, beta, threshold):
    if beta > 0 and threshold >= SOFTPLUS_LINEAR:
        slope = -expm1(-beta * saved)  # of the output: sigmoid(beta z) = 1 - exp(-beta h)
    else:
        slope = tl.where(saved * beta > threshold, 1.0, sigmoid(saved * beta))
    return dh * slope


def _softplus_keeps(beta: float, threshold: float) -> Kept:
    # Below that threshold the function jumps, and h alone does not tell on which side z was.
    return "output" if beta > 0 and threshold >= LINEAR_FROM else "preactivation"


register_activation(
    "softplus",
    softplus_forward,
    softplus_backward,
    saves=_softplus_keeps,
    reference=lambda z, beta, threshold: F.softplus(z, beta, threshold),
    reference_backward=lambda dh, h, beta, threshold: dh * -torch.expm1(-beta * h),
    parameters={"beta": 1.0, "threshold": 20.0},
    module=nn.Softplus,
    kinks=lambda beta, threshold: (threshold / beta,),
)


@triton.jit
def logsigmoid_forward(z):
    return tl.where(z < 0, z, 0.0) - log1p_unit(tl.exp(-tl.abs(z)))


@triton.jit
def logsigmoid_backward(dh, h):
    return dh * -expm1(h)  # sigmoid(-z) = 1 - exp(h)


register_activation(
    "logsigmoid",
    logsigmoid_forward,
    logsigmoid_backward,
    saves="output",
    reference=lambda z: F.logsigmoid(z),
    reference_backward=lambda dh, h: dh * -torch.expm1(h),
    module=nn.LogSigmoid,
)


@triton.jit
def tanh_backward(dh, h):
    return dh * (1 - h * h)


register_activation(
    "tanh",
    tanh,
    tanh_backward,
    saves="output",
    reference=lambda z: torch.tanh(z),
    reference_backward=lambda dh, h: dh * (1 - h * h),
    module=nn.Tanh,
)


@triton.jit
def tanhshrink_forward(z):
    return z - tanh(z)


@triton.jit
def tanhshrink_backward(dh, z):
    t = tanh(z)
    return dh * (t * t)


register_activation(
    "tanhshrink", tanhshrink_forward, tanhshrink_backward, reference=lambda z: F.tanhshrink(z), module=nn.Tanhshrink
)


@triton.jit
def softsign_forward(z):
    return z / (1 + tl.abs(z))


@triton.jit
def softsign_backward(dh, h):
    rest = 1 - tl.abs(h)
    return dh * (rest * rest)


register_activation(
    "softsign",
    softsign_forward,
    softsign_backward,
    saves="output",
    reference=lambda z: F.softsign(z),
    reference_backward=lambda dh, h: dh * (1 - h.abs()).square(),
    module=nn.Softsign,
)


@triton.jit
def softshrink_forward(z, lambd):
    return tl.where(z > lambd, z - lambd, tl.where(z < -lambd, z + lambd, z * 0.0))


@triton.jit
def softshrink_backward(dh, h, lambd):
    return tl.where(h == 0, 0.0, dh)


register_activation(
    "softshrink",
    softshrink_forward,
    softshrink_backward,
    saves="output",
    reference=lambda z, lambd: F.softshrink(z, lambd),
    reference_backward=lambda dh, h, lambd: dh.masked_fill(h == 0, 0),
    parameters={"lambd": 0.5},
    module=nn.Softshrink,
    kinks=lambda lambd: (-lambd, lambd),
    scales=True,
    piecewise=True,
)


@triton.jit
def hardshrink_forward(z, lambd):
    return tl.where((z >= -lambd) & (z <= lambd), 0.0, z)


@triton.jit
def hardshrink_backward(dh, h, lambd):
    return tl.where((h >= -lambd) & (h <= lambd), 0.0, dh)


register_activation(
    "hardshrink",
    hardshrink_forward,
    hardshrink_backward,
    saves="output",
    reference=lambda z, lambd: F.hardshrink(z, lambd),
    reference_backward=lambda dh, h, lambd: dh.masked_fill((h >= -lambd) & (h <= lambd), 0),
    parameters={"lambd": 0.5},
    module=nn.Hardshrink,
    kinks=lambda lambd: (-lambd, lambd),
    piecewise=True,
)


@triton.jit
def hardsigmoid_forward(z):
    return relu6_forward(z + 3) * (1 / 6)


@triton.jit
def hardsigmoid_backward(dh, h):
    return tl.where((h > 0) & (h < 1), dh * (1 / 6), 0.0)


register_activation(
    "hardsigmoid",
    hardsigmoid_forward,
    hardsigmoid_backward,
    saves="output",
    reference=lambda z: F.hardsigmoid(z),
    reference_backward=lambda dh, h: (dh / 6).masked_fill((h <= 0) | (h >= 1), 0),
    module=nn.Hardsigmoid,
    kinks=lambda: (-3.0, 3.0),
    piecewise=True,
)


@triton.jit
def hardswish_forward(z):
    return z * relu6_forward(z + 3) * (1 / 6)


@triton.jit
def hardswish_backward(dh, z):
    return tl.where(z <= -3, 0.0, tl.where(z < 3, dh * (z * (1 / 3) + 0.5), dh))


register_activation(
    "hardswish",
    hardswish_forward,
    hardswish_backward,
    reference=lambda z: F.hardswish(z),
    module=nn.Hardswish,
    kinks=lambda: (-3.0, 3.0),
    piecewise=True,
)


@triton.jit
def exp_forward(z):
    return tl.exp(z)


@triton.jit
def exp_backward(dh, h):
    return dh * h


register_activation(
    "exp",
    exp_forward,
    exp_backward,
    saves="output",
    reference=lambda z: torch.exp(z),
    reference_backward=lambda dh, h: dh * h,
)


@triton.jit
def sine_forward(z):
    return tl.sin(z)


@triton.jit
def sine_backward(dh, z):
    return dh * tl.cos(z)


register_activation("sine", sine_forward, sine_backward, reference=lambda z: torch.sin(z))


@triton.jit
def step_forward(z):
    return tl.where(z >= 0, 1.0, tl.where(z < 0, 0.0, z))  # neither: NaN stays NaN, so that a fault is seen


@triton.jit
def step_backward(dh, h):
    return tl.where(h == h, 0.0, dh)


register_activation(
    "step",
    step_forward,
    step_backward,
    saves="output",
    reference=lambda z: z.masked_fill(z >= 0, 1).masked_fill(z < 0, 0),
    reference_backward=lambda dh, h: dh.masked_fill(h == h, 0),
    kinks=lambda: (0.0,),
    piecewise=True,
)

BUILT_IN = frozenset(ACTIVATIONS)
