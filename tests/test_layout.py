"""The layout of the project: the direction of imports, the length of files, and the content of sdist and wheel."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from readme import READMES, ROOT, links, readme_text

# From the bottom to the top: a module imports from its own area and from those before it.
AREAS: dict[str, tuple[str, ...]] = {
    "kernels": ("mlp_fused.kernels",),
    "foundation": tuple(
        f"mlp_fused.{name}"
        for name in ("agreement", "dtypes", "errors", "files", "flags", "grid", "leaves", "progress", "reference")
    ),
    "engine": ("mlp_fused.engine",),
    "functions": ("mlp_fused.functional", "mlp_fused.explain", "mlp_fused.memory"),
    "modules": ("mlp_fused.module",),
    "tools": tuple(
        f"mlp_fused.{name}"
        for name in (
            "capture", "checkpoint", "compiling", "convert", "environment", "plots", "prefetch", "processes",
            "scaling", "timing",
        )
    ),
    "face": ("mlp_fused",),
    "commands": ("mlp_fused.train", "mlp_fused.transfer", "mlp_fused.tune"),
    "command line": ("mlp_fused.__main__",),
    "bench": ("bench",),
}  # fmt: skip
ENGINE = (
    "settings", "recognize", "originals", "table_files", "row_kernels", "tables", "torch_products", "schedule",
    "layer_steps", "section", "layer_path", "network_path", "autograd", "paths", "calls", "ops", "runs",
)  # fmt: skip
LONGEST = 600
LONGER = {"kernels/activations.py": "the table of activations, each with its two kernels and its twin"}


def tracked(*patterns: str) -> list[str]:
    """The files that git tracks, by their paths in the project."""
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def files() -> list[Path]:
    """The project's Python files."""
    return [ROOT / name for name in tracked("*.py")]


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts = ["mlp_fused", *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def modules() -> dict[str, Path]:
    paths = [path for path in files() if path.relative_to(ROOT).parts[0] in ("kernels", "mlp_fused", "bench")]
    return {module_name(path): path for path in paths}


def imported(name: str, path: Path) -> Iterator[str]:
    """The modules of ours that a file imports: within functions and for type checkers too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules())
        if isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                if f"{source}.{alias.name}" in modules():
                    yield f"{source}.{alias.name}"
                elif source in modules() and alias.name != "__version__":
                    yield source


@functools.cache
def graph() -> dict[str, set[str]]:
    return {name: set(imported(name, path)) - {name} for name, path in modules().items()}


def test_there_are_no_circular_imports() -> None:
    remaining = {name: set(targets) for name, targets in graph().items()}
    while ready := [name for name, targets in remaining.items() if not targets & remaining.keys()]:
        for name in ready:
            del remaining[name]
    assert remaining == {}


def area(name: str) -> int:
    for index, prefixes in enumerate(AREAS.values()):
        if any(name == prefix or (prefix != "mlp_fused" and name.startswith(prefix + ".")) for prefix in prefixes):
            return index
    raise AssertionError(f"{name} is in no area")


def test_imports_point_one_way() -> None:
    upward = [
        f"{name} -> {target}" for name, targets in graph().items() for target in targets if area(target) > area(name)
    ]
    assert upward == []


def test_the_engine_points_one_way() -> None:
    rank = {f"mlp_fused.engine.{name}": index for index, name in enumerate(ENGINE)}
    assert rank.keys() == {name for name in modules() if name.startswith("mlp_fused.engine.")}
    upward = [f"{name} -> {target}" for name in rank for target in graph()[name] if rank.get(target, -1) > rank[name]]
    assert upward == []


def test_commands_do_not_import_each_other() -> None:
    commands = AREAS["commands"]
    assert [
        f"{name} -> {target}"
        for name, targets in graph().items()
        for own in commands
        if name.startswith(own)
        for target in targets
        if target.startswith(commands) and not target.startswith(own)
    ] == []


def test_files_are_short() -> None:
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in files()}
    assert {name for name, length in lengths.items() if length > LONGEST} == LONGER.keys()


def test_public_names_are_defined_in_the_modules_users_import() -> None:
    script = """
from mlp_fused import FusedLinear, FusedMLP, fuse, transfer
from mlp_fused.train import Config, Result, train
from mlp_fused.train.predict import load_model, predict
from mlp_fused.tune import tune
assert callable(transfer.measure) and callable(train) and callable(tune)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def build(kind: str, source: Path, folder: Path) -> Path:
    """The distribution of a kind, "sdist" or "wheel", that setuptools builds from a source folder."""
    script = f"from setuptools import build_meta; import sys; build_meta.build_{kind}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", script, str(folder)], cwd=source, check=True, capture_output=True)
    return next(folder.glob("*.whl" if kind == "wheel" else "*.tar.gz"))


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in a source distribution that is built from the files that git tracks."""
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    for name in tracked():
        old, new = ROOT / name, source / name
        new.parent.mkdir(parents=True, exist_ok=True)
        if old.is_symlink():
            new.symlink_to(os.readlink(old))
        else:
            new.write_bytes(old.read_bytes())
    with tarfile.open(build("sdist", source, folder)) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    return next((folder / "unpacked").iterdir())


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that is built from the source distribution."""
    return build("wheel", unpacked, tmp_path_factory.mktemp("wheel"))


@pytest.mark.parametrize("name", READMES)
def test_the_sdist_holds_the_readmes_and_the_targets_of_their_links(name: str, unpacked: Path) -> None:
    assert (unpacked / name).read_text() == readme_text(name)
    for link in links(name):
        if not link.startswith("https://"):
            assert ((unpacked / name).parent / link.partition("#")[0]).exists(), link


def test_the_wheel_holds_the_package(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        f"mlp_fused/{name}" if name.startswith("kernels/") else name
        for name in tracked("mlp_fused", "kernels")
        if name != "mlp_fused/kernels" and not name.endswith(".md")
    }
    assert packed == expected


def test_the_commands_of_the_wheel_run_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    script = """
import sys, mlp_fused
from mlp_fused.__main__ import parser
assert mlp_fused.__file__.startswith(sys.argv[1]), mlp_fused.__file__
for command in ("train", "predict", "tune", "transfer"):
    try:
        parser().parse_args([command, "--help"])
    except SystemExit as stop:
        assert stop.code == 0
"""
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=tmp_path, env=environment, check=True, capture_output=True
    )


CLAUSES = {"What", "Of", "Whether", "How", "Which", "Why", "That", "Those", "Where", "When", "Who", "Whose", "As"}


def test_docstrings_begin_with_a_noun_or_a_verb() -> None:
    """A reader expects the subject or the verb first. A docstring that begins with a clause delays both."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    begun = {
        f"{path.relative_to(ROOT)}: {documentation.splitlines()[0]}"
        for path in files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, kinds)
        and (documentation := ast.get_docstring(node))
        and documentation.split()[0] in CLAUSES
    }
    assert begun == set()


def test_no_module_changes_anothers_names() -> None:
    """A launcher, a device or a table is handed to the module that uses it."""
    changed = []
    for name, path in modules().items():
        tree = ast.parse(path.read_text())
        ours = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            and (node.level or (node.module or "").startswith(("mlp_fused", "bench")))
            for alias in node.names
        }
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else []
            changed += [
                f"{name}: {ast.unparse(target)}"
                for target in targets
                if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id in ours
            ]
    assert changed == []


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """True if a function is decorated by triton.jit, with arguments or without."""
    decorators = (node.func if isinstance(node, ast.Call) else node for node in function.decorator_list)
    return any(ast.unparse(decorator) in ("jit", "triton.jit") for decorator in decorators)


def host_functions(
    node: ast.AST, in_class: bool = False
) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """The functions in a tree that no kernel contains, each with True if it is a method."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if is_kernel(child):
                continue
            yield child, in_class
        yield from host_functions(child, isinstance(child, ast.ClassDef))


def unannotated(tree: ast.AST) -> list[str]:
    """The arguments and returns without an annotation, "function(argument)" or "function ->"."""
    missing = []
    for function, is_method in host_functions(tree):
        signature = function.args
        arguments = [*signature.posonlyargs, *signature.args]
        if is_method and "staticmethod" not in map(ast.unparse, function.decorator_list):
            del arguments[0]  # self or cls
        arguments += [
            *signature.kwonlyargs,
            *(argument for argument in (signature.vararg, signature.kwarg) if argument),
        ]
        missing += [f"{function.name}({argument.arg})" for argument in arguments if argument.annotation is None]
        missing += [f"{function.name} ->"] * (function.returns is None)
    return missing


def test_every_kernel_modules_host_functions_are_annotated() -> None:
    """mypy does not report missing annotations in these modules, because kernels have none."""
    missing = {
        name: functions
        for name, path in modules().items()
        if name.startswith("mlp_fused.kernels") and (functions := unannotated(ast.parse(path.read_text())))
    }
    assert missing == {}


def test_missing_annotations_are_found_outside_kernels() -> None:
    source = """
@triton.jit
def kernel(x):
    def inner(y): ...

@triton.jit(do_not_specialize=["M"])
def specialized(x, M): ...

@functools.cache
def cached(x, *rest: int, key=None) -> int:
    def inner(y: int): ...

class Tile:
    def rows(self, y) -> int: ...

    @staticmethod
    def columns(y) -> int: ...
"""
    assert unannotated(ast.parse(source)) == ["cached(x)", "cached(key)", "inner ->", "rows(y)", "columns(y)"]
