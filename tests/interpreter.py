"""Shortcuts through Triton's interpreter: kernels compute the same in less than half the time.

The interpreter spends nearly all of its time in Python: on dtypes and shapes, which are described again for every
operation, and on patches of Triton's language. Numpy's share is small.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import Any


def take_shortcuts() -> None:
    """Patch Triton's interpreter in this process, where it has the internals that the shortcuts need.

    With other versions of Triton, the results are the same and take longer.
    """
    try:
        from triton.language import core
        from triton.runtime import interpreter
    except ImportError:
        return
    for shortcut in (
        skip_checks_without_effect,
        patch_once_a_launch,
        list_builtins_once,
        cache_types,
        compare_first,
    ):
        with contextlib.suppress(AttributeError):
            shortcut(interpreter, core)


def skip_checks_without_effect(interpreter: Any, core: Any) -> None:
    """Skip the check for integer overflow.

    The interpreter computes the check always, but asserts it only with `debug`, which no test turns on.
    """
    options = interpreter.interpreter_builder.options
    object.__setattr__(options, "sanitize_overflow", options.debug)  # the record is frozen


def patch_once_a_launch(interpreter: Any, core: Any) -> None:
    """Patch Triton's language once for each module and launch.

    The interpreter does it for every function that a kernel calls. The patches stay until the launch ends.
    """
    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: set[str] = set()

    def launch_unpatched(executor, *arguments, **constants):
        patched.clear()
        try:
            return launch(executor, *arguments, **constants)
        finally:
            patched.clear()

    def patch_once(function):
        if function.__module__ in patched:
            return None
        patched.add(function.__module__)
        return patch(function)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = launch_unpatched, patch_once


def list_builtins_once(interpreter: Any, core: Any) -> None:
    """List the functions that have to be patched once for each module and class, not for every launch.

    The patches skip the wrapper that checks for a semantic argument, because the interpreter always passes one.
    """
    builtins: dict[Any, list[tuple[str, Any]]] = {}
    patch = interpreter._patch_attr

    def patch_builtins(package, *others):
        if package not in builtins:
            members = inspect.getmembers(package)
            builtins[package] = [(name, member) for name, member in members if core.is_builtin(member)]
        for name, member in builtins[package]:
            if getattr(package, name) is member:  # not patched yet
                patch(package, name, getattr(member, "__wrapped__", member), *others)

    interpreter._patch_builtin = patch_builtins


def cache_types(interpreter: Any, core: Any) -> None:
    """Describe every dtype and shape once, not for every tensor: half of the time of most kernels."""
    interpreter._get_np_dtype = cache_numpy_dtypes(interpreter._get_np_dtype)
    core.block_type.__init__ = cache_blocks(core.block_type.__init__, core.constexpr)
    core.tensor.__init__ = cache_sizes(core.tensor.__init__)


def compare_first(interpreter: Any, core: Any) -> None:
    """Compare shapes and identities first: operands of one shape are not broadcast, and a dtype equals itself."""
    semantic = type(interpreter.interpreter_semantic)
    semantic.broadcast_impl_value = broadcast_unequal_shapes(semantic.broadcast_impl_value)
    core.dtype.__eq__ = compare_identities(core.dtype.__eq__)


def broadcast_unequal_shapes(broadcast):
    @functools.wraps(broadcast)
    def compared(semantic, left, right):
        if left.type.is_block() and right.type.is_block() and left.type.shape.values == right.type.shape.values:
            return left, right
        return broadcast(semantic, left, right)

    return compared


def compare_identities(equals):
    @functools.wraps(equals)
    def compared(dtype, other):
        return dtype is other or equals(dtype, other)

    return compared


def cache_numpy_dtypes(numpy_dtype):
    cache: dict[str, Any] = {}

    @functools.wraps(numpy_dtype)
    def cached(dtype):
        name = dtype.scalar.name
        if name not in cache:
            cache[name] = numpy_dtype(dtype)
        return cache[name]

    return cached


def cache_blocks(init, constexpr):
    cache: dict[tuple[Any, ...], dict[str, Any]] = {}

    @functools.wraps(init)
    def cached(block, element_ty, shape):
        key = (element_ty.name, *(size.value if isinstance(size, constexpr) else size for size in shape))
        if key in cache:
            vars(block).update(cache[key])
        else:
            init(block, element_ty, shape)
            cache[key] = dict(vars(block))

    return cached


def cache_sizes(init):
    cache: dict[str, dict[str, Any]] = {}

    @functools.wraps(init)
    def cached(tensor, handle, type):
        if type.name in cache:
            tensor.handle, tensor.type, tensor.dtype = handle, type, type.scalar
            vars(tensor).update(cache[type.name])
        else:
            init(tensor, handle, type)
            cache[type.name] = {"numel": tensor.numel, "shape": tensor.shape}

    return cached
