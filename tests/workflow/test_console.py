"""Snakemake's own console, with its logger plugin where that is installed."""

import importlib.util

import pytest
from project import Project


@pytest.mark.skipif(
    importlib.util.find_spec("snakemake_logger_plugin_rich") is None,
    reason="needs snakemake-logger-plugin-rich",
)
def test_the_rich_console_lists_the_jobs(project: Project) -> None:
    project.environment["NO_COLOR"] = "1"
    printed = project.snakemake("--dry-run", "--logger", "rich")
    assert "process" in printed and "fetch" in printed and "Job stats" in printed
    assert "\x1b[" not in printed
