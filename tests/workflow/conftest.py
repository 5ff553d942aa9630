"""A project in which nothing has run, and one in which everything has."""

from pathlib import Path

import pytest
from project import Project, make_project


@pytest.fixture(scope="session")
def completed(tmp_path_factory: pytest.TempPathFactory, root: Path, tiny_model: Path) -> Project:
    """A project whose workflow has run; tests put back what they change."""
    project = make_project(tmp_path_factory.mktemp("project"), root, tiny_model)
    project.snakemake()
    return project


@pytest.fixture
def project(tmp_path: Path, root: Path, tiny_model: Path) -> Project:
    """A project in which nothing has run."""
    return make_project(tmp_path / "project", root, tiny_model)
