"""The libraries of the extra test-models: a mark for tests that need one, and functions that import them."""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

# If this is "required", as in .ci/run, a test whose library is missing fails instead of being skipped.
REQUIRED = os.environ.get("MLP_FUSED_TEST_LIBRARIES") == "required"


def needs(library: str, required: bool = REQUIRED) -> pytest.MarkDecorator:
    """The mark of a test that is skipped without this library, unless all libraries are required."""
    missing = importlib.util.find_spec(library) is None
    return pytest.mark.skipif(
        missing and not required, reason=f"{library} is not installed (pip install -e '.[test-models]')"
    )


def load(library: str) -> Any:
    """Import a library. The test is skipped without it, unless all libraries are required."""
    if importlib.util.find_spec(library.partition(".")[0]) is None and not REQUIRED:
        pytest.skip(f"{library} is not installed (pip install -e '.[test-models]')")
    return importlib.import_module(library)


def declare_torchvisions_operators() -> None:
    """Let torchvision's wheel for CUDA be imported beside a CPU build of torch.

    There its operators cannot be loaded. Its Python code, which timm, transformers and peft import too, needs two of
    them. It is enough to declare these two.
    """
    specification = importlib.util.find_spec("torchvision")
    if specification is None or specification.origin is None:
        return
    package = Path(specification.origin).parent
    if torch.version.cuda is None and "+cu" in (package / "version.py").read_text():
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")


declare_torchvisions_operators()
