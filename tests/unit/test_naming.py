"""Names that appear on disk: runs, layers, folders."""

from pathlib import Path

import pytest

from sae_core.sae.config import SAEConfig
from sae_core.utils.errors import SAEError
from sae_core.utils.naming import (
    EXPORT_FILES,
    SAE_FILES,
    batch_checkpoint_name,
    ensure_writable,
    epoch_checkpoint,
    hook_label,
    middle_layer,
    model_id,
    path_component,
    run_name,
)


@pytest.mark.parametrize(
    ("settings", "tag"),
    [
        (SAEConfig(topk=64, sae_expansion=8), "btop64sae.exp8"),
        (SAEConfig(sae_type="topk", topk=64), "top64sae.exp4"),
        (SAEConfig(sae_type="matryoshka_batch_topk", topk=32), "mat32sae.exp4"),
        (SAEConfig(sae_type="multi_batch_topk", topk=32), "multi32sae.exp4"),
        (SAEConfig(sae_type="jumprelu", topk=32), "jump32sae.exp4"),
        (SAEConfig(sae_type="gated", topk=64), "gatedsae.exp4"),
        (SAEConfig(sae_type="standard", topk=64), "sae.exp4"),
    ],
)
def test_run_name(settings: SAEConfig, tag: str) -> None:
    name = run_name("Qwen/Qwen3-0.6B", 13, "hook_resid_post", settings.tag, settings.sae_expansion)
    assert name == f"Qwen_Qwen3-0.6B.blocks.13.hook_resid_post.{tag}"
    assert path_component(name, "--run-name") == name


def test_folders() -> None:
    assert batch_checkpoint_name("Qwen/Qwen3-4B", 17, 4) == "Qwen_Qwen3-4B_layer17_exp4"
    assert epoch_checkpoint(12) == "checkpoint_epoch12.pt"
    assert EXPORT_FILES == (*SAE_FILES, "cfg.json", "sae_weights.safetensors")
    assert SAE_FILES == ("weights.pt", "config.json", "history.json")


@pytest.mark.parametrize(
    ("n_layers", "lower", "upper"), [(1, 0, 0), (2, 0, 1), (3, 1, 1), (28, 13, 14), (29, 14, 14)]
)
def test_middle_layer(n_layers: int, lower: int, upper: int) -> None:
    assert middle_layer(n_layers) == middle_layer(n_layers, "lower") == lower
    assert middle_layer(n_layers, "upper") == upper


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "../up", "a/b", "/", "a\\b", "a\nb", "a\0b", "a\x1b[2J", "-rf",
     "x" * 181, "é" * 91],
)  # fmt: skip
def test_unsafe_name(name: str) -> None:
    with pytest.raises(SAEError, match="--run-name: .* cannot name a folder; use letters") as error:
        path_component(name, "--run-name")
    assert str(error.value).isprintable()


def test_a_model_id_means_nothing_to_a_shell() -> None:
    assert model_id("Qwen/Qwen3-0.6B") == "Qwen_Qwen3-0.6B"
    assert model_id("a b;$(c)|`d`'\"&<>*?~") == "a_b___c___d_________"


@pytest.mark.parametrize("name", ["a", "my run", "Ärger-1.2_b", "a..b", "x" * 180])
def test_safe_name(name: str) -> None:
    assert path_component(name, "--run-name") == name


def test_ensure_writable(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    assert ensure_writable(folder, "--output-root") == folder
    assert folder.is_dir() and list(folder.iterdir()) == []
    (folder / "kept").write_text("here")
    ensure_writable(folder, "--output-root")
    assert [path.name for path in folder.iterdir()] == ["kept"]


@pytest.mark.parametrize("inside", ["", "deeper/still"])
def test_unwritable_folder(inside: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    folder = tmp_path / "file" / inside
    with pytest.raises(SAEError, match=f"--output-root: cannot write to {folder} .*another folder"):
        ensure_writable(folder, "--output-root")
    assert (tmp_path / "file").read_text() == "here"


def test_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(SAEError, match=r"--output-root: cannot write to .* \(Permission denied\)"):
        ensure_writable(tmp_path, "--output-root")


def test_a_transcoder_has_both_hooks_in_its_name() -> None:
    assert hook_label("hook_resid_post") == "hook_resid_post"
    label = hook_label("mlp.hook_in", "hook_mlp_out")
    name = run_name("gpt2", 3, label, "btop32sae", 4)
    assert name == "gpt2.blocks.3.mlp.hook_in-hook_mlp_out.btop32sae.exp4"
    assert path_component(name, "--run-name") == name
