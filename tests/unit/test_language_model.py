"""Activations, splices and restarts against TransformerLens, for four families of models."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from families import FAMILIES, LACKING, NAMES, OTHERS, hooks_of
from tiny_model import N_LAYERS, VOCABULARY, WIDTH, configuration, make_tiny_model
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from sae_core.models.language_model import (
    Hook,
    LanguageModel,
    resume_point,
)
from sae_core.train_config import ModelConfig
from sae_core.utils.errors import SAEError

CPU = torch.device("cpu")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


class Pair(NamedTuple):
    """One model on disk, loaded twice."""

    model: LanguageModel
    bridge: TransformerBridge
    tokens: Tensor


@pytest.fixture(scope="module", params=FAMILIES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> Pair:
    folder = make_tiny_model(tmp_path_factory.mktemp("m") / "m", " ".join(texts), request.param)
    model = LanguageModel.load(ModelConfig(model_name=str(folder), model_dtype="float32"), CPU)
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)
    draw = torch.Generator().manual_seed(1)
    return Pair(model, bridge, torch.randint(2, VOCABULARY, (2, 9), generator=draw))


def blocks(model: LanguageModel) -> nn.ModuleList:
    inner = model.model
    return inner.transformer.h if hasattr(inner, "transformer") else inner.model.layers


@pytest.fixture(autouse=True)
def leaves_no_trace(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test does, the model is afterwards as it was."""

    def state(model: nn.Module) -> list[Any]:
        return [
            (list(m._forward_hooks), list(m._forward_pre_hooks), "forward" in m.__dict__)
            for m in model.modules()
        ]

    if "pair" not in request.fixturenames:
        yield
        return
    model = request.getfixturevalue("pair").model.model
    before = state(model)
    yield
    assert state(model) == before


def random_value(pair: Pair) -> Tensor:
    draw = torch.Generator().manual_seed(2)
    return 3 * torch.randn(*pair.tokens.shape, WIDTH, generator=draw)


# Reading


def test_activations_equal_transformer_lens(pair: Pair) -> None:
    hooks = [Hook(layer, name) for layer in range(N_LAYERS) for name in NAMES]
    found = pair.model.activations(pair.tokens, hooks)
    _, cache = pair.bridge.run_with_cache(pair.tokens)
    assert set(found) == set(hooks)
    for hook in hooks:
        torch.testing.assert_close(found[hook], cache[hook.spec], **CLOSE)
        assert torch.equal(pair.model.activations(pair.tokens, [hook])[hook], found[hook])


def test_only_what_is_needed_runs(pair: Pair) -> None:
    """Once, up to the last hook; and a restart skips what lies before it."""
    ran: list[int] = []

    def note(index: int) -> Any:
        return lambda *_: ran.append(index)

    watched = [block.mlp for block in blocks(pair.model)]
    watched.append(pair.model.model.get_output_embeddings())
    handles = [m.register_forward_pre_hook(note(i)) for i, m in enumerate(watched)]
    pair.model.activations(pair.tokens, [Hook(2, "hook_attn_out"), Hook(0, "hook_resid_post")])
    assert ran == [0, 1]
    ran.clear()
    _, clean = pair.model.logits(pair.tokens, [Hook(2, "hook_resid_pre")])
    assert ran == [0, 1, 2, 3, N_LAYERS]
    for name, expected in (("hook_mlp_out", [2, 3, N_LAYERS]), ("hook_resid_post", [3, N_LAYERS])):
        ran.clear()
        hook = Hook(2, name)
        pair.model.resume(pair.tokens, clean[resume_point(hook)], hook, random_value(pair))
        assert ran == expected
    for handle in handles:
        handle.remove()


def test_logits_are_the_models(pair: Pair) -> None:
    hooks = [Hook(1, "hook_resid_mid"), Hook(3, "hook_resid_post")]
    logits, found = pair.model.logits(pair.tokens, hooks)
    with torch.no_grad():
        assert torch.equal(logits, pair.model.model(pair.tokens).logits)
    torch.testing.assert_close(logits, pair.bridge(pair.tokens), **CLOSE)
    for hook, value in pair.model.activations(pair.tokens, hooks).items():
        assert torch.equal(found[hook], value)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_logits_of_some_rows_are_the_models(family: str) -> None:
    torch.manual_seed(0)
    config = OTHERS[family] if family in OTHERS else configuration(family)
    model = LanguageModel(AutoModelForCausalLM.from_config(config), tokenizer=None)
    if family == "gemma2":  # its logits are capped at 30
        model.model.get_output_embeddings().weight.data.mul_(100)
    tokens = torch.arange(14).view(2, 7)
    with torch.no_grad():
        expected = model.model(tokens).logits
    hidden, _ = model.hidden(tokens)
    torch.testing.assert_close(model.unembed(hidden), expected)
    torch.testing.assert_close(model.unembed(hidden[1, 2:5]), expected[1, 2:5])
    assert "forward" not in model._base.__dict__
    rows = hidden[0].requires_grad_()
    [gradient] = torch.autograd.grad(model.unembed(rows)[:, 3].sum(), rows)
    assert gradient.abs().sum() > 0


