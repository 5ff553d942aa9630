"""Chapters, processed in this process."""

from pathlib import Path
from typing import Any

from sae_core.data_processing.textbook_process import ProcessConfig, Report, process

LETTERS = ("alpha", "beta", "gamma")


def run(folder: Path, *chapters: str, **settings: Any) -> Report:
    """Process a folder of these chapters."""
    folder.mkdir(exist_ok=True)
    for number, chapter in enumerate(chapters):
        (folder / f"chapter_{number}.md").write_bytes(chapter.encode())
    output = folder.parent / "texts.json"
    return process(ProcessConfig(folders=(folder,), output=output, **settings))
