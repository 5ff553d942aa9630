"""What code a job depends on: a hash of a script and of every package file that it imports.

Snakemake sees neither, so that the hash stands in a rule's params: an edit of a file reruns the
rules whose scripts use it, and no others.
"""

import ast
import hashlib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def code_hash(*scripts: str) -> str:
    """A hash of the contents of `scripts` (paths from the repository root) and of the
    `sae_core` files that they import, directly or not, at the top or inside a function."""
    files = sorted(set().union(*(files_behind(script) for script in scripts)))
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(ROOT)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def files_behind(script: str) -> frozenset[Path]:
    """A script (path from the repository root), and the package files that it imports."""
    found: set[Path] = set()
    todo = [ROOT / script]
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo.extend(_imports(path))
    return frozenset(found)


@cache
def _imports(path: Path) -> tuple[Path, ...]:
    """The package files that one file imports, and the templates that it names."""
    if path.suffix != ".py":
        return ()
    found: list[Path] = []
    for node in ast.walk(ast.parse(path.read_bytes(), filename=str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.extend(_files(alias.name))
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                found.extend(_files(f"{node.module}.{alias.name}"))
        elif isinstance(node, ast.Constant) and str(node.value).endswith(".j2"):
            found.extend(path.parent.glob(f"templates/{node.value}"))
    return tuple(found)


def _files(name: str) -> list[Path]:
    """The files behind a dotted name: its packages, and the module it is or is in."""
    parts = name.split(".")
    if parts[0] != "sae_core":
        return []
    stems = [ROOT.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1)]
    candidates = [p for stem in stems for p in (stem / "__init__.py", stem.with_suffix(".py"))]
    return [path for path in candidates if path.is_file()]
