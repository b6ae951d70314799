"""Digests of kernels' sources, so that a reading can name the version of the kernel that was measured.

A digest covers functions, and all functions and constants of the package that they use. It is computed from the syntax
trees of the files. So it is the same on every machine, Python and Triton, and comments, docstrings, formatting and the
file of a function do not change it. Names imported from language.py are Triton's and are not followed; neither are
classes.

Branches that are not compiled do not count: those for Triton's interpreter, and those that a known constant rules out,
such as `PRECISION == "bf16x6"`. Where a known constant fulfils a condition, such as `PRECISION != "redo" or f(x)`, the
body alone counts. So a new way to multiply fp32 does not change the digests of 16-bit products. A known constant may
also be a frozenset of its possible values, which rules out all others.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["Source", "digest", "find_source", "kernels_in", "source"]

Source = tuple[Path, str]  # a file, and the name of a function at its top level

DIGITS = 16
FOLDER = Path(__file__).resolve().parent


def source(module: str, name: str) -> Source:
    """The file and name of a function of this package."""
    return FOLDER / f"{module}.py", name


def find_source(function: Any) -> Source | None:
    """The file and name of a function, which may be a `@triton.jit` one; None for one that has no file."""
    function = getattr(function, "fn", function)
    try:
        return Path(inspect.getfile(function)).resolve(), function.__name__
    except (TypeError, OSError):
        return None


def kernels_in(modules: str) -> list[Source]:
    """All kernels in the modules of this package whose names match the pattern `modules`."""
    files = sorted(FOLDER.glob(f"{modules}.py"))
    return [(file, name) for file in files for name in _names(file) if name.endswith("_kernel")]


def digest(sources: Iterable[Source | None], known: Mapping[str, object] | None = None) -> str:
    """The digest of functions and of all that they call.

    `known` has the values of constants that rule branches out. A frozenset has every value that a constant may have.
    """
    constants = {"INTERPRETED": False, **(known or {})}
    return _digest(tuple(source for source in sources if source), tuple(sorted(constants.items())))


Constants = tuple[tuple[str, object], ...]


@functools.lru_cache(maxsize=1024)
def _digest(sources: tuple[Source, ...], constants: Constants) -> str:
    texts: dict[Source, str] = {}
    for source in sources:
        _collect(source, constants, texts)
    return hashlib.sha256("\n".join(sorted(texts.values())).encode()).hexdigest()[:DIGITS]


def _collect(source: Source, constants: Constants, texts: dict[Source, str]) -> None:
    """Add the text of a definition, and of every definition that it uses, to `texts`."""
    file, name = source
    definition = _names(file).get(name)
    if isinstance(definition, tuple):
        _collect(definition, constants, texts)
    elif definition is not None and source not in texts:
        texts[source], names = _read(source, constants)
        for used in names:
            _collect((file, used), constants, texts)


@functools.lru_cache(maxsize=4096)
def _read(source: Source, constants: Constants) -> tuple[str, tuple[str, ...]]:
    """The text of a definition, and the names that it reads, without its own arguments and variables."""
    names: dict[str, bool] = {}
    file, name = source
    text = _text(_names(file)[name], dict(constants), names)
    return text, tuple(sorted(used for used, is_own in names.items() if not is_own))


@functools.lru_cache(maxsize=256)
def _names(path: Path) -> dict[str, ast.stmt | Source]:
    """The functions and constants at the top level of a file, by name, and the source of those that it imports."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):  # for example a function typed into an interactive session
        return {}
    names: dict[str, ast.stmt | Source] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            names[node.name] = node
        elif isinstance(node, ast.Assign):
            names |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names[node.target.id] = node
        elif isinstance(node, ast.ImportFrom) and node.level == 1 and node.module not in (None, "language"):
            file = path.with_name(f"{node.module}.py")
            names |= {alias.asname or alias.name: (file, alias.name) for alias in node.names}
    return names


# Fields of a syntax tree that do not affect what runs, or that only some versions of Python have.
IGNORED = ("ctx", "kind", "type_comment", "type_params")


def _text(node: Any, constants: Mapping[str, object], names: dict[str, bool]) -> str:
    """A syntax tree as text, the same in every version of Python.

    Adds its names to `names`: True for its own arguments and variables, False for others.
    """
    if isinstance(node, list):
        return "".join(_text(item, constants, names) for item in node if not _is_docstring(item))
    if isinstance(node, ast.If):
        decided = _decide(node.test, constants)
        if decided is not None:
            return _text(node.body if decided else node.orelse, constants, names)
    if isinstance(node, ast.AST):
        if isinstance(node, ast.Name):
            names[node.id] = names.get(node.id, False) or isinstance(node.ctx, ast.Store)
        elif isinstance(node, ast.arg):
            names[node.arg] = True
        fields = ((name, getattr(node, name, None)) for name in sorted(node._fields) if name not in IGNORED)
        texts = [f"{name}={_text(value, constants, names)}" for name, value in fields if value not in (None, [])]
        return f"{type(node).__name__}({','.join(texts)})"
    return repr(node)


def _is_docstring(node: Any) -> bool:
    """True if a statement is only a string, which does nothing."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _decide(test: ast.expr, constants: Mapping[str, object]) -> bool | None:
    """The value of a condition, if the known constants decide it; None if they do not."""
    match test:
        case ast.Name(id=name) if name in constants:
            return bool(constants[name])
        case ast.Compare(left=ast.Name(id=name), ops=[ast.Eq()], comparators=[ast.Constant(value=value)]):
            known = constants.get(name)
            if isinstance(known, frozenset):
                return None if value in known else False
            return known == value if name in constants else None
        case ast.Compare(ops=[ast.NotEq()]):
            equal = _decide(ast.Compare(test.left, [ast.Eq()], test.comparators), constants)
            return None if equal is None else not equal
        case ast.BoolOp(op=ast.And(), values=parts):
            return False if any(_decide(part, constants) is False for part in parts) else None
        case ast.BoolOp(op=ast.Or(), values=parts):
            decided = {_decide(part, constants) for part in parts}
            return True if True in decided else None if None in decided else False
        case _:
            return None