# Resuming


@pytest.mark.parametrize("layer", [0, 2, N_LAYERS - 1])
@pytest.mark.parametrize("name", NAMES)
def test_resume_with_the_clean_activation_is_the_clean_pass(
    pair: Pair, name: str, layer: int
) -> None:
    hook, last = Hook(layer, name), Hook(N_LAYERS - 1, "hook_resid_post")
    logits, found = pair.model.logits(pair.tokens, [hook, resume_point(hook), last])
    again = pair.model.resume(pair.tokens, found[resume_point(hook)], hook, found[hook], [last])
    torch.testing.assert_close(again[0], logits, **CLOSE)
    torch.testing.assert_close(again[1][last], found[last], **CLOSE)


@pytest.mark.parametrize("layer", [0, 2, N_LAYERS - 1])
@pytest.mark.parametrize("name", NAMES)
def test_resume_with_another_activation(pair: Pair, name: str, layer: int) -> None:
    hook, value = Hook(layer, name), random_value(pair)
    clean, found = pair.model.logits(pair.tokens, [resume_point(hook)])
    later = [Hook(at, "hook_resid_post") for at in range(layer + 1, N_LAYERS)]
    logits, spliced = pair.model.resume(pair.tokens, found[resume_point(hook)], hook, value, later)
    if name == "hook_resid_mid":
        expected, cache = resume_at_mid_block(pair, layer, value), {}
    else:
        replace = [(hook.spec, lambda *_, **__: value)]
        with pair.bridge.hooks(fwd_hooks=replace):
            expected, cache = pair.bridge.run_with_cache(pair.tokens)
    torch.testing.assert_close(logits, expected, **CLOSE)
    # what goes into a random MLP does little
    assert (logits - clean).abs().max() > (0.01 if name == "mlp.hook_in" else 0.1)
    assert set(spliced) == set(later)
    for point in later if cache else []:
        torch.testing.assert_close(spliced[point], cache[point.spec], **CLOSE)


@torch.no_grad()
def resume_at_mid_block(pair: Pair, layer: int, value: Tensor) -> Tensor:
    """Logits when the block gives `value + MLP(norm(value))`."""
    block = blocks(pair.model)[layer]
    if hasattr(block, "ln_2"):
        given = value + block.mlp(block.ln_2(value))
    elif hasattr(block, "pre_feedforward_layernorm"):
        inner = block.mlp(block.pre_feedforward_layernorm(value))
        given = value + block.post_feedforward_layernorm(inner)
    else:
        given = value + block.mlp(block.post_attention_layernorm(value))

    def replace(_: Any, args: Any, output: Any) -> Any:
        return (given, *output[1:]) if isinstance(output, tuple) else given

    handle = block.register_forward_hook(replace)
    logits = pair.model.model(pair.tokens).logits
    handle.remove()
    return logits


@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_to_the_replacement_alone(pair: Pair, name: str) -> None:
    hook = Hook(1, name)
    _, found = pair.model.logits(pair.tokens, [resume_point(hook)])
    residual, value = found[resume_point(hook)], random_value(pair).requires_grad_()

    def loss(value: Tensor) -> Tensor:
        logits, _ = pair.model.resume(pair.tokens, residual, hook, value)
        return torch.log_softmax(logits, -1)[..., 5].sum()

    loss(value).backward()
    assert all(p.grad is None for p in pair.model.model.parameters())
    along = value.grad / value.grad.norm()
    with torch.no_grad():  # the slope along the gradient is its length
        slope = (loss(value + 0.1 * along) - loss(value - 0.1 * along)) / 0.2
    assert float(slope) == pytest.approx(float(value.grad.norm()), rel=0.05)


