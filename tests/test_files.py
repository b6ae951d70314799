"""mlp_fused/files.py: paths that cannot be written give one sentence before any work is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from trainings import TINY, run

from mlp_fused.errors import UserError
from mlp_fused.files import check_writable
from mlp_fused.train.predict import Config as Predict
from mlp_fused.tune.output import Output, table_files


def predict(path: str) -> object:
    return check_writable(Predict("c.pt", "x.npz", path).out, "--out")


def tune(path: str) -> object:
    return Output(Path("t.json"), Path(path), table_files.Table("GPU", "", {}), print, lambda: 0.0)


COMMANDS: dict[str, Callable[[str], object]] = {
    "train": lambda path: run(TINY, data=None, checkpoint=path),
    "predict": predict,
    "tune": tune,
}
PATHS = {
    "long": ("n" * 300 + ".npz", "File name too long"),
    "loop": ("loop.npz", "[Ss]ymlink loop|Too many levels of symbolic links"),
    "in a loop": ("loop.npz/x.npz", "[Ss]ymlink loop|Too many levels of symbolic links"),
    "NUL": ("a\0b.npz", "embedded null byte"),
    "in a file": ("file/x.npz", "Not a directory|File exists"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", PATHS)
def test_a_path_that_cannot_be_written_gives_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop.npz").symlink_to("loop.npz")
    Path("file").touch()
    path, why = PATHS[name]
    with pytest.raises(UserError, match=why) as caught:
        COMMANDS[command](path)
    assert str(caught.value).count("\n") == 0


def test_a_folder_that_cannot_be_searched_gives_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(UserError, match=f"^cannot write into {tmp_path}, the folder of --out: Permission denied$"):
        check_writable(tmp_path / "x.npz", "--out")
