"""The five READMEs for the tests: their parts, Python blocks and links.

A block of text directly after a block of Python is what that Python prints. `python tests/readme.py [README ...]` runs
the Python of these READMEs, by default of all five, and writes what it prints into these blocks.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
READMES = ("README.md", "mlp_fused/README.md", "kernels/README.md", "bench/README.md", "tests/README.md")

BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?", re.MULTILINE | re.DOTALL)
END_OF_BLOCK = "--- end of block ---\n"
LINK = re.compile(r"""\]\(([^)\s]+)\)|(?:src|srcset|href)="([^"]+)\"""")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def readme_text(name: str) -> str:
    return (ROOT / name).read_text()


def readme(part: str) -> str:
    """The text between the comments `<!-- part -->` and `<!-- /part -->`, which one of the READMEs has."""
    parts = [
        match[1]
        for name in READMES
        for match in re.finditer(f"<!-- {part} -->\n(.*?)<!-- /{part} -->", readme_text(name), re.DOTALL)
    ]
    assert len(parts) == 1, f"{len(parts)} parts are called {part}"
    return parts[0]


def run_python(name: str) -> list[str]:
    """The output of each Python block of a README, run in order in one process, in an empty folder."""
    codes = [block["code"] for block in BLOCK.finditer(readme_text(name))]
    switches = ("MLP_FUSED_", "TRITON_", "CUDA_LAUNCH_BLOCKING")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(switches)}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "blocks.py"  # a file, because @triton.jit reads its function's source
        script.write_text("".join(f"{code}\nprint({END_OF_BLOCK!r}, end='')\n" for code in codes))
        # A user's own table of measured tiles would change what `explain` prints.
        paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
        environment |= {"PYTHONPATH": paths, "TRITON_INTERPRET": "1", "XDG_CACHE_HOME": folder}
        run = subprocess.run(
            [sys.executable, script], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
        )
    assert run.returncode == 0, run.stderr[-3000:]
    outputs = run.stdout.split(END_OF_BLOCK)[:-1]
    assert len(outputs) == len(codes)
    return outputs


def with_outputs(name: str) -> str:
    """The README with the output of its Python in the blocks of text that show it."""
    text, outputs = readme_text(name), run_python(name)
    for block, output in reversed(list(zip(BLOCK.finditer(text), outputs))):
        if block["output"] is not None:
            text = text[: block.start("output")] + output + text[block.end("output") :]
    return text


def links(name: str) -> Iterator[str]:
    """The targets of a README's links and pictures, without those in code blocks."""
    for match in LINK.finditer(FENCED.sub("", readme_text(name))):
        yield match[1] or match[2]


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in HEADING.findall(FENCED.sub("", text)))
    return {heading.replace(" ", "-") for heading in words}


if __name__ == "__main__":
    for file in sys.argv[1:] or READMES:
        (ROOT / file).write_text(with_outputs(file))
