"""A hash of a job's code: of a script and of every package file that it imports.

Snakemake sees neither, so the hash is one of a rule's params: an edit of a file re-runs the rules
whose scripts use it, and no others. Comments, docstrings and layout are not part of the hash.
"""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
KINDS = ROOT / "sae_core/sae/kinds"


@cache
def code_hash(*scripts: str, sae_type: str | None = None) -> str:
    """A hash of what `scripts` do and the `sae_core` files that they import, directly or not, at
    the top or inside a function.

    Args:
        scripts: paths from the repository root.
        sae_type: the kind of SAE that the job is about; the files of other kinds do not count.
    """
    files = sorted(set().union(*(files_behind(script, sae_type) for script in scripts)))
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(ROOT)}\0".encode())
        digest.update(_read(path).meaning)
    return digest.hexdigest()[:16]


def files_behind(script: str, sae_type: str | None = None) -> frozenset[Path]:
    """A script (path from the repository root), and the package files that it imports."""
    found: set[Path] = set()
    todo = [ROOT / script]
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            imports = _read(path).imports
            if sae_type and path == KINDS / "__init__.py":
                imports = tuple(p for p in imports if p.parent != KINDS or p.stem == sae_type)
            todo.extend(imports)
    return frozenset(found)


def _written(node: Any) -> str:
    """A syntax tree without positions, docstrings and empty fields: later versions of Python add
    fields, which are empty in the code of today."""
    if isinstance(node, list):
        return f"[{','.join([_written(item) for item in node if not _is_docstring(item)])}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    values = [(name, getattr(node, name, None)) for name in node._fields]
    written = [f"{name}={_written(value)}" for name, value in values if value not in (None, [])]
    return f"{type(node).__name__}({','.join(written)})"


def _is_docstring(node: Any) -> bool:
    """Whether a statement is a string and nothing else: of a module, class, function or field."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


class _File(NamedTuple):
    meaning: bytes
    """A Python file's syntax tree, any other file's contents."""
    imports: tuple[Path, ...]
    """The package files that it imports, and the templates that it names."""


def _read(path: Path) -> _File:
    contents = path.read_bytes()
    return _parse(path, contents) if path.suffix == ".py" else _File(contents, ())


@cache
def _parse(path: Path, contents: bytes) -> _File:
    tree = ast.parse(contents, filename=str(path))
    return _File(_written(tree).encode(), tuple(_imports(path, tree)))


def _imports(path: Path, tree: ast.Module) -> Iterator[Path]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _files(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield from _files(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value.endswith(".j2"):
                yield from path.parent.glob(f"templates/{node.value}")


def _files(name: str) -> list[Path]:
    """The files of a dotted name: its packages, and the module that it is or is in."""
    parts = name.split(".")
    if parts[0] != "sae_core":
        return []
    stems = [ROOT.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1)]
    candidates = [p for stem in stems for p in (stem / "__init__.py", stem.with_suffix(".py"))]
    return [path for path in candidates if path.is_file()]
