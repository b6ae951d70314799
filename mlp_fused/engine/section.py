"""Sections: the layers of one autograd.Function, with the schedules that were written for them.

A section is a range of a wide network's layers, or the whole of a narrow network.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import devices
from ..kernels.activation import Activation
from ..kernels.activations import IDENTITY
from ..kernels.devices import Device
from ..kernels.dropout import Dropout
from .schedule import Schedule, read_pointers

__all__ = ["Section", "parameter_names"]

MOST_CACHED = 1024  # the most schedules of one section; then its cache is cleared


def parameter_names(first: int, end: int) -> tuple[str, ...]:
    """The names of the weights and then of the biases of the layers first <= i < end."""
    return tuple(f"{kind}[{index}]" for kind in ("weight", "bias") for index in range(first, end))


class Saved(NamedTuple):
    """The tensors that a forward saves and the parameters that its backward reads, for some `needs`.

    Attributes:
        names: the names of the saved tensors, besides parameters.
        read: the indices of the parameters whose values the backward reads.
        given: the names of the tensors that the backward's schedule takes.
    """

    names: tuple[str, ...]
    read: Sequence[int]
    given: tuple[str, ...]


class Section(abc.ABC):
    """The layers of one autograd.Function.

    `needs` is a tuple with True for the input, each weight and each bias whose gradient is needed, in this order. It is
    None for a forward that saves nothing.

    Attributes:
        dtype: the dtype of the products.
        activations, dropouts: one for each layer. `dropouts` may be empty if no layer has Dropout.
        widths: the widths from the input to the output.
        below, dropout_below: the activation and the Dropout of the layer below.
        is_last: True if the output is the network's output.
        takes_unread: True if a backward's schedule takes all parameters, also those of which it uses only the shapes.
        parameters: the names of the weights and then of the biases.
        strides: the strides of these parameters.
        cache: the schedules. `_run` makes their keys.
        known: the `Saved` for each `needs`, cached.
    """

    dtype: torch.dtype
    activations: Sequence[Activation]
    dropouts: Sequence[Dropout | None]
    widths: Sequence[int]
    below: Activation = IDENTITY
    dropout_below: Dropout | None = None
    is_last: bool = True
    takes_unread: bool = True
    parameters: tuple[str, ...]
    strides: list[tuple[int, ...]]
    cache: dict[tuple[Any, ...], Schedule]
    known: dict[tuple[bool, ...], Saved]

    @abc.abstractmethod
    def saved_shapes(self, rows: int, needs: Sequence[bool]) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that a forward saves besides parameters, by name. "x" is the input."""

    @abc.abstractmethod
    def parameters_read(self, needs: Sequence[bool]) -> Sequence[int]:
        """The indices of the parameters whose values a backward reads."""

    @abc.abstractmethod
    def write_forward(
        self, given: Mapping[str, Tensor | None], rows: int, needs: tuple[bool, ...] | None, device: Device
    ) -> Schedule:
        """Write the forward. It returns y; z if it is the edge to the next section, else None; and the saved tensors.

        Args:
            given: "h", the input; "x", the edge from below; "seed"; and the parameters. None for a missing tensor.
        """

    @abc.abstractmethod
    def write_backward(
        self, given: Mapping[str, Tensor | None], rows: int, needs: tuple[bool, ...], device: Device
    ) -> Schedule:
        """Write the backward. It returns the gradients of x, the weights and the biases; None if one is not needed.

        Args:
            given: "dy", the gradient of y or of the edge to the next section; the saved tensors; and the parameters.
                Parameters that are not read may be missing.
        """

    def saved(self, needs: tuple[bool, ...]) -> Saved:
        """The `Saved` for these needs, from `known` if it is there."""
        saved = self.known.get(needs)
        if saved is None:
            names, read = tuple(self.saved_shapes(1, needs)), self.parameters_read(needs)
            taken = range(len(self.parameters)) if self.takes_unread else read
            given = ("dy", *names, *(self.parameters[index] for index in taken))
            saved = self.known[needs] = Saved(names, read, given)
        return saved

    def forward(self, tensors: tuple[Any, ...], needs: tuple[bool, ...] | None) -> list[Any]:
        """[y, z, saved tensors …] for (h, x, seed, parameters …): see `write_forward`."""
        return self._run(self.write_forward, ("h", "x", "seed", *self.parameters), tensors, needs)

    def backward(
        self, dy: Tensor, saved: Sequence[Tensor], parameters: Sequence[Tensor | None], needs: tuple[bool, ...]
    ) -> list[Any]:
        """[dx, dW …, db …] for the saved tensors, in their order, and all parameters: see `write_backward`."""
        known = self.saved(needs)
        if not self.takes_unread:
            parameters = [parameters[index] for index in known.read]
        return self._run(self.write_backward, known.given, (dy, *saved, *parameters), needs)

    def _run(
        self,
        write: Callable[..., Schedule],
        names: tuple[str, ...],
        tensors: tuple[Any, ...],
        needs: tuple[bool, ...] | None,
    ) -> list[Any]:
        """Run the cached schedule for these tensors. If there is none, write it first.

        The key of a schedule has the pass (forward or backward), `needs`, the alignment of the tensors, the first
        tensor's shape and device, and the strides and dtypes of the first two tensors. The section fixes the strides
        and dtypes of the others.
        """
        pointers, aligned = read_pointers(tensors)
        first, second = tensors[0], tensors[:2][-1]
        stride, dtype = first.stride(), first.dtype
        key = (names[0], needs, aligned, first.shape, stride, dtype, first.get_device(), second.stride(), second.dtype)
        schedule = self.cache.get(key)
        if schedule is None:
            if len(self.cache) >= MOST_CACHED:
                self.cache.clear()
            given = dict(zip(names, tensors, strict=True))
            schedule = self.cache[key] = write(given, first.shape[0], needs, devices.device_record(first))
        return schedule.run(tensors, pointers)
