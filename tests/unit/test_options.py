"""Every option of the single run, by its effect on what is trained, written or said."""

import json
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from sae_core.formats.checkpoint import load_sae
from sae_core.sae_base import SparseAutoencoder
from sae_core.sae_train import train_from_model
from sae_core.train_config import RunConfig
from sae_core.trainer.console import Console
from sae_core.training import Observer
from sae_core.utils import cli
from sae_core.utils.devices import is_fast_at_bfloat16
from sae_core.utils.errors import SAEError


class Result(NamedTuple):
    folder: Path
    sae: SparseAutoencoder
    history: dict[str, list[float]]
    checkpoints: set[str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, texts: list[str]) -> list[str]:
    """The options of a run of a second, without its folders."""
    data = tmp_path_factory.mktemp("data") / "texts.json"
    data.write_text(json.dumps(texts[:6]))
    return (
        f"--model-name {tiny_model} --data-path {data} --model-dtype float32 --device cpu "
        "--num-epochs 2 --max-text-length 32 --tokens-per-step 256 --sae-expansion 2 --topk 4 "
        "--no-use-end-to-end"
    ).split()


def train(base: list[str], folder: Path, *options: str) -> Result:
    """Train with the base's options and these, which win."""
    roots = ["--output-root", str(folder / "saes"), "--checkpoint-root", str(folder / "points")]
    config = cli.parse(RunConfig, "", [*base, *roots, *options])
    sae = train_from_model(config, Observer())
    assert sae.parent == folder / "saes"
    points = {path.name for path in (folder / "points" / sae.name).iterdir() if path.is_dir()}
    return Result(sae, load_sae(sae), json.loads((sae / "history.json").read_text()), points)


@pytest.fixture(scope="module")
def plain(base: list[str], tmp_path_factory: pytest.TempPathFactory) -> Result:
    return train(base, tmp_path_factory.mktemp("plain"))


def weights_differ(result: Result, plain: Result) -> bool:
    return not torch.equal(result.sae.W_dec, plain.sae.W_dec)


ALL = "--use-end-to-end --end-to-end-fraction 1"

DYING = "--n-batches-to-dead 1 --topk 1 --tokens-per-step 16 --sae-expansion 8"
"""So few features fire in a batch that many count as dead at once."""

