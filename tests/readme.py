"""Parts of the README, for the tests that hold it to what it says."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def readme(part: str) -> str:
    found = re.search(f"<!-- {part} -->\n(.*?)<!-- /{part} -->", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found
    return found[1]
