"""Checks that the code that a kernel replaces is still torch's own.

A kernel computes the same as torch's classes and functions. Users may replace those at any time: a method on a class
(`nn.Linear.forward`, `nn.Module.__call__`), a function in a module (`torch.nn.functional.linear`), or everything under
a TorchFunctionMode. Layers that would call a replacement run as modules, so that it takes effect.
"""

from __future__ import annotations

import functools
import operator
import os
import sys
from collections.abc import Iterable
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._device import DeviceContext

from .recognize import functions_called, is_registered_by_user, look_up
from .settings import constant_to_compilers, function_modes

# Torch's own classes, taken at import, in case somebody assigns another class to their names in torch.nn later.
Dropout, Identity, Linear, Sequential = nn.Dropout, nn.Identity, nn.Linear, nn.Sequential
# The names of torch's functions that Linear, transformers' Conv1D and Dropout look up when they are called.
LINEAR, ADDMM, DROPOUT = "torch.nn.functional.linear", "torch.addmm", "torch.nn.functional.dropout"

# The methods that a call of a module goes through before its forward, and the classes that define them.
METHODS: dict[str, type] = {
    "__call__": nn.Module,
    "_call_impl": nn.Module,
    "__getattr__": nn.Module,
    "__getattribute__": object,
}
PARAMETERS = ("weight", "bias")  # a class attribute with such a name hides the parameters of the instances
ALIASES = {"__call__": "_wrapped_call_impl"}  # nn.Module's function is defined under this name
# The libraries whose classes are compared with the files that define them. Other classes count as original when they
# are first seen.
LIBRARIES = ("torch", "mlp_fused", "timm", "transformers")
# Torch's own tracers. Their function modes and methods only record a call.
TRACERS = ("torch._dynamo.", "torch._export.", "torch.export.", "torch.fx.")

_read = operator.attrgetter(*METHODS, "forward")


def why_changed(kind: type, known: type) -> str | None:
    """The reason why instances of `kind` may not compute the same as the library's class `known`; None if they do.

    Methods that `kind` inherits are checked too.
    """
    code = (*_read(kind), torch.compiler.is_compiling())
    before, reason = _CHANGED.get(kind, (None, None))
    if code != before:
        reason = _why_changed(kind, known)
        _CHANGED[kind] = code, reason
    return reason


_CHANGED: dict[
    type, tuple[tuple[Any, ...] | None, str | None]
] = {}  # for each class, the last answer and the code that it is valid for
_FIRST: dict[tuple[type, str], Any] = {}  # the methods of other libraries' classes, as they were first seen


def _why_changed(kind: type, known: type) -> str | None:
    owners = {**METHODS, "forward": _owner(known, "forward")}
    if not (_is_from_library(owners["forward"]) or is_registered_by_user(known)):
        return f"{owners['forward'].__name__} has a forward of its own"
    for name, owner in owners.items():
        if (why := why_method_changed(kind, name)) is not None:
            return why
        if (own := _owner(kind, name)) is not owner:
            return f"{own.__name__} has a {name} of its own"
    return None


def why_method_changed(kind: type, name: str) -> str | None:
    """The reason why a method is not the one that the file of its class defines; None if it is."""
    owner, method = _owner(kind, name), getattr(kind, name)
    return None if _is_own(method, owner, name) else f"{owner.__name__}.{name} was replaced by {_place(method)}"


def why_hidden(kind: type) -> str | None:
    """The reason why a class does not compute with the parameters of its instances; None if it does."""
    for name in PARAMETERS:
        if hasattr(kind, name):
            return f"{_owner(kind, name).__name__} has a {name} of its own"
    return None


def why_replaced(functions: tuple[str, ...], activation: str = "") -> str | None:
    """The reason why a call of these functions would not run torch's code; None if it would.

    `functions` are names of functions. The functions that the activation named `activation` calls are checked too.
    """
    for name in (*functions, *functions_called(activation)):
        function = look_up(name)
        if function is not _OWN.get(name):
            if not _is_from_torch(function, name):
                return f"{name} was replaced by {_place(function)}"
            _OWN[name] = function
    return None


_OWN: dict[str, Any] = {}  # functions that were checked and are torch's own


def why_mode() -> str | None:
    """A sentence that names an active TorchFunctionMode, which may change torch's functions; None without one.

    Torch's device mode and its tracers do not count.
    """
    for kind in function_modes():
        if kind is not DeviceContext and not kind.__module__.startswith(TRACERS):
            return f"{kind.__name__}, a TorchFunctionMode, is active"
    return None


constant_to_compilers(why_changed)
constant_to_compilers(why_hidden)
constant_to_compilers(why_replaced)


def _owner(kind: type, name: str) -> type:
    """The class that defines a method: `kind` or one of its base classes."""
    return next(base for base in kind.__mro__ if name in vars(base))


