"""SAE directories of others, as they write them, imported: the same features or reconstructions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from published import METADATA
from running import Run
from safetensors.torch import load_file, save_file
from synthetic import KINDS, normal, random_sae
from torch import Tensor

from sae_core import load_pretrained
from sae_core.checkpoint import write_files
from sae_core.errors import SAEError
from sae_core.publishing.foreign import import_sae
from sae_core.publishing.saelens import saelens_files

D, F, K = 6, 20, 3
X = normal(40, D, dtype=torch.float32) * 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, seed=seed, dtype=torch.float32)


def saelens(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """A directory as SAELens writes it."""
    folder.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in tensors.items()},
              folder / "sae_weights.safetensors")  # fmt: skip
    about = {"model_name": "gpt2", "hook_name": "blocks.8.hook_resid_pre", "context_size": 128,
             "prepend_bos": True, "dataset_path": "a/b", "sae_lens_version": "6.54.12"}  # fmt: skip
    plain = {"d_in": D, "d_sae": F, "normalize_activations": "none", "metadata": about}
    (folder / "cfg.json").write_text(json.dumps(plain | config))
    return folder


def dictionary(folder: Path, name: str, tensors: dict[str, Tensor], **trainer: Any) -> Path:
    """A directory as dictionary_learning writes it."""
    folder.mkdir(parents=True)
    torch.save(tensors, folder / "ae.pt")
    about = {"dict_class": name, "layer": 8, "lm_name": "gpt2", "submodule_name": None}
    (folder / "config.json").write_text(json.dumps({"trainer": about | trainer}))
    return folder


def weights(norm: float = 1.0) -> dict[str, Tensor]:
    rows = draw(F, D)
    rows *= norm / rows.norm(dim=1, keepdim=True)
    return {"W_enc": draw(D, F, seed=1), "b_enc": draw(F, seed=2), "W_dec": rows,
            "b_dec": draw(D, seed=3)}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["", "hook_mlp_out"])
def test_what_we_export_comes_back(kind: str, target: str, tmp_path: Path) -> None:
    sae = random_sae(kind, torch.float32, metadata=METADATA, target_hook_name=target)
    sae.requires_grad_(False)
    write_files(tmp_path / "sae", saelens_files(sae))
    back = import_sae(tmp_path / "sae")
    torch.testing.assert_close(back.encode(X), sae.encode(X), rtol=0, atol=0)
    torch.testing.assert_close(back(X), sae(X), rtol=0, atol=0)
    assert back.spec.site == sae.spec.site


def test_a_transcoder_across_layers_or_to_nowhere_is_refused(tmp_path: Path) -> None:
    about = {"model_name": "gpt2", "hook_name": "blocks.8.mlp.hook_in"}
    for out, message in (
        ({}, "hook_name_out is 'None'"),
        ({"hook_name_out": "blocks.9.hook_mlp_out"}, "two layers"),
    ):
        folder = saelens(
            tmp_path / message, weights(), architecture="transcoder", metadata=about | out
        )
        with pytest.raises(SAEError, match=message):
            import_sae(folder)


def test_an_encoder_that_takes_x_and_rows_that_are_not_of_unit_norm(tmp_path: Path) -> None:
    t = weights() | {"threshold": draw(F, seed=4).abs()}
    t["W_dec"] = t["W_dec"] * torch.linspace(0.5, 2, F)[:, None]
    sae = import_sae(
        saelens(tmp_path / "x", t, architecture="jumprelu", apply_b_dec_to_input=False)
    )
    pre = X @ t["W_enc"] + t["b_enc"]
    features = pre.relu() * (pre > t["threshold"])
    torch.testing.assert_close(sae(X), features @ t["W_dec"] + t["b_dec"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        sae.encode(X), features * torch.linspace(0.5, 2, F), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F))
    assert (sae.spec.hook_layer, sae.spec.hook_name) == (8, "hook_resid_pre")
    assert sae.spec.metadata["model_name"] == "gpt2"


@pytest.mark.parametrize("by_norm", [True, False])
def test_topk_chooses_the_features_that_it_chose(by_norm: bool, tmp_path: Path) -> None:
    t = weights()
    norms = torch.linspace(0.1, 3, F)
    t["W_dec"] = t["W_dec"] * norms[:, None]
    options = {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": by_norm}
    sae = import_sae(saelens(tmp_path / "x", t, **options))
    pre = (X - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    rank = pre * norms if by_norm else pre
    chosen = (rank >= rank.sort(dim=1).values[:, -K, None]) * pre.relu()
    x_hat = chosen @ t["W_dec"] + t["b_dec"]
    torch.testing.assert_close(sae(X), x_hat, rtol=1e-4, atol=1e-4)


def test_a_directory_of_before_version_6(tmp_path: Path) -> None:
    t = weights()
    flat = {"metadata": None, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K},
            "hook_point": "blocks.3.hook_resid_post", "model_name": "pythia"}  # fmt: skip
    sae = import_sae(saelens(tmp_path / "x", t, **flat))
    assert (sae.spec.sae_type, sae.spec.top_k, sae.spec.hook_layer) == ("topk", K, 3)
    assert sae.spec.metadata["model_name"] == "pythia"


def test_one_threshold_and_rows_of_other_norms_make_a_jumprelu(tmp_path: Path) -> None:
    t = weights(norm=2.0)
    stored = {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"], "b_dec": t["b_dec"],
              "decoder.weight": t["W_dec"].T, "k": torch.tensor(K),
              "threshold": torch.tensor(0.7)}  # fmt: skip
    sae = import_sae(dictionary(tmp_path / "x", "BatchTopKSAE", stored))
    pre = (X - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    x_hat = (pre.relu() * (pre > 0.7)) @ t["W_dec"] + t["b_dec"]
    torch.testing.assert_close(sae(X), x_hat, rtol=1e-4, atol=1e-4)
    assert sae.spec.sae_type == "jumprelu" and sae.spec.hook_spec == "blocks.8.hook_resid_post"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architecture": "temporal"}, "architecture is 'temporal'"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'"),
        (
            {"metadata": {"hook_name": "blocks.1.attn.hook_z"}},
            "hook_name is 'blocks.1.attn.hook_z'",
        ),
        ({"architecture": "gated"}, "b_enc is of shape"),
        ({"architecture": "jumprelu"}, "threshold is missing"),
    ],
)
def test_what_no_kind_of_ours_does_is_named(
    config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(SAEError, match="x.*: ") as error:
        import_sae(saelens(tmp_path / "x", weights(), **config))
    assert words in str(error.value)


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_a_damaged_directory_is_named(name: str, tmp_path: Path) -> None:
    folder = saelens(tmp_path / "x", weights())
    (folder / name).write_bytes(b"{")
    with pytest.raises(SAEError, match=f"x/{name}: not a readable"):
        import_sae(folder)
    with pytest.raises(SAEError, match="neither a directory of SAELens"):
        import_sae(tmp_path)


def test_nothing_but_tensors_is_unpickled(tmp_path: Path) -> None:
    folder = dictionary(tmp_path / "x", "AutoEncoder", {"a": Path("not a tensor")})  # type: ignore
    with pytest.raises(SAEError, match="ae.pt: not a readable file of tensors"):
        import_sae(folder)


def test_the_command_writes_a_directory_that_loads(tmp_path: Path, run: Run) -> None:
    source, output = saelens(tmp_path / "theirs", weights()), tmp_path / "ours"
    printed = run(
        "sae_core/publishing/import_sae.py", source, output, "--model-name", "me/mine"
    ).stdout
    assert "standard with 20 features at blocks.8.hook_resid_pre of me/mine" in printed
    torch.testing.assert_close(load_pretrained(output)(X), import_sae(source)(X))
    assert load_file(output / "sae_weights.safetensors")["W_enc"].shape == (D, F)
    assert json.loads((output / "cfg.json").read_text())["metadata"]["context_size"] == 128
