"""An SAE spliced into the model: the evaluation's cross-entropy, edits of features, gradients."""

import pytest
import torch
from steered import SITES, an_sae, ce, logits
from torch import Tensor

from sae_core.evaluation.metrics import evaluate
from sae_core.models.language_model import Hook, LanguageModel


@pytest.mark.parametrize("target", ["", "hook_mlp_out"])
def test_a_splice_has_the_cross_entropy_of_the_evaluation(
    target: str, language_model: LanguageModel, tokens: Tensor
) -> None:
    sae = an_sae(hook_name="mlp.hook_in" if target else "hook_resid_post", target_hook_name=target)
    clean = ce(language_model, tokens)
    with sae.spliced_into(language_model) as seen:
        spliced = ce(language_model, tokens)
    figures = evaluate(language_model, sae, tokens, 3)
    assert spliced == pytest.approx(figures["ce_sae"], rel=1e-5)
    assert abs(spliced - clean) > 1e-3
    assert ce(language_model, tokens) == clean
    hook = Hook(1, sae.spec.hook_name)
    x = language_model.activations(tokens, [hook])[hook]
    torch.testing.assert_close(seen.x, x)
    torch.testing.assert_close(seen.features, sae.encode(x))


@pytest.mark.parametrize("hook_name", SITES)
def test_a_splice_is_what_resume_makes_of_the_reconstruction(
    hook_name: str, language_model: LanguageModel, tokens: Tensor
) -> None:
    sae, hook = an_sae(hook_name=hook_name), Hook(1, hook_name)
    before = hook._replace(hook_name="hook_resid_pre")
    _, found = language_model.logits(tokens, [hook, before])
    value = torch.cat([found[hook][:, :1], sae(found[hook])[:, 1:]], 1)
    wanted, _ = language_model.resume(tokens, found[before], hook, value)
    with sae.spliced_into(language_model), torch.no_grad():
        torch.testing.assert_close(logits(language_model, tokens), wanted, rtol=1e-4, atol=1e-4)


def test_features_can_be_replaced_and_the_error_kept(
    language_model: LanguageModel, tokens: Tensor
) -> None:
    sae = an_sae()
    with torch.no_grad():
        clean = logits(language_model, tokens)
        with sae.spliced_into(language_model, keep_error=True):
            same = logits(language_model, tokens)
        with sae.spliced_into(language_model, replace=torch.zeros_like) as seen:
            logits(language_model, tokens)
    torch.testing.assert_close(same, clean, rtol=1e-4, atol=1e-4)
    assert seen.x_hat is not None
    torch.testing.assert_close(seen.x_hat, sae.b_dec.expand_as(seen.x_hat))


@pytest.mark.parametrize("keep_error", [False, True])
def test_gradients_flow_to_features_and_weights(
    keep_error: bool, language_model: LanguageModel, tokens: Tensor
) -> None:
    sae = an_sae()
    with sae.spliced_into(language_model, keep_error=keep_error) as seen:
        logits(language_model, tokens)[0, -1, 3].backward()
    assert seen.features is not None and seen.features.grad is not None
    assert seen.features.grad[0, 1:].any() and not seen.features.grad[:, 0].any()
    step, at = 1e-2, (0, 5, int(seen.features[0, 5].argmax()))

    def nudged(by: float) -> float:
        def add(features: Tensor) -> Tensor:
            features = features.clone()
            features[at] += by
            return features

        with sae.spliced_into(language_model, add, keep_error), torch.no_grad():
            return float(logits(language_model, tokens)[0, -1, 3])

    slope = (nudged(step) - nudged(-step)) / (2 * step)
    assert float(seen.features.grad[at]) == pytest.approx(slope, rel=0.05, abs=2e-4)
    trained = an_sae().requires_grad_()
    with trained.spliced_into(language_model):
        logits(language_model, tokens)[0, -1, 3].backward()
    assert trained.W_dec.grad is not None and trained.W_dec.grad.any()
