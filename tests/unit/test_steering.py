"""An SAE at work in its model: steering, reading a text; and the two commands."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_gpu import GPU, PretendGPU, _move_module
from running import ROOT, run_here
from steered import FEATURES, PROMPT, an_sae, ce, logits
from torch import Tensor
from transformers import AutoModelForCausalLM

from sae_core.evaluation.metrics import evaluate
from sae_core.formats.checkpoint import save_sae
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.models.model_sources import model_sha256
from sae_core.reporting.known_features import read_labels
from sae_core.reporting.text_page import visible
from sae_core.steering.continuation import Sampling, continuation, steered_continuations
from sae_core.steering.loading import load_pair
from sae_core.steering.reading import read_text
from sae_core.utils.errors import SAEError


def test_strength_0_changes_nothing(language_model: LanguageModel, tokens: Tensor) -> None:
    with torch.no_grad():
        clean = logits(language_model, tokens)
        with an_sae().steer(language_model, {3: 0.0, 9: 0.0}):
            assert torch.equal(logits(language_model, tokens), clean)
        with an_sae().steer(language_model, {3: 4.0}):
            assert not torch.equal(logits(language_model, tokens), clean)
        assert torch.equal(logits(language_model, tokens), clean)


@pytest.mark.parametrize("hook_name", ["hook_resid_post", "hook_resid_mid", "hook_mlp_out"])
def test_the_projection_on_a_row_moves_by_the_strength(
    hook_name: str, language_model: LanguageModel, tokens: Tensor
) -> None:
    sae, hook, strengths = an_sae(hook_name=hook_name), Hook(1, hook_name), {3: 4.0, 9: -2.5}
    clean = language_model.activations(tokens, [hook])[hook]
    with sae.steer(language_model, strengths):
        moved = language_model.activations(tokens, [hook])[hook] - clean
    row = sae.W_dec[3]
    wanted = 4.0 - 2.5 * float(sae.W_dec[9] @ row)
    torch.testing.assert_close((moved @ row)[:, 1:], torch.full((3, tokens.shape[1] - 1), wanted),
                               rtol=1e-4, atol=1e-4)  # fmt: skip
    assert not moved[:, 0].any()


def test_a_residual_in_mid_block_is_moved_past_the_mlp_too(
    language_model: LanguageModel, tokens: Tensor
) -> None:
    hook = Hook(1, "hook_resid_mid")
    before = hook._replace(hook_name="hook_resid_pre")
    sae = an_sae(hook_name=hook.hook_name)
    _, found = language_model.logits(tokens, [hook, before])
    value = found[hook].clone()
    value[:, 1:] += 6 * sae.W_dec[5]
    wanted, _ = language_model.resume(tokens, found[before], hook, value)
    with sae.steer(language_model, {5: 6.0}), torch.no_grad():
        torch.testing.assert_close(logits(language_model, tokens), wanted, rtol=1e-4, atol=1e-4)


def test_a_cache_changes_nothing(language_model: LanguageModel, tokens: Tensor) -> None:
    """Only a text's first token is left alone, not the first of each pass."""
    with an_sae().steer(language_model, {3: 8.0}), torch.no_grad():
        whole = logits(language_model, tokens)[:, -1]
        begun = language_model.model(tokens[:, :-1], use_cache=True)
        rest = language_model.model(tokens[:, -1:], past_key_values=begun.past_key_values)
    torch.testing.assert_close(rest.logits[:, -1], whole, rtol=1e-4, atol=1e-4)


