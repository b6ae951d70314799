"""The files of a source distribution. pyproject.toml names this class as setuptools' command `sdist`."""

from setuptools.command.sdist import sdist


class Sdist(sdist):
    """Add the READMEs and everything that they run or link to; setuptools itself adds the packages alone.

    A MANIFEST.in can do the same only at the top of the project, and its READMEs would be in the wheel too.
    """

    def make_distribution(self) -> None:
        for folder in (".ci", "bench", "tests"):
            self.filelist.graft(folder)
        for file in ("kernels/README.md", "mlp_fused/README.md", "CHANGELOG.md", "CITATION.cff"):
            self.filelist.include(file)
        self.filelist.global_exclude("*.py[co]")
        super().make_distribution()
