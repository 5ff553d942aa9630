"""A hash of a job's code: of a script and of every package file that it imports.

Snakemake sees neither, so the hash is one of a rule's params: an edit of a file re-runs the rules
whose scripts use it, and no others. Comments, docstrings and layout are not part of the hash.
"""

import ast
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KINDS = ROOT / "sae_core/sae/kinds"


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
        digest.update(_meaning(path))
    return digest.hexdigest()[:16]


def files_behind(script: str, sae_type: str | None = None) -> frozenset[Path]:
    """A script (path from the repository root), and the package files that it imports."""
    found: set[Path] = set()
    todo = [ROOT / script]
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            imports = _imports(path)
            if sae_type and path == KINDS / "__init__.py":
                imports = tuple(p for p in imports if p.parent != KINDS or p.stem == sae_type)
            todo.extend(imports)
    return frozenset(found)


@cache
def _meaning(path: Path) -> bytes:
    """A Python file's syntax tree, any other file's contents."""
    if path.suffix != ".py":
        return path.read_bytes()
    return _written(_tree(path)).encode()


def _written(node: Any) -> str:
    """A syntax tree without positions, docstrings and empty fields: later versions of Python add
    fields, which are empty in the code of today."""
    if isinstance(node, list):
        return f"[{','.join(_written(item) for item in node if not _is_docstring(item))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    values = ((name, value) for name, value in ast.iter_fields(node) if value not in (None, []))
    return f"{type(node).__name__}({','.join(f'{n}={_written(v)}' for n, v in values)})"


def _is_docstring(node: Any) -> bool:
    """Whether a statement is a string and nothing else: of a module, class, function or field."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes(), filename=str(path))


@cache
def _imports(path: Path) -> tuple[Path, ...]:
    """The package files that one file imports, and the templates that it names."""
    if path.suffix != ".py":
        return ()
    found: list[Path] = []
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.extend(_files(alias.name))
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                found.extend(_files(f"{node.module}.{alias.name}"))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value.endswith(".j2"):
                found.extend(path.parent.glob(f"templates/{node.value}"))
    return tuple(found)


def _files(name: str) -> list[Path]:
    """The files of a dotted name: its packages, and the module that it is or is in."""
    parts = name.split(".")
    if parts[0] != "sae_core":
        return []
    stems = [ROOT.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1)]
    candidates = [p for stem in stems for p in (stem / "__init__.py", stem.with_suffix(".py"))]
    return [path for path in candidates if path.is_file()]