def test_a_model_of_transformers(
    tiny_model: Path, language_model: LanguageModel, tokens: Tensor
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    with an_sae().steer(language_model, {3: 8.0}), torch.no_grad():
        wanted = logits(language_model, tokens)
    with an_sae().steer(plain, {3: 8.0}), torch.no_grad():
        torch.testing.assert_close(logits(plain, tokens), wanted)
    assert all(parameter.requires_grad for parameter in plain.parameters())


# Tokens on which the SAE was not trained


@pytest.fixture(scope="module")
def left_out(language_model: LanguageModel, tokens: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Where the most common tokens are, and the settings of an SAE whose training left them out."""
    common = torch.bincount(tokens[:, 1:].flatten()).argsort()[-6:]
    names = language_model.tokenizer.convert_ids_to_tokens(common.tolist())
    return torch.isin(tokens, common), {"metadata": {"excluded_tokens": names}}


@pytest.mark.parametrize("target", ["", "hook_mlp_out"])
def test_tokens_that_training_left_out_are_left_alone(
    target: str, left_out: Any, language_model: LanguageModel, tokens: Tensor
) -> None:
    out, settings = left_out
    assert 0.2 < out[:, 1:].float().mean() < 0.8
    where = {"hook_name": "mlp.hook_in" if target else "hook_resid_post"}
    sae = an_sae(target_hook_name=target, **where, **settings)
    with sae.spliced_into(language_model):
        spliced = ce(language_model, tokens)
    figures = evaluate(language_model, sae, tokens, 3)
    assert spliced == pytest.approx(figures["ce_sae"], rel=1e-5)
    place = Hook(1, target or "hook_resid_post")
    clean = language_model.activations(tokens, [place])[place]
    with sae.steer(language_model, {3: 8.0}):
        steered = language_model.activations(tokens, [place])[place]
    moved = (steered - clean).abs().amax(-1) > 1
    assert torch.equal(moved[:, 1:], ~out[:, 1:]) and not moved[:, 0].any()


def test_the_first_token_is_behind_the_padding(
    language_model: LanguageModel, tokens: Tensor
) -> None:
    """A text with padding on its left, as in a batch that continues, is moved as without it."""
    text, n = tokens[:1], 5
    padded = torch.cat([text.new_zeros(1, n), text], 1)
    mask = torch.ones_like(padded)
    mask[:, :n] = 0
    at = mask.cumsum(1).sub(1).clamp(min=0)
    for context in (
        an_sae().steer(language_model, {3: 8.0}),
        an_sae().spliced_into(language_model),
    ):
        with context, torch.no_grad():
            wanted = logits(language_model, text)
            options = {"attention_mask": mask, "position_ids": at}
            whole = language_model.model(padded, **options).logits[:, n:]
            cut = n + 1  # the second pass begins after the first token
            options = {name: value[:, :cut] for name, value in options.items()}
            begun = language_model.model(padded[:, :cut], use_cache=True, **options)
            rest = language_model.model(
                padded[:, cut:],
                attention_mask=mask,
                position_ids=at[:, cut:],
                past_key_values=begun.past_key_values,
            ).logits
        torch.testing.assert_close(whole, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rest, wanted[:, 1:], rtol=1e-4, atol=1e-4)


def test_a_model_of_transformers_needs_its_tokenizer_for_them(
    tiny_model: Path, left_out: Any, language_model: LanguageModel, tokens: Tensor
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    sae, tokenizer = an_sae(**left_out[1]), language_model.tokenizer
    with sae.spliced_into(language_model), torch.no_grad():
        wanted = logits(language_model, tokens)
    with sae.spliced_into(plain, tokenizer=tokenizer), torch.no_grad():
        torch.testing.assert_close(logits(plain, tokens), wanted)
        with pytest.raises(SAEError, match="input_ids"):
            plain(inputs_embeds=plain.get_input_embeddings()(tokens))
    with pytest.raises(SAEError, match="tokenizer="), sae.steer(plain, {3: 8.0}):
        pass


def test_a_text_shows_no_features_of_them(language_model: LanguageModel) -> None:
    whole = read_text(language_model, an_sae(), PROMPT, 3)
    [word] = language_model.tokenizer.convert_ids_to_tokens(
        language_model.tokenizer(PROMPT).input_ids
    )[2:3]
    sae = an_sae(metadata={"excluded_tokens": [word]})
    found = read_text(language_model, sae, PROMPT, 3)
    assert found[2] == whole[2]._replace(features=[], n_active=0) != whole[2]
    assert found[:2] + found[3:] == whole[:2] + whole[3:]


def test_the_same_seed_gives_the_same_continuations(language_model: LanguageModel) -> None:
    def written(seed: int) -> list[tuple[float, str]]:
        sampling = Sampling(n_tokens=12, temperature=1.0, seed=seed)
        return list(
            steered_continuations(an_sae(), language_model, PROMPT, [3], [0.0, 40.0], sampling)
        )

    state = torch.random.get_rng_state()
    first = written(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert written(1) == first != written(2)
    assert first[0] == first[1] and first[0][1] != first[2][1]
    likely = Sampling(n_tokens=12, temperature=0.0, seed=1)
    unseeded = likely._replace(seed=2)
    assert continuation(language_model, PROMPT, likely) == continuation(
        language_model, PROMPT, unseeded
    )


@pytest.mark.parametrize(
    ("sae", "strengths", "words"),
    [
        ({}, {FEATURES: 1.0}, f"0 to {FEATURES - 1}"),
        ({}, {-1: 1.0}, "feature -1"),
        ({}, {1.5: 1.0}, "feature 1.5"),
        ({}, {"1": 1.0}, "feature 1"),
        ({}, {1: float("nan")}, "strength nan"),
        ({"hook_layer": 9}, {1: 1.0}, "layers are 0 to 3"),
        ({"hook_name": "hook_nowhere"}, {1: 1.0}, "hook_nowhere"),
    ],
)
def test_what_cannot_be_steered(
    sae: dict[str, Any], strengths: dict[Any, float], words: str, language_model: LanguageModel
) -> None:
    with pytest.raises(SAEError, match=words), an_sae(**sae).steer(language_model, strengths):
        pass


def test_the_most_likely_token_follows_whatever_the_model_recommends(
    language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    recommended = language_model.model.generation_config
    monkeypatch.setattr(recommended, "repetition_penalty", 5.0)
    monkeypatch.setattr(recommended, "no_repeat_ngram_size", 1)
    tokens = language_model.tokenizer(PROMPT, return_tensors="pt").input_ids
    n_prompt = tokens.shape[1]
    with torch.no_grad():
        for _ in range(6):
            likely = logits(language_model, tokens)[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, likely], 1)
    wanted = language_model.tokenizer.decode(tokens[0, n_prompt:])
    assert continuation(language_model, PROMPT, Sampling(6, 0.0, 0)) == wanted


def test_what_cannot_be_continued(language_model: LanguageModel) -> None:
    with pytest.raises(SAEError, match="the prompt is empty"):
        continuation(language_model, "", Sampling(5, 0.0, 0))
    n_tokens = language_model.model.config.max_position_embeddings
    with pytest.raises(SAEError, match=f"--n-tokens {n_tokens}: .* the {n_tokens} that the model"):
        continuation(language_model, PROMPT, Sampling(n_tokens, 0.0, 0))
    sampling = Sampling(5, 1.0, 0)
    written = steered_continuations(an_sae(), language_model, PROMPT, [3], [1e39], sampling)
    assert next(written)[0] == 0
    with pytest.raises(SAEError, match="no longer finite: give --strengths nearer to 0"):
        next(written)


def test_what_cannot_be_steered_is_known_before_anything_is_written(
    language_model: LanguageModel,
) -> None:
    sampling = Sampling(5, 1.0, 0)
    written = steered_continuations(
        an_sae(), language_model, PROMPT, [3], [1.0, float("inf")], sampling
    )
    with pytest.raises(SAEError, match="strength inf"):
        next(written)


def test_a_pair_is_the_sae_with_the_model_that_it_was_trained_on(
    tmp_path: Path, tiny_model: Path
) -> None:
    sae = an_sae()
    for name, known in (("this", model_sha256(tiny_model)), ("other", "0" * 64)):
        sae.spec.metadata |= {"model_name": "m", "model_sha256": known}
        save_sae(tmp_path / name, sae, {})
    found, model = load_pair(str(tmp_path / "this"), str(tiny_model), device="cpu")
    assert torch.equal(found.W_dec, sae.W_dec) and model.n_layers == 4
    with pytest.raises(SAEError, match="--model-name .*: not the language model that .*other"):
        load_pair(str(tmp_path / "other"), str(tiny_model))
    for wrong in ("nowhere", "."):
        with pytest.raises(SAEError, match="--sae .*: no (such )?SAE directory"):
            load_pair(str(tmp_path / wrong), str(tiny_model))


def test_a_layer_may_be_on_another_device_than_the_sae(
    language_model: LanguageModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a model that is spread over several GPUs, of which the SAE is on the first."""
    found = []
    for device in (torch.device("cpu"), GPU):
        with PretendGPU() if device == GPU else nullcontext(), torch.no_grad():
            monkeypatch.setattr(torch.nn.Module, "to", _move_module)
            monkeypatch.setattr(language_model, "device", device)
            sae = an_sae()
            with (
                sae.spliced_into(language_model, keep_error=True),
                sae.steer(language_model, {3: 4.0}),
            ):
                found.append(logits(language_model, tokens))
            assert sae.b_dec.device == device
    torch.testing.assert_close(*found)


# Reading


def test_each_token_has_its_strongest_features(language_model: LanguageModel) -> None:
    sae, hook = an_sae(), Hook(1, "hook_resid_post")
    readings = read_text(language_model, sae, PROMPT, 3)
    ids = language_model.tokenizer(PROMPT).input_ids
    end = language_model.tokenizer.eos_token_id
    x = language_model.activations(torch.tensor([[end, *ids]]), [hook])[hook][0, 1:]
    features = sae.encode(x)
    assert "".join(reading.token for reading in readings) == PROMPT
    for reading, row in zip(readings, features, strict=True):
        values, numbers = row.topk(3)
        assert [n for n, _ in reading.features] == numbers.tolist()
        assert [v for _, v in reading.features] == pytest.approx(values.tolist())
        assert reading.n_active == (row > 0).sum()
    with pytest.raises(SAEError, match="empty"):
        read_text(language_model, sae, "", 3)


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" the\n", "␣the↵"),
        ("", "◌"),
        ("\u202e", "‹U+202E›"),
        ("\x1b[31m", "‹U+001B›[31m"),
        ("\ud83d", "‹U+D83D›"),
        ("👧é猫", "👧é猫"),
    ],
)
def test_nothing_of_a_token_is_invisible(token: str, shown: str) -> None:
    assert visible(token) == shown


