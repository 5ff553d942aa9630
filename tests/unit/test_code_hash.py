"""What the hash of a job's code notices, and what it does not."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sae_core.utils import code_hash as hashing
from sae_core.utils.code_hash import code_hash, files_behind

TRAIN = "scripts/train.py"
Edit = Callable[[str], str]
Hash = Callable[..., str]


@pytest.fixture(scope="module")
def copy(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project."""
    folder = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("data", "__pycache__", "checkpoints", "pretrained_models")
    for part in ("sae_core", "scripts"):
        shutil.copytree(root / part, folder / part, ignore=ignored)
    return folder


@pytest.fixture
def hash_after(copy: Path, monkeypatch: pytest.MonkeyPatch) -> Hash:
    """The hash of a training's code in the copy, while a file there is edited."""
    monkeypatch.setattr(hashing, "ROOT", copy)
    monkeypatch.setattr(hashing, "KINDS", copy / "sae_core/sae/kinds")

    def edited(file: str, edit: Edit, kind: str = "batch_topk") -> str:
        path = copy / file
        before = path.read_text(encoding="utf-8")
        path.write_text(edit(before), encoding="utf-8")
        assert path.read_text(encoding="utf-8") != before or edit is unchanged
        code_hash.cache_clear()  # for each process, files are what they are
        try:
            return code_hash(TRAIN, sae_type=kind)
        finally:
            path.write_text(before, encoding="utf-8")
            code_hash.cache_clear()

    return edited


def unchanged(code: str) -> str:
    return code


def one_more(code: str) -> Edit:
    return lambda before: before + code


def instead(old: str, new: str) -> Edit:
    return lambda before: before.replace(old, new, 1)


NOTHING = {
    "a comment": ("sae_core/utils/errors.py", one_more("# A comment.\n")),
    "a blank line": ("sae_core/sae/losses.py", one_more("\n\n")),
    "a module's docstring": ("sae_core/sae/losses.py", instead('"""', '"""Other words: ')),
    "a function's docstring": (
        "sae_core/sae/losses.py",
        instead(") -> Tensor:\n    ", ') -> Tensor:\n    """Other words."""\n    '),
    ),
    "a field's docstring": (
        "sae_core/train_config.py",
        instead('    """', '    """In other words, '),
    ),
    "another layout": (
        "sae_core/trainer/optimizer.py",
        instead("MAX_GRADIENT_NORM = 1.0", "MAX_GRADIENT_NORM = (\n    1.0\n)"),
    ),
    "another kind": ("sae_core/sae/kinds/gated.py", one_more("EDITED = 1\n")),
    "another script": ("scripts/plot.py", one_more("EDITED = 1\n")),
}

SOMETHING = {
    "a constant": (
        "sae_core/trainer/optimizer.py",
        instead("MAX_GRADIENT_NORM = 1.0", "MAX_GRADIENT_NORM = 1"),
    ),
    "a string": ("sae_core/utils/naming.py", one_more("EDITED = 'a string, and no docstring'\n")),
    "an operator": ("sae_core/training.py", instead("n_done += 1", "n_done -= 1")),
    "this kind": ("sae_core/sae/kinds/batch_topk.py", one_more("EDITED = 1\n")),
    "a file that the script imports by others": (
        "sae_core/sae/sparse_ops.py",
        one_more("EDITED = 1\n"),
    ),
    "the script": (TRAIN, one_more("EDITED = 1\n")),
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_changes_nothing_leaves_the_hash(hash_after: Hash, name: str) -> None:
    assert hash_after(*NOTHING[name]) == hash_after(TRAIN, unchanged)


@pytest.mark.parametrize("name", SOMETHING)
def test_what_changes_something_changes_the_hash(hash_after: Hash, name: str) -> None:
    assert hash_after(*SOMETHING[name]) != hash_after(TRAIN, unchanged)


def test_a_kind_counts_with_what_it_builds_on(hash_after: Hash) -> None:
    file, edit = "sae_core/sae/kinds/batch_topk.py", one_more("EDITED = 1\n")
    for kind, counts in (("matryoshka_batch_topk", True), ("gated", False)):
        assert (hash_after(file, edit, kind) != hash_after(file, unchanged, kind)) == counts


@pytest.mark.parametrize(
    ("file", "scripts"),
    [
        ("sae_core/reporting/page.py", {"summarise"}),
        ("sae_core/reporting/templates/report.html.j2", {"summarise"}),
        ("sae_core/reporting/templates/features.js.j2", {"browse"}),
        ("sae_core/model_training/single_sae_training.py", set()),
    ],
)
def test_a_file_is_behind_the_scripts_that_use_it(file: str, scripts: set[str], root: Path) -> None:
    """And a job runs again when a file behind its script changes: test_rebuild.py."""
    all_scripts = (root / "scripts").glob("*.py")
    assert {p.stem for p in all_scripts if root / file in files_behind(f"scripts/{p.name}")} == (
        scripts
    )