@pytest.mark.parametrize("hooks", [[], [Hook(1, "hook_resid_post")]])
def test_failed_pass_leaves_no_hook_behind(pair: Pair, hooks: list[Hook]) -> None:
    beyond = torch.full((1, 4), VOCABULARY + 5)
    residual = torch.zeros(1, 4, WIDTH)
    for call in (
        lambda: pair.model.activations(beyond, hooks or [Hook(0, "hook_mlp_out")]),
        lambda: pair.model.logits(beyond, hooks),
        lambda: pair.model.resume(beyond, residual, Hook(2, "hook_resid_mid"), residual, hooks),
    ):
        with pytest.raises(IndexError):
            call()
    assert pair.model.logits(pair.tokens)[0].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_replacement_in_another_number_format(
    name: str, tiny_model: Path, language_model: LanguageModel
) -> None:
    """A float32 reconstruction goes into a bfloat16 model."""
    config = ModelConfig(model_name=str(tiny_model), model_dtype="bfloat16")
    half, tokens, hook = LanguageModel.load(config, CPU), torch.arange(12)[None], Hook(1, name)
    residual = half.activations(tokens, [resume_point(hook)])[resume_point(hook)]
    value = torch.randn(1, 12, WIDTH, generator=torch.Generator().manual_seed(3))
    logits, _ = half.resume(tokens, residual, hook, value)
    expected, _ = language_model.resume(tokens, residual.float(), hook, value)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).norm() < 0.05 * expected.norm()


# Other families


def tiny(family: str) -> LanguageModel:
    """A random model, its biases too."""
    torch.manual_seed(0)
    config = OTHERS[family] if family in OTHERS else configuration(family)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    return LanguageModel(model, tokenizer=None)


TOKENS = torch.arange(14).view(2, 7)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_residual_stream_adds_up(family: str) -> None:
    """In every layer, for the hooks that are offered."""
    model = tiny(family)
    assert model.hook_names == hooks_of(family)
    for layer in range(model.n_layers):
        hooks = [Hook(layer, name) for name in model.hook_names]
        x = {hook.hook_name: value for hook, value in model.activations(TOKENS, hooks).items()}
        assert {value.shape for value in x.values()} == {(2, 7, WIDTH)}
        pre, post = x["hook_resid_pre"], x["hook_resid_post"]
        if family in ("falcon", "gpt_neox"):
            torch.testing.assert_close(pre + x["hook_attn_out"] + x["hook_mlp_out"], post)
        if {"hook_resid_mid", "hook_attn_out"} <= set(x):
            torch.testing.assert_close(pre + x["hook_attn_out"], x["hook_resid_mid"])
            torch.testing.assert_close(x["hook_resid_mid"] + x["hook_mlp_out"], post)
        assert family == "granite" or "hook_attn_out" in x


@pytest.mark.parametrize("family", sorted(LACKING))
def test_hook_that_is_not_offered_is_refused(family: str) -> None:
    model = tiny(family)
    for name in LACKING[family]:
        with pytest.raises(SAEError, match=f"--hook-name {name}: {type(model.model).__name__}"):
            model.activations(TOKENS, [Hook(1, name)])


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family in OTHERS for name in hooks_of(family)]
)
def test_other_families_resume_too(family: str, name: str) -> None:
    """Also with one value for all tokens, at one place in memory: some blocks add in place."""
    model, hook = tiny(family), Hook(1, name)
    logits, found = model.logits(TOKENS, [hook, resume_point(hook)])
    residual, clean = found[resume_point(hook)], found[hook]
    mean = clean.mean((0, 1)).expand_as(clean)
    before = residual.clone(), clean.clone()
    again, _ = model.resume(TOKENS, residual, hook, clean)
    torch.testing.assert_close(again, logits, **CLOSE)
    spliced, _ = model.resume(TOKENS, residual, hook, mean)
    assert torch.equal(model.resume(TOKENS, residual, hook, mean.contiguous())[0], spliced)
    assert torch.equal(residual, before[0]) and torch.equal(clean, before[1])
    other, _ = model.resume(TOKENS, residual, hook, clean.flip(-1))
    assert not torch.allclose(other, logits, atol=1e-3)


def test_model_adds_to_a_copy_of_what_it_is_given() -> None:
    """Blocks and the head that change their input in place do not change the caller's tensors."""
    model = tiny("bloom")
    hidden, found = model.hidden(TOKENS, [Hook(1, "hook_resid_pre")])
    given = found[Hook(1, "hook_resid_pre")]
    kept = hidden.clone(), given.clone()
    for module in (model._blocks[1], model.model.lm_head):
        module.register_forward_pre_hook(lambda _, args: (args[0].add_(1), None)[1])
    model.unembed(hidden)
    model.resume(TOKENS, given, Hook(0, "hook_resid_post"), given)
    model.resume(TOKENS, given, Hook(1, "hook_resid_pre"), given)
    assert torch.equal(hidden, kept[0]) and torch.equal(given, kept[1])