EFFECTS: dict[str, Callable[[Result, Result], Any]] = {
    "--hook-layer 3": lambda r, p: r.sae.spec.hook_layer == 3 and weights_differ(r, p),
    "--middle-layer-strategy upper": lambda r, p: (
        (r.sae.spec.hook_layer, p.sae.spec.hook_layer) == (2, 1)
    ),
    "--hook-name hook_mlp_out": lambda r, p: (
        ".blocks.1.hook_mlp_out." in r.folder.name and weights_differ(r, p)
    ),
    "--hook-name mlp.hook_in --target-hook-name hook_mlp_out": lambda r, p: (
        ".blocks.1.mlp.hook_in-hook_mlp_out." in r.folder.name
        and r.sae.spec.target_hook_name == "hook_mlp_out"
        and p.sae.spec.target_hook_name == ""
        and weights_differ(r, p)
    ),
    "--run-name mine": lambda r, p: r.folder.name == "mine",
    "--val-fraction 0.5": lambda r, p: r.history["tokens"][0] < p.history["tokens"][0],
    "--val-fraction 0": lambda r, p: (
        not any(key.startswith("val_") for key in r.history)
        and r.checkpoints == {"checkpoint_epoch2.pt"}
        and r.sae.threshold > 0
    ),
    "--seed 1": lambda r, p: weights_differ(r, p),
    "--excluded-tokens <|endoftext|> <bos>": lambda r, p: (
        r.sae.spec.excluded_tokens == ("<|endoftext|>", "<bos>")
        and "excluded_tokens" not in p.sae.spec.metadata
        and r.history["tokens"][0] <= p.history["tokens"][0]
        and weights_differ(r, p)
    ),
    "--model-dtype bfloat16": lambda r, p: (
        r.sae.spec.metadata["model_dtype"] == "bfloat16" and weights_differ(r, p)
    ),
    "--sae-type standard": lambda r, p: (
        r.sae.spec.sae_type == "standard" and ".sae.exp2" in r.folder.name and r.sae.threshold == 0
    ),
    "--sae-type topk": lambda r, p: (
        ".top4sae." in r.folder.name and (r.sae.encode(torch.randn(9, 32)) > 0).sum(1).max() == 4
    ),
    "--sae-type matryoshka_batch_topk --matryoshka-fractions 0.25 0.75": lambda r, p: (
        ".mat4sae." in r.folder.name
        and r.sae.spec.matryoshka_sizes == [16, 48, 64]
        and r.history["kind_loss"][0] > 0
    ),
    "--sae-type jumprelu": lambda r, p: (
        ".jump4sae." in r.folder.name and len(r.sae.threshold.unique()) > 32
    ),
    "--sae-type gated --sparsity-penalty 0.1": lambda r, p: (
        ".gatedsae." in r.folder.name and r.sae.r_mag.any() and r.history["l1_contribution"][0] > 0
    ),
    "--sae-expansion 3": lambda r, p: r.sae.W_dec.shape == (96, 32),
    "--sae-dtype bfloat16": lambda r, p: r.sae.W_dec.dtype == torch.bfloat16,
    "--sparsity-penalty 0.1": lambda r, p: (
        r.history["l1_contribution"][0] == pytest.approx(0.1 * r.history["l1_loss"][0])
        and p.history["l1_contribution"][0] == 0
    ),
    "--topk 2": lambda r, p: r.history["sparsity"] == [2, 2] and ".btop2sae." in r.folder.name,
    f"--topk-aux 3 {DYING}": lambda r, p: (
        r.sae.spec.top_k_aux == 3 and p.sae.spec.top_k_aux == 4 and weights_differ(r, p)
    ),
    DYING: lambda r, p: r.history["dead_features"][-1] > p.history["dead_features"][-1] == 0,
    f"--aux-penalty 0 {DYING}": lambda r, p: (
        r.history["aux_loss"][0] > 0
        and r.history["loss"][0] == pytest.approx(r.history["recon_contribution"][0])
    ),
    "--num-epochs 3": lambda r, p: r.history["epoch"] == [1, 2, 3],
    "--tokens-per-step 128": lambda r, p: weights_differ(r, p),
    "--max-text-length 16": lambda r, p: r.sae.spec.metadata["max_text_length"] == 16,
    "--lr 1e-2": lambda r, p: r.history["loss"][-1] != p.history["loss"][-1],
    "--compute-dtype float32": lambda r, p: (
        weights_differ(r, p) == is_fast_at_bfloat16(torch.device("cpu"))
    ),
    "--lr auto": lambda r, p: weights_differ(r, p),
    f"{DYING} --n-tokens-to-dead 64": lambda r, p: r.sae.spec.n_batches_to_dead == 4,
    "--recon-weight 2": lambda r, p: (
        r.history["recon_contribution"][0] == pytest.approx(2 * r.history["recon_loss"][0])
    ),
    "--checkpoint-freq 1": lambda r, p: (
        r.checkpoints == {"checkpoint_epoch1.pt", "checkpoint_epoch2.pt", "best_model.pt"}
    ),
    "--checkpoint-freq 0": lambda r, p: r.checkpoints == {"best_model.pt"},
    "--num-epochs 5 --early-stopping-patience 1 --early-stopping-min-delta 10": lambda r, p: (
        r.history["epoch"] == [1, 2]
    ),
    "--num-epochs 4 --early-stopping-patience 0 --early-stopping-min-delta 10": lambda r, p: (
        r.history["epoch"] == [1, 2, 3, 4]
    ),
    "--use-end-to-end": lambda r, p: (
        [kl is None for kl in r.history["logit_kl"]] == [True, False]
        and r.history["loss"][0] == p.history["loss"][0]
        and weights_differ(r, p)
        and not any("kl" in name or "mse" in name for name in p.history)
        and not any("mse" in name for name in r.history)
    ),
    ALL: lambda r, p: (
        None not in r.history["logit_kl"]
        and "end_to_end_stride" not in r.sae.spec.metadata["end_to_end"]
    ),
    f"{ALL} --use-block-mse --no-use-logit-kl": lambda r, p: (
        {"2_mse", "3_mse", "val_3_mse", "total_post_layer_mse", "block_mse_contribution"}
        <= set(r.history)
        and "logit_kl" not in r.history
    ),
    f"{ALL} --use-block-mse --block-mse-layers 3": lambda r, p: (
        "2_mse" not in r.history
        and r.history["total_post_layer_mse"] == pytest.approx(r.history["3_mse"])
    ),
    f"{ALL} --use-block-mse --block-mse-weight 0.25": lambda r, p: (
        r.history["block_mse_contribution"][0]
        == pytest.approx(0.25 * r.history["total_post_layer_mse"][0])
    ),
    f"{ALL} --end-to-end-stride 2": lambda r, p: (
        None not in r.history["logit_kl"]
        and r.sae.spec.metadata["end_to_end"]["end_to_end_stride"] == 2
        and weights_differ(r, p)
    ),
    f"{ALL} --logit-kl-weight 0.25": lambda r, p: (
        r.history["kl_contribution"][0] == pytest.approx(0.25 * r.history["logit_kl"][0])
    ),
}


@pytest.mark.parametrize("options", EFFECTS)
def test_option_has_its_effect(
    options: str, base: list[str], plain: Result, tmp_path: Path
) -> None:
    assert EFFECTS[options](train(base, tmp_path, *options.split()), plain)


