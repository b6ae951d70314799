"""The package as a whole: versions, names and files."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import mlp_fused

ROOT = Path(__file__).parent.parent


def test_all_versions_agree() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {mlp_fused.__version__}" in citation
    assert f"## {mlp_fused.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    for installed in importlib.metadata.distributions(name="mlp_fused"):  # empty if the package is only on the path
        assert installed.version == mlp_fused.__version__


def test_every_public_name_exists_and_is_documented() -> None:
    for name in mlp_fused.__all__:
        value = getattr(mlp_fused, name)
        if callable(value):
            assert (value.__doc__ or "").strip(), name


def test_only_one_module_of_the_kernels_imports_triton() -> None:
    importing = [
        path.name
        for path in (ROOT / "kernels").glob("*.py")
        if re.search(r"^\s*(import|from) triton\b", path.read_text(), re.MULTILINE)
    ]
    assert importing == ["language.py"]


@pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="not a git checkout, or git is not installed"
)
def test_the_repository_has_only_known_top_level_files() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    visible = {name for name in top if not name.startswith(".")}
    folders, files = {"kernels", "mlp_fused", "bench", "tests"}, {"pyproject.toml", "README.md"}
    assert visible <= folders | files | {"LICENSE", "CHANGELOG.md", "CITATION.cff"}
