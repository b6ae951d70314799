"""Command-line flags, made from the fields of a command's Config. A new field gives a new flag."""

from __future__ import annotations

import argparse
import dataclasses
import os
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from .errors import UserError, listed, real_number, truth, whole_number

__all__ = ["DEVICE_HELP", "add_flags", "check_fields", "flag", "option", "shown"]


# The help text of every --device.
DEVICE_HELP = "cpu, cuda, cuda:1 ..., or auto for a GPU if there is one (default: {default})"


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    metavar: str | None = None,
    group: str = "",
    may_be_empty: bool = False,
) -> Any:
    """Return a dataclass field for a Config, with the help text of its flag.

    Args:
        default: the value without the flag. Without a default, the flag is required.
        help: the help text; "{default}" is replaced by the default as a user would type it.
        metavar: the placeholder for the value, in the help.
        group: the heading under which the flag is listed.
        may_be_empty: True if the flag of a tuple may be given without values.
    """
    metadata = {"help": help, "metavar": metavar, "group": group, "may_be_empty": may_be_empty}
    return dataclasses.field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """Return the flag of a field: "batch_size" -> "--batch-size"."""
    return "--" + name.replace("_", "-")


def shown(value: object) -> str:
    """Return a value as a user would type it."""
    return " ".join(map(str, value)) or "empty" if isinstance(value, list | tuple) else str(value)


def check_fields(config: Any) -> None:
    """Check the values of a Config by their types, and convert them to Python's own types.

    Settings may come from NumPy or torch, and files may be paths, but a checkpoint may only have types that
    `torch.load(weights_only=True)` reads.

    Raises:
        UserError: a value has another type, or is not among the field's choices.
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = _checked(getattr(config, field.name), hints[field.name], flag(field.name))
        object.__setattr__(config, field.name, value)


def _checked(value: Any, hint: Any, name: str) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        return None if value is None else _checked(value, _without_none(hint), name)
    if get_origin(hint) is tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__") or getattr(value, "ndim", 1) == 0:
            raise UserError(f"{name} is {value!r}; it needs to be a sequence")
        return tuple(_checked(element, get_args(hint)[0], name) for element in value)
    if get_origin(hint) is Literal:
        for choice in get_args(hint):
            if value == choice:
                return choice
        raise UserError(f"{name} is {value}; it needs to be one of {listed(get_args(hint))}")
    if hint in (int, float):
        number = whole_number(value) if hint is int else real_number(value)
        if number is None:
            raise UserError(f"{name} is {value!r}; it needs to be a {'whole ' * (hint is int)}number")
        if hint is int and number >= 2**63:  # torch's sizes have 64 bits
            raise UserError(f"{name} is {number}; it needs to be at most 2^63 - 1")
        return number
    if hint is bool:
        answer = truth(value)
        if answer is None:
            raise UserError(f"{name} is {value!r}; it needs to be True or False")
        return answer
    return _text(value, name) if hint is str else value


def _text(value: Any, name: str) -> str:
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str | torch.device):
        raise UserError(f"{name} is {value!r}; it needs to be text")
    return str(path)


def _without_none(hint: Any) -> Any:
    (kind,) = (kind for kind in get_args(hint) if kind is not types.NoneType)
    return kind


def add_flags(parser: argparse.ArgumentParser, config: Any) -> None:
    """Add a flag for each field of the dataclass `config`: its name, type, default, choices and help."""
    hints = get_type_hints(config)
    groups: dict[str, Any] = {"": parser}
    for field in dataclasses.fields(config):
        heading = field.metadata["group"]
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        required = field.default is dataclasses.MISSING
        default = None if required else field.default
        arguments = _arguments(hints[field.name])
        if field.metadata["may_be_empty"]:
            arguments["nargs"] = "*"
        if field.metadata["metavar"]:
            arguments["metavar"] = field.metadata["metavar"]
        groups[heading].add_argument(
            flag(field.name),
            required=required,
            default=None if arguments.get("action") == "append" else default,
            help=field.metadata["help"].replace("{default}", shown(default)),
            **arguments,
        )


def _arguments(hint: Any) -> dict[str, Any]:
    """Return the arguments of `add_argument` for a value of the type `hint`."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = _without_none(hint)
    if hint is bool:
        return {"action": "store_true"}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if get_origin(hint) is tuple:
        inner = _arguments(get_args(hint)[0])
        if "nargs" in inner:  # a tuple of tuples: the flag may be given several times
            return {**inner, "action": "append"}
        return {**inner, "nargs": "+"}
    kinds: dict[Any, Callable[[str], Any]] = {int: int, float: float}
    return {"type": kinds[hint]} if hint in kinds else {}
