"""Which files of a folder are chapters."""

from pathlib import Path

from sae_core.utils.errors import SAEError, is_unicode

SUFFIXES = (".md", ".markdown")
NO_CHAPTERS = (".", "~", "#")
"""How the names of files and folders that editors and systems create begin: locks, copies,
forks."""

HERE, EVERYWHERE = "*", "**/*"
"""Patterns: the files of a folder itself, and those of its subfolders too."""


def chapters_in(folder: Path, pattern: str = HERE) -> list[Path]:
    """The existing chapters, in the order in which they are read: *.md and *.markdown in any case.

    Args:
        pattern: which files of the folder, as a glob pattern relative to it.
    """
    return sorted(
        path
        for path in folder.glob(pattern)
        if _is_markdown(path) and not _is_left_by_a_tool(path, folder) and not path.is_dir()
    )


def passed_over(folder: Path, pattern: str = HERE) -> dict[Path, str]:
    """What fits the pattern and is no chapter: path relative to the folder to why."""
    found = {}
    for path in sorted(folder.glob(pattern)):
        if _is_left_by_a_tool(path, folder):
            why = "a hidden or temporary file"
        elif path.is_dir():
            why = "" if "/" in pattern else f'a subfolder, which --pattern "{EVERYWHERE}" reads'
        else:
            why = "" if _is_markdown(path) else f"not named {' or '.join(SUFFIXES)}"
        if why:
            found[path.relative_to(folder)] = why
    return found


def find_chapters(folder: Path, where: str, pattern: str = HERE) -> list[Path]:
    """The same as `chapters_in`, with a check that there are some and that their names are text.

    Args:
        where: what named the folder, for the error messages.

    Raises:
        SAEError: the folder is missing or has no chapters, or a name is not UTF-8.
    """
    if not folder.is_dir():
        raise SAEError(f"{where}: no such folder; name folders of Markdown chapters")
    chapters = chapters_in(folder, pattern)
    if not chapters:
        nested = sorted({path.parent for path in chapters_in(folder, EVERYWHERE)} - {folder})
        if nested:
            raise SAEError(
                f"{where}: the .md files are in its subfolders, such as {nested[0]}; name those, "
                f'or read them with the pattern "{EVERYWHERE}"'
            )
        raise SAEError(
            f"{where}: contains no .md file that fits the pattern {pattern!r}; put the chapters "
            "there as *.md or *.markdown files"
        )
    for path in chapters:
        if not is_unicode(path.name):
            raise SAEError(f"{where}: the name of {ascii(path.name)} is not UTF-8; rename the file")
        if not path.exists():
            raise SAEError(f"{where}: {path.name} is a link to a file that is not there; remove it")
    return chapters


def _is_markdown(path: Path) -> bool:
    return path.suffix.casefold() in SUFFIXES


def _is_left_by_a_tool(path: Path, folder: Path) -> bool:
    return any(part.startswith(NO_CHAPTERS) for part in path.relative_to(folder).parts)
