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

TELLING = {ast.Import, ast.ImportFrom, ast.Constant}
"""The nodes of a syntax tree that may name a file."""


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


def _write(node: Any, written: list[str], telling: list[ast.AST]) -> None:
    """Write a syntax tree without positions, docstrings and empty fields: later versions of Python
    add fields, which are empty in the code of today. Whether a name is read or assigned to, its
    place says already.

    Args:
        written: gets the tree, in pieces.
        telling: gets the nodes that may name a file.
    """
    kind = type(node)
    if kind is list:
        for item in node:
            if not _is_docstring(item):
                _write(item, written, telling)
                written.append(",")
        written.append("]")
    elif not isinstance(node, ast.AST):
        written.append(repr(node))
    else:
        if kind in TELLING:
            telling.append(node)
        written.append(f"{kind.__name__}(")
        fields = vars(node)
        for name in node._fields:
            value = fields.get(name)
            if value is not None and value != [] and name != "ctx":
                written.append(f"{name}=")
                _write(value, written, telling)
        written.append(")")


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
    written: list[str] = []
    telling: list[ast.AST] = []
    _write(ast.parse(contents, filename=str(path)), written, telling)
    return _File("".join(written).encode(), tuple(_named(path, telling)))


def _named(path: Path, nodes: list[ast.AST]) -> Iterator[Path]:
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _files(alias.name, ROOT)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield from _files(f"{node.module}.{alias.name}", ROOT)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value.endswith(".j2"):
                yield from path.parent.glob(f"templates/{node.value}")


@cache
def _files(name: str, root: Path) -> tuple[Path, ...]:
    """The files of a dotted name: its packages, and the module that it is or is in."""
    package = name.rpartition(".")[0]
    above = _files(package, root) if package else ()
    if not above and name != "sae_core":
        return ()
    stem = root.joinpath(*name.split("."))
    return above + tuple(p for p in (stem / "__init__.py", stem.with_suffix(".py")) if p.is_file())
