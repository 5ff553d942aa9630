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
from sae_core.formats.checkpoint import write_files
from sae_core.formats.foreign import import_sae
from sae_core.formats.saelens import saelens_files
from sae_core.utils.errors import SAEError

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


@pytest.mark.parametrize("by_norm", [True, False])
@pytest.mark.parametrize("of_x", [True, False])
@pytest.mark.parametrize("theirs", ["batchtopk", "matryoshka_batchtopk"])
def test_a_checkpoint_of_saelens_training(
    theirs: str, of_x: bool, by_norm: bool, tmp_path: Path
) -> None:
    """The threshold is in double precision, and compared before or after the decoder's norms."""
    t, norms = weights(), torch.linspace(0.5, 2, F)
    t["W_dec"] = t["W_dec"] * norms[:, None]
    options = {"architecture": theirs, "k": K + 0.25, "rescale_acts_by_decoder_norm": by_norm,
               "apply_b_dec_to_input": not of_x, "topk_threshold_lr": 0.01}  # fmt: skip
    if theirs.startswith("matryoshka"):
        options["matryoshka_widths"] = [5, 10]
    threshold = {"topk_threshold": torch.tensor(0.7, dtype=torch.float64)}
    sae = import_sae(saelens(tmp_path / "x", t | threshold, **options))
    pre = (X if of_x else X - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    features = pre.relu() * ((pre * norms if by_norm else pre) > 0.7)
    torch.testing.assert_close(sae(X), features @ t["W_dec"] + t["b_dec"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.encode(X), features * norms, rtol=1e-4, atol=1e-4)
    assert sae.W_dec.dtype == torch.float32 and sae.spec.top_k == K
    if by_norm:
        nested = theirs.startswith("matryoshka")
        assert sae.spec.sae_type == ("matryoshka_batch_topk" if nested else "batch_topk")
        assert sae.spec.matryoshka_sizes == ([5, 10, F] if nested else [])
    else:  # one threshold for each feature
        assert sae.spec.sae_type == "jumprelu"


def test_a_checkpoint_of_an_older_jumprelu_training(tmp_path: Path) -> None:
    t = weights()
    log = {"log_threshold": torch.linspace(-1, 0, F)}
    sae = import_sae(saelens(tmp_path / "x", t | log, architecture="jumprelu"))
    pre = (X - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    torch.testing.assert_close(sae.encode(X), pre.relu() * (pre > log["log_threshold"].exp()))


def test_a_decoder_row_of_zeros_stays_one(tmp_path: Path) -> None:
    t = weights(norm=2.0)
    t["W_dec"][3] = 0
    sae = import_sae(saelens(tmp_path / "x", t))
    pre = ((X - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    torch.testing.assert_close(sae(X), pre @ t["W_dec"] + t["b_dec"], rtol=1e-4, atol=1e-4)


def test_tensors_of_several_formats(tmp_path: Path) -> None:
    t = weights()
    mixed = t | {"W_enc": t["W_enc"].bfloat16(), "b_enc": t["b_enc"].half()}
    sae = import_sae(saelens(tmp_path / "x", mixed, apply_b_dec_to_input=False))
    torch.testing.assert_close(sae(X), import_sae(saelens(tmp_path / "y", t, apply_b_dec_to_input=
                               False))(X), rtol=0.1, atol=0.1)  # fmt: skip


ODD = ["x", -5, 0, 2.5, True, [1], {"a": 1}, float("nan"), float("inf"), "9" * 5000]

ODD_SETTINGS: list[tuple[str, dict[str, Any], list[Any]]] = [
    # the key, the rest of the configuration, values that it cannot have
    ("k", {"architecture": "topk"}, [*ODD, None]),
    ("k", {"architecture": "batchtopk"}, [v for v in ODD if v not in (0, 2.5) or v is True]),
    (
        "matryoshka_widths",
        {"architecture": "matryoshka_batchtopk"},
        ["x", 5, [5, 3], [0, 5], [-5], [5, F + 1], [2.5], [True, 5], ["5"], {"a": 1}, None],
    ),
    ("architecture", {}, ["x", "", 5, True, ["topk"], {"a": 1}]),
    ("d_in", {}, [*ODD, D + 1]),
    ("d_sae", {}, [*ODD, D]),
    ("apply_b_dec_to_input", {}, ["x", 1, 0, [True]]),
    ("rescale_acts_by_decoder_norm", {}, ["x", 1, 0, [True]]),
    ("normalize_activations", {}, ["expected_average_only_in", 5, ["none"]]),
    ("activation_fn", {}, [5, ["topk"]]),
    ("activation_fn_kwargs", {"activation_fn": "topk"}, [5, "k", [1]]),
    ("metadata", {}, ["x", 5, [1]]),
]

ODD_ORIGINS: list[tuple[str, list[Any]]] = [
    ("hook_name", ["x", 5, ["blocks.1.hook_resid_post"], "blocks.-1.hook_resid_post", "blocks..x",
                   "blocks.1.attn.hook_z", "blocks.\u0669.hook_resid_post",
                   f"blocks.{'1' * 5000}.x"]),
    ("model_name", [5, ["a"], True]),
    ("context_size", ODD),
    ("prepend_bos", ["x", 1, 0]),
    ("dataset_path", [5, ["a"]]),
    ("sae_lens_version", [6, ["6"]]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "rest", "value"),
    [(key, rest, value) for key, rest, values in ODD_SETTINGS for value in values],
)
def test_an_odd_setting_of_saelens(
    key: str, rest: dict[str, Any], value: Any, tmp_path: Path
) -> None:
    tensors = weights() | {"topk_threshold": torch.tensor(0.7)}
    says_what_is_odd(saelens(tmp_path / "x", tensors, **rest, **{key: value}) / "cfg.json", key)


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in ODD_ORIGINS for value in values]
)
def test_an_odd_origin_of_saelens(key: str, value: Any, tmp_path: Path) -> None:
    about = {"model_name": "gpt2", "hook_name": "blocks.8.hook_resid_pre", key: value}
    says_what_is_odd(saelens(tmp_path / "x", weights(), metadata=about) / "cfg.json", key)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("k", value) for value in [*ODD, None]),
        *(("layer", value) for value in [*(v for v in ODD if v is True or v != 0), None]),
        *(("dict_class", value) for value in ["x", 5, None, ["AutoEncoder"], {"a": 1}]),
        *(("lm_name", value) for value in [5, ["a"]]),
        *(("submodule_name", value) for value in [5, ["a"]]),
        *(("activation_dim", value) for value in [*ODD, D + 1]),
        *(("dict_size", value) for value in [*ODD, D]),
    ],
)
def test_an_odd_setting_of_dictionary_learning(key: str, value: Any, tmp_path: Path) -> None:
    folder = dictionary(tmp_path / "x", "AutoEncoderTopK", stored_topk(), **{"k": K, key: value})
    says_what_is_odd(folder / "config.json", key)


