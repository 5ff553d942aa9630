"""A project in which nothing has run, and one in which everything has."""

from pathlib import Path

import pytest
from made_once import made_once
from preloaded import forking_python
from project import Project, make_copy, make_project

PRINTED = "printed.txt"


@pytest.fixture(scope="session")
def completed(tmp_path_factory: pytest.TempPathFactory, root: Path, tiny_model: Path) -> Project:
    """A project whose workflow has run, once for all tests; each of pytest's workers has a copy.
    Tests put back what they change."""

    def make(folder: Path) -> None:
        project = make_project(folder, root, tiny_model)
        (folder / PRINTED).write_text(project.snakemake())

    folder = made_once(tmp_path_factory, "completed", make)
    project = make_copy(
        Project(folder, python=forking_python()), tmp_path_factory.mktemp("completed") / "project"
    )
    project.printed.append((folder / PRINTED).read_text())
    return project


@pytest.fixture
def completed_copy(completed: Project, tmp_path: Path) -> Project:
    """A project whose workflow has run, for one test to do with as it likes."""
    return make_copy(completed, tmp_path / "project")


@pytest.fixture
def project(tmp_path: Path, root: Path, tiny_model: Path) -> Project:
    """A project in which nothing has run."""
    return make_project(tmp_path / "project", root, tiny_model)
