"""Which files of a folder are chapters."""

from pathlib import Path

from sae_core.utils.errors import SAEError, is_unicode

NO_CHAPTERS = (".", "~", "#")
"""How the names of files that editors and systems create begin: locks, copies, forks."""


def chapters_in(folder: Path) -> list[Path]:
    """The existing chapters, in the order in which they are read."""
    return sorted(
        path
        for path in folder.glob("*.md")
        if not path.name.startswith(NO_CHAPTERS) and not path.is_dir()
    )


def find_chapters(folder: Path, where: str) -> list[Path]:
    """The same, with a check that there are some and that their names are valid text.

    Args:
        where: what named the folder, for the error messages.

    Raises:
        SAEError: the folder is missing or has no chapters, or a name is not UTF-8.
    """
    if not folder.is_dir():
        raise SAEError(f"{where}: no such folder; name folders of Markdown chapters")
    chapters = chapters_in(folder)
    if not chapters:
        nested = sorted({path.parent for path in folder.rglob("*.md") if path.parent != folder})
        if nested:
            raise SAEError(
                f"{where}: the .md files are in its subfolders, such as {nested[0]}; name those"
            )
        raise SAEError(f"{where}: contains no .md file; put the chapters there as *.md files")
    for path in chapters:
        if not is_unicode(path.name):
            raise SAEError(f"{where}: the name of {ascii(path.name)} is not UTF-8; rename the file")
        if not path.exists():
            raise SAEError(f"{where}: {path.name} is a link to a file that is not there; remove it")
    return chapters