def test_the_later_label_of_a_feature(tmp_path: Path) -> None:
    path, other = tmp_path / "run.jsonl", tmp_path / "other.jsonl"
    path.write_text('{"feature": 3, "label": "light"}\n{"feature": 5, "label": ""}\n')
    other.write_text('{"feature": 5, "label": "heat"}\n{"feature": 3, "label": null}\n')
    assert read_labels([path, other]) == {3: "light", 5: "heat"}
    path.write_text("[]\n")
    with pytest.raises(SAEError, match=r"run\.jsonl"):
        read_labels([path])


def test_the_commands(tmp_path: Path, tiny_model: Path) -> None:
    save_sae(tmp_path / "results/saes/run", an_sae(), {})
    labels = tmp_path / "results/features/run.jsonl"
    labels.parent.mkdir()
    lines = [json.dumps({"feature": n, "label": f"<label {n}>"}) for n in range(FEATURES)]
    labels.write_text("\n".join(lines) + "\n")
    (tmp_path / "results/features/run.html").touch()
    model = ("--sae", "run", "--model-name", tiny_model, "--device", "cpu")
    read = run_here(
        ROOT / "scripts/inspect_text.py", PROMPT, *model, "--page", "out.html", cwd=tmp_path
    ).stdout
    assert "<label " in read and "␣" in read
    page = (tmp_path / "out.html").read_text()
    assert "&lt;label " in page and "<label " not in page and str(tmp_path) not in page
    assert 'href="results/features/run.html#feature=' in page
    steer = (ROOT / "scripts/steer.py", PROMPT, *model, "--features", "3", "--n-tokens", "5")
    written = run_here(*steer, "--strengths", "-40", "40", cwd=tmp_path).stdout
    assert [f"== strength {n}" in written for n in ("0", "-40", "40", "5")] == [
        True, True, True, False
    ]  # fmt: skip
    assert run_here(*steer, "--strengths", "-40", "40", cwd=tmp_path).stdout == written
    refused = run_here(*steer, "--features", "64", cwd=tmp_path, ok=False)
    assert "0 to 63" in refused.stderr and "==" not in refused.stdout
