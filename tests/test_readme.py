"""The READMEs: their Python prints the shown output, their links work, and their tables are complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from readme import BLOCK, READMES, ROOT, anchors, links, readme, readme_text, run_python
from test_convert import MODELS

from mlp_fused import ACTIVATIONS, PATTERNS


def test_the_first_readme_has_at_most_150_lines() -> None:
    assert len(readme_text("README.md").splitlines()) <= 150


def test_the_first_readme_has_a_picture_with_alt_text() -> None:
    pictures = re.findall(r'<img src="([^"]+)" alt="([^"]+)">', readme_text("README.md"))
    assert pictures
    for file, alt in pictures:
        assert (ROOT / file).is_file()
        assert len(alt) > 100


def test_the_first_readme_leads_to_the_others() -> None:
    assert set(READMES[1:]) <= set(links("README.md"))


def test_the_first_readme_shows_what_its_four_snippets_print() -> None:
    shown = [block["code"] for block in BLOCK.finditer(readme_text("README.md")) if block["output"]]
    assert len(shown) == 4
    for code, call in zip(shown, ("FusedMLP(", "from_sequential(", "fuse(", "explain(")):
        assert call in code


@pytest.mark.alone
@pytest.mark.parametrize("name", READMES)
def test_python_prints_the_shown_output(name: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    blocks = list(BLOCK.finditer(readme_text(name)))
    assert blocks
    for block, output in zip(blocks, run_python(name), strict=True):
        assert block["output"] in (None, output), "python tests/readme.py writes the outputs"


@pytest.mark.parametrize("name", READMES)
def test_links_lead_to_files_and_headings(name: str) -> None:
    inside = [link for link in links(name) if not link.startswith(("https://", "mailto:"))]
    assert inside
    for link in inside:
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("name", READMES)
def test_named_files_exist(name: str) -> None:
    """A path with a folder, in backticks, such as `kernels/tile.py`."""
    for path in re.findall(r"`((?:kernels|mlp_fused|bench|tests|\.ci)/[\w./]+)`", readme_text(name)):
        assert (ROOT / path).exists(), path


def test_anchors_are_those_of_github() -> None:
    assert anchors("# A `b_c`, d-e\n\n```sh\n# no heading\n```\n## What's new?\n") == {"a-b_c-d-e", "whats-new"}


def test_the_manual_lists_every_activation() -> None:
    assert re.findall(r"`(\w+)`", readme("activations")) == list(ACTIVATIONS)


def test_the_table_of_fuse_has_every_pattern() -> None:
    for path in PATTERNS:
        assert path.rsplit(".", 1)[1] in readme("fuse"), path


def rows(part: str) -> list[list[str]]:
    """The cells of a table's rows."""
    lines = [line for line in readme(part).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


@pytest.mark.parametrize("part", ["fuse", "integrations"])
def test_every_row_has_tests_that_exist(part: str) -> None:
    """tests/README.md lists the tests of each row; `test_x…` stands for all tests that begin with test_x."""
    tests = {path.name: path.read_text() for path in Path(__file__).parent.glob("test_*.py")}
    mapped = {row[0]: row[1] for row in rows(f"tests of {part}")}
    assert mapped.keys() == {row[0] for row in rows(part)}
    for row, cell in mapped.items():
        files = re.findall(r"`(test_\w+\.py)`", cell)
        names = re.findall(r"`(\w+)(…)?(?:\[\w+\])?`", cell)
        assert files, row
        assert names, row
        for name, more in names:
            definition = f"def {name}" if more else f"def {name}("
            assert any(definition in tests[file] for file in files), f"{row}: {name}"


def test_the_table_has_every_model_in_the_tests_of_fuse() -> None:
    models = set(re.findall(r"`test_\w+\[(\w+)\]`", readme("tests of fuse")))
    assert models == {model.id for model in MODELS}


def test_the_readme_of_the_kernels_names_every_file() -> None:
    named = set(links("kernels/README.md"))
    assert {path.name for path in (ROOT / "kernels").glob("*.py")} - {"__init__.py"} <= named


def test_the_glossary_has_one_line_for_each_of_27_terms() -> None:
    terms = [row[0] for row in rows("glossary")]
    assert len(terms) == len(set(terms)) == 27
    assert terms == sorted(terms, key=str.lower)