def test_layers_that_do_not_lie_behind_the_hook_are_named_before_the_model_is_loaded(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("sae_core.models.language_model.LanguageModel.load")
    options = ["--use-end-to-end", "--use-block-mse", "--block-mse-layers", "1", "2"]
    with pytest.raises(SAEError, match="--block-mse-layers 1: .* after blocks.1.* are 2 to 3"):
        train(base, tmp_path, *options)
    with pytest.raises(SAEError, match="--use-block-mse: no layer comes after blocks.3."):
        train(base, tmp_path, *options[:2], "--hook-layer", "3")


def test_init_from_begins_with_an_sae(
    base: list[str], plain: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = f"--init-from {plain.folder} --num-epochs 1 --lr 1e-5"
    result = train(base, tmp_path, *f"{options} {ALL}".split())
    assert ".btop4sae-ft.exp2" in result.folder.name and "logit_kl" in result.history
    assert (result.sae.W_dec * plain.sae.W_dec).sum(1).min() > 0.999
    assert result.sae.spec.metadata["init_from"]["name"] == plain.folder.name
    monkeypatch.delattr("sae_core.models.language_model.LanguageModel.load")
    with pytest.raises(SAEError, match="--init-from .*: has 64 features.* --sae-expansion 2 or mo"):
        train(base, tmp_path, *options.split(), "--sae-expansion", "1")


@pytest.mark.parametrize("options", ["--batch-size 1", "--activation-batch-size 7"])
def test_units_of_memory_do_not_change_the_result(
    options: str, base: list[str], tmp_path: Path
) -> None:
    exact = [*base, "--compute-dtype", "float32"]
    plain = train(exact, tmp_path / "plain")
    result = train(exact, tmp_path, *options.split())
    torch.testing.assert_close(result.sae.W_dec, plain.sae.W_dec, rtol=1e-4, atol=1e-5)
    assert result.history["val_loss"] == pytest.approx(plain.history["val_loss"], rel=1e-4)


def test_the_same_command_gives_the_same_bytes(
    base: list[str], plain: Result, tmp_path: Path
) -> None:
    again = train(base, tmp_path)
    assert again.folder.name == plain.folder.name
    for path in plain.folder.iterdir():
        assert (again.folder / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_final_sae_is_the_best_checkpoint(plain: Result, tmp_path: Path) -> None:
    best = plain.folder.parents[1] / "points" / plain.folder.name / "best_model.pt"
    assert (best / "weights.pt").read_bytes() == (plain.folder / "weights.pt").read_bytes()
    assert min(plain.history["val_loss"]) == plain.history["val_loss"][-1]


def test_log_freq_is_the_steps_between_two_figures(capsys: pytest.CaptureFixture[str]) -> None:
    shown: list[int] = []
    console = Console(log_freq=3)
    console.on_start(n_epochs=1, steps_per_epoch=7)
    for step in range(1, 8):
        console.on_step(1, step, torch.tensor(0.5), 4.0)
        assert console.bar is not None
        if console.bar.postfix:
            shown.append(step)
            console.bar.postfix = None
    assert shown == [3, 6, 7]
    assert console.bar.n == 7


def test_trust_remote_code_is_off_unless_asked_for(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker = tmp_path / "ran"
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}})
    )
    (model / "own.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import PretrainedConfig\n"
        "class OwnConfig(PretrainedConfig):\n    model_type = 'own'\n"
    )
    for options in ([], ["--no-trust-remote-code"]):
        with pytest.raises(SAEError, match="--model-name"):
            train(base, tmp_path, "--model-name", str(model), *options)
        assert not marker.exists()
    with pytest.raises(SAEError, match="--model-name"):  # it is no language model, but it ran
        train(base, tmp_path, "--model-name", str(model), "--trust-remote-code")
    assert marker.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--topk 0", "--topk 0"),
        ("--sae-type jumprelu --topk 0", "--topk 0: a jumprelu SAE needs"),
        ("--matryoshka-fractions 0.5 0.25", "--matryoshka-fractions 0.5 0.25"),
        ("--matryoshka-fractions 0.5 1", "--matryoshka-fractions 0.5 1.0"),
        ("--matryoshka-fractions 0", "--matryoshka-fractions 0.0"),
        ("--topk-aux 0", "--topk-aux 0"),
        ("--sae-expansion 0", "--sae-expansion 0"),
        ("--val-fraction 1", "--val-fraction 1.0"),
        ("--lr 0", "--lr 0"),
        ("--batch-size 0", "--batch-size 0"),
        ("--hook-layer -1", "--hook-layer -1"),
        ("--target-hook-name hook_mlp_out", "--target-hook-name hook_mlp_out: a transcoder goes"),
        ("--use-end-to-end --no-use-logit-kl", "--use-logit-kl or --use-block-mse"),
        ("--end-to-end-fraction 0", "--end-to-end-fraction 0"),
        ("--end-to-end-fraction 1.5", "--end-to-end-fraction 1.5"),
        ("--end-to-end-stride 0", "--end-to-end-stride 0"),
        ("--block-mse-layers 3", "--block-mse-layers needs --use-block-mse"),
        ("--use-block-mse --block-mse-layers -1", "--block-mse-layers -1"),
        ("--logit-kl-weight -1", "--logit-kl-weight -1"),
        ("--block-mse-weight -1", "--block-mse-weight -1"),
        ("--wandb-log-final-artifact", "--wandb-log-final-artifact needs --wandb"),
        ("--tokens-per-step 0", "--tokens-per-step 0: must be at least 1"),
        ("--upload-to-hf", "--upload-to-hf needs a repository: give --hf-repo-id"),
        ("--hf-repo-id saes", "--hf-repo-id saes: not a repository"),
        ("--hf-dataset texts", "--hf-dataset texts: not a repository"),
    ],
)
def test_a_wrong_setting_is_named(
    options: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SAE_HF_REPO_ID", raising=False)
    with pytest.raises(SAEError) as error:
        cli.parse(RunConfig, "", options.split())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        "--device tpu",
        "--model-dtype int3",
        "--sae-type magic",
        "--tokk 3",
        "--topk x",
        "--tokens-per-step aut",
    ],
)
def test_an_unknown_option_or_choice_is_named(
    options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.parse(RunConfig, "", options.split())
    assert exit_.value.code == 2
    assert all(word in capsys.readouterr().err for word in options.split()[:1])


def test_tracking_and_publishing_take_their_defaults_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("WANDB_PROJECT", "WANDB_ENTITY", "SAE_HF_REPO_ID"):
        monkeypatch.delenv(name, raising=False)
    config = cli.parse(RunConfig, "", [])
    assert config.tracking.wandb_project == "sae-training"
    assert config.tracking.wandb_entity is None and config.publishing.hf_repo_id is None
    monkeypatch.setenv("WANDB_PROJECT", "p")
    monkeypatch.setenv("WANDB_ENTITY", "e")
    monkeypatch.setenv("SAE_HF_REPO_ID", "o/r")
    config = cli.parse(RunConfig, "", "--wandb-tags a b --wandb-notes n --wandb-group g".split())
    assert (config.tracking.wandb_project, config.tracking.wandb_entity) == ("p", "e")
    assert config.publishing.hf_repo_id == "o/r"
    assert config.tracking.wandb_tags == ("a", "b")
    assert (config.tracking.wandb_notes, config.tracking.wandb_group) == ("n", "g")
    assert cli.parse(RunConfig, "", ["--wandb-project", "x"]).tracking.wandb_project == "x"


def test_defaults_are_those_that_the_design_names() -> None:
    config = cli.parse(RunConfig, "", [])
    expected = {
        "model_name": "Qwen/Qwen3-0.6B", "val_fraction": 0.1, "seed": 420, "device": "auto",
        "model_dtype": "auto", "hook_layer": None, "middle_layer_strategy": "lower",
        "hook_name": "hook_resid_post", "sae_type": "batch_topk", "sae_expansion": 4,
        "sae_dtype": "float32", "sparsity_penalty": 0.0, "topk": 128, "n_batches_to_dead": 200,
        "aux_penalty": 0.03125, "num_epochs": 10, "tokens_per_step": 4096, "batch_size": 8,
        "activation_batch_size": "auto", "max_text_length": 512, "lr": 1e-3, "recon_weight": 1,
        "log_freq": 100, "checkpoint_freq": 2, "early_stopping_patience": 2,
        "early_stopping_min_delta": 0, "use_end_to_end": True, "use_logit_kl": True,
        "use_block_mse": False, "logit_kl_weight": 1e-2, "block_mse_weight": 1e-3,
        "block_mse_layers": (), "end_to_end_fraction": 0.1, "wandb_mode": "online",
        "output_root": Path("sae_core/pretrained_models"),
        "checkpoint_root": Path("sae_core/checkpoints"),
    }  # fmt: skip
    found = {
        option.name: getattr(getattr(config, group.name), option.name)
        for group in fields(config)
        for option in fields(getattr(config, group.name))
        if is_dataclass(getattr(config, group.name))
    }
    assert expected.items() <= found.items()


def test_options_reads_back_what_it_writes(base: list[str]) -> None:
    argv = [*base, "--wandb-tags", "a b", "c", "--load-in-4bit", "--run-name", "it's"]
    config = cli.parse(RunConfig, "", argv)
    import shlex

    assert cli.parse(RunConfig, "", shlex.split(cli.options(config))) == config
    assert cli.options(cli.parse(RunConfig, "", [])) == ""