def _is_own(method: Any, owner: type, name: str) -> bool:
    """True if a method is the one that the file of its class defines."""
    if owner is object or (torch.compiler.is_compiling() and _is_from_tracer(method)):
        return True
    if not _is_from_library(owner):
        return method is _FIRST.setdefault((owner, name), method)
    return _is_from_file(method, owner.__module__, f"{owner.__qualname__}.{ALIASES.get(name, name)}")


def _is_from_tracer(method: Any) -> bool:
    """True if a method belongs to one of torch's tracers. They replace methods of nn.Module while they trace a call."""
    path = _path(method).replace("/", ".")
    return any(f".{tracer}" in path for tracer in TRACERS)


def _is_from_library(kind: type) -> bool:
    """True if a class belongs to one of `LIBRARIES`, and is still in its module under its name."""
    module, name = kind.__module__, kind.__qualname__
    return module.partition(".")[0] in LIBRARIES and getattr(sys.modules.get(module), name, None) is kind


def _is_from_torch(function: Any, name: str) -> bool:
    """True if a function is the one that torch defines under this name."""
    module, _, own_name = name.rpartition(".")
    if isinstance(function, BuiltinFunctionType):  # its own name may have more underscores: log_sigmoid
        same = function.__name__.replace("_", "") == own_name.replace("_", "")
        return same and (function.__module__ or "").partition(".")[0] == "torch"
    return any(_is_from_file(function, module, name) for name in (own_name, f"_{own_name}"))


def _is_from_file(function: Any, module: str, qualname: str) -> bool:
    """True if a function is defined in a module's own file under that name; False for a wrapper around it."""
    if not isinstance(function, FunctionType) or (function.__module__, function.__qualname__) != (module, qualname):
        return False
    return _path(function).removesuffix("/__init__").endswith("/" + module.replace(".", "/"))


def _path(function: Any) -> str:
    """The file that defines a function, without its suffix; "" if it is unknown."""
    code = getattr(function, "__code__", None)
    return "/" + os.path.splitext(code.co_filename.replace(os.sep, "/"))[0] if code else ""


def _place(function: Any) -> str:
    """A function's name, with its file and line, for error messages."""
    code = getattr(function, "__code__", None)
    name = getattr(function, "__qualname__", type(function).__name__)
    return f"{code.co_name} ({code.co_filename}:{code.co_firstlineno})" if code else f"{function.__module__}.{name}"


class Absent:
    """The last base class of `_joint`: looking up a parameter's name gives None instead of an AttributeError."""

    weight = bias = None


@functools.lru_cache(maxsize=256)
def _joint(kinds: tuple[type, ...]) -> type:
    """A class derived from all of these. One look-up on it finds a method that was added to any of them.

    Its attributes `kind0`, `kind1` … are the classes themselves, whose forwards are read from there.
    """
    return type("Joint", (*kinds, nn.Module, Absent), {f"kind{index}": kind for index, kind in enumerate(kinds)})


class Code:
    """The methods and functions that calls of some classes run. `now` reads them, in 0.3 µs."""

    def __init__(self, kinds: Iterable[type], functions: Iterable[str]) -> None:
        kinds = sorted(set(kinds), key=lambda kind: (-len(kind.__mro__), kind.__qualname__))
        joined = [kind for kind in kinds if kind.__module__.startswith("torch.") and _is_from_library(kind)]
        self._joint = _joint(tuple(joined))
        forwards = (f"kind{index}.forward" for index in range(len(joined)))
        self._read_joint = operator.attrgetter(*METHODS, *PARAMETERS, *forwards)
        self._others = [kind for kind in kinds if kind not in joined]
        own_names: dict[str, list[str]] = {F.__name__: [], "torch": []}
        for name in dict.fromkeys(functions):
            module, _, own_name = name.rpartition(".")
            own_names[module].append(own_name)
        self._read_functional = operator.itemgetter(*(own_names[F.__name__] or ["linear"]))
        self._read_torch = operator.itemgetter(*(own_names["torch"] or ["addmm"]))

    def now(self) -> tuple[Any, ...]:
        """All these methods and functions as they are now, to compare with an earlier result."""
        return (
            self._read_joint(self._joint),
            self._read_functional(F.__dict__),
            self._read_torch(torch.__dict__),
            [*map(_read, self._others)] if self._others else None,
        )


# The methods and the function that a call of nn.Dropout runs, read at import; None if they were not torch's own then.
_DROPOUT = (
    (_read(Dropout), look_up(DROPOUT)) if not (why_changed(Dropout, Dropout) or why_replaced((DROPOUT,))) else None
)


def is_dropout_torchs() -> bool:
    """True if a call of nn.Dropout runs torch's own code, so that one with p = 0 may be skipped."""
    return (_read(Dropout), F.dropout) == _DROPOUT


constant_to_compilers(is_dropout_torchs)