@pytest.mark.parametrize("value", [5, "x", [1]])
@pytest.mark.parametrize("key", ["trainer", "buffer"])
def test_an_odd_part_of_dictionary_learning(key: str, value: Any, tmp_path: Path) -> None:
    folder = dictionary(tmp_path / "x", "AutoEncoderTopK", stored_topk(), k=K)
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(config))
    says_what_is_odd(folder / "config.json", key)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("k", torch.tensor(-5)), ("k", torch.tensor(2.5)), ("k", torch.tensor([1, 2])),
        ("group_sizes", torch.tensor([5, -5, F])), ("group_sizes", torch.tensor([5, 5])),
        ("group_sizes", torch.tensor([[5, F - 5]])), ("group_sizes", torch.tensor([2.5, 17.5])),
    ],
)  # fmt: skip
def test_an_odd_tensor_of_dictionary_learning(name: str, value: Tensor, tmp_path: Path) -> None:
    stored = stored_topk() | {"threshold": torch.tensor(0.7), name: value}
    kind = "AutoEncoderTopK" if name == "k" else "MatryoshkaBatchTopKSAE"
    says_what_is_odd(dictionary(tmp_path / "x", kind, stored, k=K) / "ae.pt", name)


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(F, D, dtype=torch.long), torch.ones(F), torch.ones(0, D), torch.ones(F, D, 1),
     torch.full((F, D), torch.nan), torch.ones(D, F)],
)  # fmt: skip
def test_an_odd_matrix(tensor: Tensor, tmp_path: Path) -> None:
    says_what_is_odd(saelens(tmp_path / "x", weights() | {"W_dec": tensor}), "")
    stored = stored_topk() | {"decoder.weight": tensor.T if tensor.ndim == 2 else tensor}
    says_what_is_odd(dictionary(tmp_path / "y", "AutoEncoderTopK", stored, k=K), "")


def test_weights_that_overflow_with_unit_rows(tmp_path: Path) -> None:
    tensors = weights() | {"W_dec": torch.full((F, D), 3e38)}
    with pytest.raises(SAEError, match="x: its numbers overflow with unit decoder rows"):
        import_sae(saelens(tmp_path / "x", tensors))


def stored_topk() -> dict[str, Tensor]:
    t = weights()
    return {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"], "b_dec": t["b_dec"],
            "decoder.weight": t["W_dec"].T}  # fmt: skip


def says_what_is_odd(path: Path, key: str) -> None:
    """The import of a directory, or of the directory of a file, ends in a line that names it."""
    with pytest.raises(SAEError) as error:
        import_sae(path if path.is_dir() else path.parent)
    message = str(error.value)
    assert message.startswith(str(path)) and key in message[len(str(path)) :]
    assert "\n" not in message and len(message) < len(str(path)) + 400


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
        "sae_core/formats/import_sae.py", source, output, "--model-name", "me/mine"
    ).stdout
    assert "standard with 20 features at blocks.8.hook_resid_pre of me/mine" in printed
    torch.testing.assert_close(load_pretrained(output)(X), import_sae(source)(X))
    assert load_file(output / "sae_weights.safetensors")["W_enc"].shape == (D, F)
    assert json.loads((output / "cfg.json").read_text())["metadata"]["context_size"] == 128
