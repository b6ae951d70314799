"""Nested batches: apply a function to every tensor in them."""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections import UserString
from collections.abc import Callable, Iterable, Mapping, MutableMapping, MutableSequence, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

__all__ = ["map_leaves"]


def map_leaves(batch: Any, function: Callable[[Any], Any]) -> Any:
    """The batch with `function` applied to every tensor, and to every object that has a method `to`.

    Containers keep their types. A container in which nothing changes is returned itself. No container is changed in
    place.
    """
    if isinstance(batch, Tensor):
        return _map_sparse(batch, function)
    if isinstance(batch, str | UserString | bytes | bytearray | memoryview | range | type):
        return batch
    if isinstance(batch, PackedSequence):  # batch_sizes stay on the host
        return PackedSequence(
            function(batch.data),
            batch.batch_sizes,
            None if batch.sorted_indices is None else function(batch.sorted_indices),
            None if batch.unsorted_indices is None else function(batch.unsorted_indices),
        )
    moves_itself = callable(getattr(batch, "to", None))
    if moves_itself and callable(getattr(batch, "pin_memory", None)):
        return function(batch)
    if isinstance(batch, Mapping):
        values = dict(batch.items())
        mapped = {key: map_leaves(value, function) for key, value in values.items()}
        return batch if all(map(operator.is_, mapped.values(), values.values())) else _like(batch, mapped)
    if isinstance(batch, Sequence):
        before = list(batch)  # read once: array.array creates its items in every loop
        items = [map_leaves(item, function) for item in before]
        return batch if all(map(operator.is_, items, before)) else _sequence_like(batch, items)
    if moves_itself:
        return function(batch)
    if dataclasses.is_dataclass(batch):
        names = [item.name for item in dataclasses.fields(batch) if hasattr(batch, item.name)]
        values = {name: map_leaves(getattr(batch, name), function) for name in names}
        if all(value is getattr(batch, name) for name, value in values.items()):
            return batch
        clone = copy.copy(batch)
        for name, value in values.items():
            object.__setattr__(clone, name, value)  # frozen ones too, and without __post_init__
        return clone
    return batch


def _map_sparse(tensor: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `function` to a tensor; for a sparse tensor on the host, to its indices and values."""
    if tensor.layout is torch.strided or not is_on_the_host(tensor):
        return function(tensor)
    if tensor.layout is torch.sparse_coo:
        indices, values = function(tensor._indices()), function(tensor._values())
        return torch.sparse_coo_tensor(
            indices, values, tensor.shape, is_coalesced=tensor.is_coalesced(), check_invariants=False
        )
    parts = {
        torch.sparse_csr: (Tensor.crow_indices, Tensor.col_indices),
        torch.sparse_bsr: (Tensor.crow_indices, Tensor.col_indices),
        torch.sparse_csc: (Tensor.ccol_indices, Tensor.row_indices),
        torch.sparse_bsc: (Tensor.ccol_indices, Tensor.row_indices),
    }.get(tensor.layout)
    if parts is None:
        return function(tensor)
    outer, inner = (function(part(tensor)) for part in parts)
    return torch.sparse_compressed_tensor(
        outer, inner, function(tensor.values()), tensor.shape, layout=tensor.layout, check_invariants=False
    )


def _like(batch: Mapping[Any, Any], mapped: dict[Any, Any]) -> Any:
    """`mapped` as a mapping of the batch's type; a dict if that cannot be created.

    A mutable mapping keeps its other attributes. Others have those that their constructor gives.
    """
    if type(batch) is dict:
        return mapped
    try:
        if isinstance(batch, MutableMapping):
            before = dict(batch)
            clone = copy.copy(batch)
            clone.update(mapped)
            if all(batch[key] is value for key, value in before.items()):
                return clone
            batch.update(before)  # the copy shares its items with the batch, so both have changed
        return type(batch)(mapped)  # type: ignore[call-arg]
    except (TypeError, ValueError):
        return mapped


def _sequence_like(batch: Sequence[Any], items: list[Any]) -> Any:
    """`items` as a sequence of the batch's type; a list if that cannot be created.

    A tuple or a mutable sequence keeps its other attributes. Others have those that their constructor gives.
    """
    if type(batch) is list:
        return items
    try:
        if isinstance(batch, tuple):
            # The constructor of a namedtuple may take other arguments than its fields.
            new: Any = getattr(batch, "_make", type(batch))(items)
            if hasattr(batch, "__dict__"):
                vars(new).update(vars(batch))
            return new
        if isinstance(batch, MutableSequence):
            before = list(batch)
            clone = copy.copy(batch)
            _assign(clone, items)
            if all(now is then for now, then in zip(batch, before)):
                return clone
            _assign(batch, before)  # the copy shares its items with the batch, so both have changed
        return type(batch)(items)  # type: ignore[call-arg]
    except (TypeError, ValueError):
        return items


def _assign(sequence: MutableSequence[Any], items: Iterable[Any]) -> None:
    for index, item in enumerate(items):
        sequence[index] = item


def is_on_the_host(tensor: Tensor) -> bool:
    """True if a tensor is a plain torch tensor in the host's memory, without gradients, quantisation or lazy views."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and not (tensor.requires_grad or tensor.is_nested or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )
