"""Digests of kernels' sources, and the changes that affect them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from mlp_fused import ACTIVATIONS
from mlp_fused.kernels import sources

KERNEL = '''"""A kernel."""
from .language import tl, triton
from .helpers import load as fetch

ROUNDS = 7
UNUSED = 1


@triton.jit
def kernel(x_ptr, PRECISION: tl.constexpr):
    """Doubles x."""
    load = fetch(x_ptr)  # a name of its own
    for _ in range(ROUNDS):
        if PRECISION == "bf16x6":
            load = split(load)
        elif INTERPRETED:
            load = load * 3
        else:
            load = load * 2
    tl.store(x_ptr, load)


def split(value):
    return value + 1


def launcher(x):
    return kernel[(1,)](x)
'''
HELPERS = """from .language import tl, triton

def load(ptr):
    return tl.load(ptr)
"""


def write_package(folder: Path, kernel: str = KERNEL, helpers: str = HELPERS) -> sources.Source:
    """Write a package of two files. Returns the location of its kernel."""
    folder.mkdir()
    (folder / "kernel.py").write_text(kernel)
    (folder / "helpers.py").write_text(helpers)
    return folder / "kernel.py", "kernel"


def digest(source: sources.Source, precision: str | None = None) -> str:
    return sources.digest([source], {"PRECISION": precision} if precision else None)


def test_a_digest_is_the_same_in_every_process_and_under_every_python(tmp_path: Path) -> None:
    """These digests were computed by Python 3.10, 3.11, 3.12 and 3.13."""
    source = write_package(tmp_path / "a")
    assert digest(source) == "eed0f23e42886a9e"
    assert digest(source, "ieee") == "5aaa90df6108504b"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Doubles x.", "Writes 2 x."),
        ("  # a name of its own", ""),
        ("range(ROUNDS)", "range( ROUNDS )"),
        ("UNUSED = 1", "UNUSED = 2"),
        ("return kernel[(1,)](x)", "return kernel[(2,)](x)"),
        ("load * 3", "load * 4"),  # a branch for the interpreter
    ],
)
def test_code_that_does_not_run_on_a_gpu_does_not_change_the_digest(old: str, new: str, tmp_path: Path) -> None:
    assert old in KERNEL
    assert digest(write_package(tmp_path / "a")) == digest(write_package(tmp_path / "b", KERNEL.replace(old, new)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("load * 2", "load * 4"),
        ("ROUNDS = 7", "ROUNDS = 8"),
        ("value + 1", "value + 2"),
        ("x_ptr, PRECISION: tl.constexpr", "x_ptr, PRECISION"),
        ("@triton.jit\n", '@triton.jit(do_not_specialize=["x_ptr"])\n'),
    ],
)
def test_a_change_of_a_kernel_or_of_a_name_in_it_changes_the_digest(old: str, new: str, tmp_path: Path) -> None:
    assert old in KERNEL
    assert digest(write_package(tmp_path / "a")) != digest(write_package(tmp_path / "b", KERNEL.replace(old, new)))


def test_a_change_of_an_imported_function_changes_the_digest(tmp_path: Path) -> None:
    changed = HELPERS.replace("tl.load(ptr)", "tl.load(ptr + 1)")
    assert digest(write_package(tmp_path / "a")) != digest(write_package(tmp_path / "b", helpers=changed))


def test_moving_a_function_does_not_change_the_digest(tmp_path: Path) -> None:
    definition = "def split(value):\n    return value + 1\n"
    moved = KERNEL.replace(definition, "").replace("import load as fetch", "import load as fetch, split")
    assert digest(write_package(tmp_path / "a")) == digest(
        write_package(tmp_path / "b", moved, HELPERS + "\n" + definition)
    )


def test_a_branch_ruled_out_by_a_constant_does_not_change_the_digest(tmp_path: Path) -> None:
    a = write_package(tmp_path / "a")
    b = write_package(tmp_path / "b", KERNEL.replace("value + 1", "value + 2"))  # only bf16x6 calls this
    assert digest(a, "ieee") == digest(b, "ieee")
    assert digest(a, "bf16x6") != digest(b, "bf16x6")
    several = [sources.digest([source], {"PRECISION": frozenset({"ieee", "tf32"})}) for source in (a, b)]
    assert several[0] == several[1]
    assert sources.digest([a], {"PRECISION": frozenset({"ieee", "bf16x6"})}) == sources.digest([a])


def test_a_new_branch_does_not_change_other_branches_digests(tmp_path: Path) -> None:
    added = '        elif PRECISION == "fp16x3":\n            load = load * 5\n        elif INTERPRETED:'
    a, b = (
        write_package(tmp_path / "a"),
        write_package(tmp_path / "b", KERNEL.replace("        elif INTERPRETED:", added)),
    )
    assert digest(a, "ieee") == digest(b, "ieee")
    assert digest(a) != digest(b)


def test_a_condition_that_a_constant_fulfils_does_not_change_the_digest(tmp_path: Path) -> None:
    """In one precision, a loop may skip some of its work under a condition. Other precisions keep their digests."""
    body = KERNEL[KERNEL.index("        if PRECISION") : KERNEL.index("    tl.store")]
    guard = '        if PRECISION != "redo" or is_wanted(x_ptr):\n'
    guarded = KERNEL.replace(body, guard + "".join(f"    {line}" for line in body.splitlines(keepends=True)))
    a, b = write_package(tmp_path / "a"), write_package(tmp_path / "b", guarded)
    assert digest(a, "ieee") == digest(b, "ieee")
    assert digest(a, "redo") != digest(b, "redo")
    several = [sources.digest([source], {"PRECISION": frozenset({"ieee", "tf32"})}) for source in (a, b)]
    assert several[0] == several[1]
    assert digest(a) != digest(b)


def test_a_function_without_a_file_has_no_source() -> None:
    scope: dict[str, object] = {}
    exec("def typed_in(z): return z", scope)
    source = sources.find_source(scope["typed_in"])
    assert sources.digest([source]) == sources.digest([])
    assert sources.find_source(print) is None


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activations_source_is_found(name: str) -> None:
    activation = ACTIVATIONS[name]
    nothing = sources.digest([])
    digests = {
        sources.digest([sources.find_source(function)]) for function in (activation.forward, activation.backward)
    }
    assert len(digests) == 2
    assert nothing not in digests


def test_kernels_are_listed_by_module() -> None:
    assert [name for _, name in sources.kernels_in("network_forward")] == ["network_forward_kernel"]
    assert {"network_forward_kernel", "network_dgrad_kernel"} <= {name for _, name in sources.kernels_in("network*")}


def test_names_that_a_kernel_calls_are_followed() -> None:
    """The source of a kernel includes every function of the project that it calls."""
    path, name = sources.source("layer_forward", "layer_forward_kernel")
    texts: dict[sources.Source, str] = {}
    sources._collect((path, name), (), texts)
    called = {
        node.func.id
        for source, text in texts.items()
        for node in ast.walk(sources._names(source[0])[source[1]])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    parameters = {"FORWARD", "BACKWARD"}
    builtin = {"len", "range", "float"}
    assert called - parameters - builtin <= {name for _, name in texts}
