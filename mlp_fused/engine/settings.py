"""Switches of the environment and of torch, and most private names of torch that the package uses."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.jit._trace import is_tracing as is_tracing
from torch.nn.modules.module import _has_any_global_hook

try:
    from torch._C._dynamo.guards import TensorGuards as _TensorGuards

    TensorGuards: Any = _TensorGuards
except ImportError:  # the name is private; without it, every call decides its path again
    TensorGuards = None


Backend = Literal["auto", "triton", "reference"]


def check_backend(backend: object, argument: str = "backend") -> Backend:
    """`backend`, if it is a valid choice.

    Raises:
        ValueError: it is not "auto", "triton" or "reference".
    """
    choice: Backend = check_choice(get_args(Backend), backend, argument)
    return choice


def check_recompute(recompute: object) -> bool | None:
    """`recompute`, if it is True, False or None.

    Raises:
        TypeError: it is something else.
    """
    if recompute is None or isinstance(recompute, bool):
        return recompute
    raise TypeError(f"recompute is {recompute!r}; it needs to be True, False or None")


Float32 = Literal["auto", "ieee"]


def check_choice(choices: tuple[str, ...], value: object, argument: str) -> Any:
    """The choice that `value` is equal to. Raises ValueError if it is none of them."""
    for choice in choices:
        if value == choice:
            return choice
    raise ValueError(f"{argument} is {value!r}; it needs to be one of: {', '.join(choices)}")


# True: synchronise and check after every kernel. All variables are read once, to save time in every call.
DEBUG = os.environ.get("MLP_FUSED_DEBUG", "0") == "1"
# The meaning of "auto" in this process.
DEFAULT_BACKEND: Backend = check_backend(os.environ.get("MLP_FUSED_BACKEND", "auto"), "MLP_FUSED_BACKEND")
# The way in which kernels multiply fp32. "ieee" never splits operands into fp16 parts or planes.
FLOAT32: Float32 = check_choice(get_args(Float32), os.environ.get("MLP_FUSED_FP32", "auto"), "MLP_FUSED_FP32")


def constant_to_compilers(function: Any) -> None:
    """Do what `torch.compiler.assume_constant_result` does, without importing the compiler."""
    function._dynamo_marked_constant = True


def compute_dtype(dtype: torch.dtype, kind: str) -> torch.dtype:
    """The dtype in which products of `dtype` are computed on a kind of device: autocast's dtype, if it is on."""
    known = kind in ("cuda", "cpu") or torch.amp.is_autocast_available(kind)
    if known and torch.is_autocast_enabled(kind) and dtype.is_floating_point and dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return dtype


def float32_precision() -> str:
    """The precision of fp32 products, "tf32" or "ieee", from torch's own setting, whichever switch set it."""
    return "tf32" if torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32" else "ieee"


constant_to_compilers(float32_precision)  # compilers recompile when the setting changes


def is_exporting_to_onnx() -> bool:
    """True within `torch.onnx.export`, which translates torch's own operators."""
    return torch.onnx.is_in_onnx_export()


constant_to_compilers(is_exporting_to_onnx)


# Private names of torch.

has_global_hooks: Callable[[], bool] = _has_any_global_hook
linear: Any = torch._C._nn.linear  # takes `out`; a third faster than torch.addmm of a weight transposed in Python
addmm_activation = torch._addmm_activation  # a(b + x Wᵀ) with relu or gelu in the library's own epilogue
profiler_enabled = torch._C._autograd._profiler_enabled
is_transformed = torch._C._are_functorch_transforms_active  # True under torch.func's transforms
is_zero_tensor = Tensor._is_zerotensor  # True for zeros without memory, which torch uses for some gradients
count_function_modes = torch._C._len_torch_function_stack  # the number of active TorchFunctionModes


def is_intercepted() -> bool:
    """True if a compiler or a dispatch mode intercepts the call, which then goes through registered operators."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def forward_mode_level() -> int:
    """The level of forward-mode differentiation; -1 where it is not active."""
    level: int = forward_ad._current_level
    return level


def storage_id(tensor: Tensor) -> int:
    """A number that identifies a tensor's storage."""
    address: int = tensor.untyped_storage()._cdata
    return address


_functorch = torch._C._functorch


def is_batched(tensor: Tensor) -> bool:
    """True if a tensor is batched by vmap."""
    return _functorch.is_batchedtensor(tensor) or _functorch.is_legacy_batchedtensor(tensor)


def function_modes() -> list[type]:
    """The classes of the active TorchFunctionModes."""
    return [type(torch._C._get_function_stack_at(index)) for index in range(torch._C._len_torch_function_stack())]


def call_settings(kind: str, backend: Backend, recompute: bool | None) -> tuple[object, ...]:
    """All settings on which the choice of a path depends, to compare. (`Decision` compares the tensors.)"""
    return (
        kind,
        backend,
        recompute,
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        torch.is_grad_enabled(),
        torch._C._get_fp32_precision_getter("cuda", "matmul"),
        torch._C._are_functorch_transforms_active(),
        forward_ad._current_level,
        torch._C._get_tracing_state(),
        torch._C._len_torch_dispatch_stack(),
    )


def is_loaded_instance(thing: object, module: str, name: str) -> bool:
    """True if `thing` is an instance of a class that is slow to import; False while its module is not imported."""
    imported = sys.modules.get(module)
    return imported is not None and isinstance(thing, getattr(imported, name, ()))


def policy_dtype(network: nn.Module) -> torch.dtype | None:
    """The dtype to which fully_shard casts a network's parameters in a call; None if it does not cast them."""
    if not is_loaded_instance(network, "torch.distributed.fsdp", "FSDPModule"):
        return None
    sharded: Any = network
    dtype: torch.dtype | None = sharded._get_fsdp_state()._mp_policy.param_dtype
    return dtype


def end_allocation(index: int, pool: Any, allocator: Any = torch._C) -> None:
    """Tell the device's allocator that a failed capture has ended, and release the capture's memory pool.

    torch's `CUDAGraph.capture_end` raises an error before it does this. On an H100 with torch 2.11.0, the allocator
    then acted for the rest of the process as if the capture went on: memory that several streams had used was never
    freed, and `torch.cuda.empty_cache()` did nothing. Both functions are private, and may be missing in another torch.

    Args:
        index: the index of the device.
        pool: the memory pool of the capture.
        allocator: the module that has the private functions.
    """
    # A RuntimeError means that the allocator knows of the end already. Then the graph releases its pool itself.
    with contextlib.suppress(AttributeError, TypeError, RuntimeError):
        allocator._cuda_endAllocateToPool(index, pool)
        allocator._cuda_releasePool(index, pool)


HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)  # attributes of every nn.Module
STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def has_hooks(module: Any) -> bool:
    return isinstance(module, nn.Module) and are_hooked([module.__dict__])


def are_hooked(modules: Sequence[dict[str, Any]]) -> bool:
    """True if the `__dict__` of any module has a hook, or a patched forward."""
    for attributes in modules:  # one call for all: a call for each module would double the time
        if (  # HOOKS, without a loop
            attributes["_forward_hooks"]
            or attributes["_forward_pre_hooks"]
            or attributes["_backward_hooks"]
            or attributes["_backward_pre_hooks"]
            or "forward" in attributes
        ):
            return True
    return False
