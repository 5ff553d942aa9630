"""End-to-end losses against plain PyTorch in float64: values, gradients, memory, balance."""

import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from families import NAMES
from largest_tensor import LargestTensor
from synthetic import normal
from tiny_model import N_LAYERS, VOCABULARY, configuration
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from sae_core.models.language_model import Hook, LanguageModel
from sae_core.sae import kl_kernel, losses
from sae_core.sae.losses import unembedded_kl
from sae_core.train_config import EndToEndConfig
from sae_core.trainer.end_to_end import EndToEnd, later_layers
from sae_core.utils.errors import SAEError

POST = Hook(1, "hook_resid_post")
LENGTH, N_WINDOWS = 9, 5
CLOSE = {"rtol": 1e-5, "atol": 1e-8}
"""The model computes in float64, the KL's sums and the layers' errors in float32."""


# The KL of logits that are never all there


def softcapped(hidden: Tensor, W: Tensor) -> Tensor:
    return 3 * torch.tanh(hidden @ W / 3)


def plain_kl(clean_logits: Tensor, spliced_logits: Tensor) -> Tensor:
    p, q = F.softmax(clean_logits, -1), F.softmax(spliced_logits, -1)
    return (p * (p / q).log()).sum()


@pytest.mark.parametrize("rows", [1, 7, 30, 1000])
def test_chunked_kl_equals_the_plain_formula(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "LOGIT_ROWS", rows)
    W, clean = normal(6, 50), normal(30, 6, seed=2)
    spliced = (clean + 0.3 * normal(30, 6, seed=3)).requires_grad_()
    found = unembedded_kl(lambda h: softcapped(h, W), clean, spliced)
    expected = plain_kl(softcapped(clean, W), softcapped(spliced, W))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(5 * kl, spliced)[0] for kl in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(unembedded_kl(lambda h: softcapped(h, W), clean, spliced), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_tokens_at_a_time_give_the_same_bytes(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean, spliced = normal(30, 50).to(dtype), normal(30, 50, seed=2).to(dtype)
    kl, gradient = losses.kl_of_logits(clean.clone(), spliced, True)
    sizes, at_once = [], losses.kl_of_logits

    def noted(clean: Tensor, *rest: Any) -> Any:
        sizes.append(len(clean))
        return at_once(clean, *rest)

    monkeypatch.setattr(losses, "CACHED_LOGITS", 200)
    monkeypatch.setattr(losses, "kl_of_logits", noted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    alone, none = losses.kl_in_cache(clean.clone(), spliced, False)
    found, its_gradient = losses.kl_in_cache(clean, spliced, True)
    assert sizes == 2 * [8, 8, 8, 6]
    assert torch.equal(alone, kl) and torch.equal(found, kl) and none is None
    assert gradient is not None and its_gradient is not None
    assert torch.equal(its_gradient, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_the_kernel_gives_the_kl_and_its_gradient(
    dtype: torch.dtype, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several blocks, the last one not full, and with logits whose exponentials overflow."""
    monkeypatch.setattr(kl_kernel, "BLOCK", 16)
    given = scale * normal(9, 50), scale * (normal(9, 50) + 0.2 * normal(9, 50, seed=2))
    clean, spliced = (logits.to(dtype) for logits in given)
    a, b = clean.double().log_softmax(-1), spliced.double().log_softmax(-1)
    expected = (a.exp() * (a - b)).sum(-1), b.exp() - a.exp()
    found, none = kl_kernel.kl_of_logits(clean.clone(), spliced, False)
    assert none is None
    kl, gradient = kl_kernel.kl_of_logits(clean, spliced, True)
    assert torch.equal(kl, found) and gradient is not None and gradient.dtype == dtype
    torch.testing.assert_close(kl.double(), expected[0], rtol=1e-5, atol=1e-5 * scale)
    rounded = 2**-7 if dtype == torch.bfloat16 else 1e-5  # Triton's interpreter cuts
    torch.testing.assert_close(gradient.double(), expected[1], rtol=rounded, atol=1e-6 * scale)


def test_the_loss_with_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "has_kernels", lambda device: True)
    monkeypatch.setattr(losses, "KERNEL_ROWS", 7)
    W, clean = normal(6, 50).float(), normal(30, 6, seed=2).float()
    spliced = (clean + 0.3 * normal(30, 6, seed=3).float()).requires_grad_()
    found = unembedded_kl(lambda h: softcapped(h, W), clean, spliced)
    twin = spliced.detach().double().requires_grad_()
    right = plain_kl(softcapped(clean.double(), W.double()), softcapped(twin, W.double()))
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=0)
    [gradient], [wanted] = torch.autograd.grad(found, spliced), torch.autograd.grad(right, twin)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-6)


def test_kl_runs_from_the_clean_to_the_spliced_model() -> None:
    """KL(p || q) of p = (3/4, 1/4) and q = (1/2, 1/2), which is not KL(q || p)."""
    clean, spliced = torch.tensor([[3.0, 1.0]]).log(), torch.zeros(1, 2)
    found = unembedded_kl(lambda h: h, clean, spliced)
    assert float(found) == pytest.approx(0.75 * math.log(1.5) - 0.25 * math.log(2))


def test_all_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    n, vocabulary, rows = 256, 2000, 16
    monkeypatch.setattr(losses, "LOGIT_ROWS", rows)
    W = normal(8, vocabulary)
    clean, spliced = normal(n, 8, seed=2), normal(n, 8, seed=3).requires_grad_()
    with LargestTensor() as plain:
        plain_kl(clean @ W, spliced @ W).backward()
    assert plain.entries >= n * vocabulary
    with LargestTensor() as ours:
        unembedded_kl(lambda h: h @ W, clean, spliced).backward()
    assert ours.entries <= rows * vocabulary


# The losses of a splice


class Case(NamedTuple):
    """A model in float64, windows, and reconstructions of what is not left out."""

    model: LanguageModel
    windows: Tensor
    hook: Hook
    max_norm: float

    def losses(self, batch_size: int = 2, **config: Any) -> EndToEnd:
        settings = EndToEndConfig(**{"end_to_end_fraction": 1.0, **config})
        windows: Any = SimpleNamespace(length=self.windows.shape[1], excluded=())
        return EndToEnd(self.model, windows, self.hook, settings, batch_size)


def make_case(family: str = "qwen3", hook: Hook = POST) -> Case:
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(configuration(family)).double()
    with torch.no_grad():
        net.get_input_embeddings().weight.mul_(20)
    model = LanguageModel(net, tokenizer=None)
    tokens = torch.randint(VOCABULARY, (N_WINDOWS, LENGTH), generator=torch.Generator())
    norms = model.activations(tokens, [hook])[hook].norm(dim=-1)
    return Case(model, tokens, hook, float(norms[:, 1:].quantile(0.9)))


def plain(case: Case, x_hat: Tensor, layers: list[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """The KL and the layers' errors from two whole passes with forward hooks."""
    site, blocks = case.model.site(case.hook), case.model._blocks
    start = Hook(case.hook.layer, case.hook.hook_name)
    x = case.model.activations(case.windows, [start])[start]
    kept = x.norm(dim=-1) <= case.max_norm
    kept[:, 0] = False
    value = x.masked_scatter(kept[..., None], x_hat)

    def run(splice: bool) -> tuple[Tensor, list[Tensor]]:
        outputs: list[Tensor] = []

        def first(output: Any) -> Tensor:
            return output[0] if isinstance(output, tuple) else output

        def new(_: nn.Module, args: Any, output: Any) -> Any:
            return (value, *output[1:]) if isinstance(output, tuple) else value

        handles = [
            b.register_forward_hook(lambda _, a, o: outputs.append(first(o))) for b in blocks
        ]
        if splice:
            handles.append(site.module.register_forward_hook(new, prepend=True))
        log_p = torch.log_softmax(case.model.model(case.windows).logits, -1)
        for handle in handles:
            handle.remove()
        return log_p, outputs

    (clean, before), (spliced, after) = run(False), run(True)
    kl = (clean.exp() * (clean - spliced)).sum(-1)[:, 1:].mean()
    errors = {layer: (after[layer] - before[layer])[kept].pow(2).mean() for layer in layers}
    return kl, errors


def reconstructions(case: Case, losses: EndToEnd) -> tuple[list[Any], Tensor]:
    passes = losses.clean(case.windows, case.max_norm)
    x = torch.cat([part.x[part.kept] for part in passes])
    noise = normal(*x.shape, seed=4)
    return passes, (x + 0.3 * x.norm() / noise.norm() * noise).requires_grad_()


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("batch_size", [1, 2, 100])
@pytest.mark.parametrize("hook_name", ["hook_attn_out", "hook_mlp_out", "hook_resid_post"])
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt2"])
def test_losses_equal_a_plain_computation(family: str, hook_name: str, batch_size: int) -> None:
    case = make_case(family, Hook(1, hook_name))
    ours = case.losses(batch_size, use_block_mse=True, logit_kl_weight=0.7, block_mse_weight=0.2)
    passes, x_hat = reconstructions(case, ours)
    assert 0 < sum(part.n_outliers for part in passes) < 0.2 * N_WINDOWS * LENGTH
    loss, figures = ours.loss(passes, x_hat)
    first = 2 if hook_name == "hook_resid_post" else 1
    kl, errors = plain(case, x_hat, list(range(first, N_LAYERS)))
    total = sum(errors.values())
    expected = {
        "logit_kl": kl,
        "kl_contribution": 0.7 * kl,
        "total_post_layer_mse": total,
        "block_mse_contribution": 0.2 * total,
        **{f"{layer}_mse": error for layer, error in errors.items()},
    }
    assert {n: float(v) for n, v in figures.items()} == pytest.approx(
        {n: v.item() for n, v in expected.items()}, rel=1e-5
    )
    assert loss.item() == pytest.approx((0.7 * kl + 0.2 * total).item(), rel=1e-5)
    gradients = [torch.autograd.grad(2 * g, x_hat)[0] for g in (loss, 0.7 * kl + 0.2 * total)]
    torch.testing.assert_close(*gradients, **CLOSE)
    assert all(p.grad is None for p in case.model.model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_clean_activation_loses_nothing(name: str) -> None:
    case = make_case(hook=Hook(2, name))
    ours = case.losses(use_block_mse=True)
    passes, _ = reconstructions(case, ours)
    x = torch.cat([part.x[part.kept] for part in passes])
    _, figures = ours.loss(passes, x)
    assert all(abs(float(value)) < 1e-6 for value in figures.values())


def test_a_term_that_is_not_used_is_not_computed() -> None:
    case = make_case()
    for config, names in (
        ({}, {"logit_kl", "kl_contribution"}),
        (
            {"use_logit_kl": False, "use_block_mse": True, "block_mse_layers": (3,)},
            {"3_mse", "total_post_layer_mse", "block_mse_contribution"},
        ),
    ):
        ours = case.losses(**config)
        _, figures = ours.loss(*reconstructions(case, ours))
        assert set(figures) == names


def test_windows_times_vocabulary_never_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "LOGIT_ROWS", 4)
    case = make_case()
    with LargestTensor() as memory:
        ours = case.losses(batch_size=5)
        ours.loss(*reconstructions(case, ours))[0].backward()
    weights = max(p.numel() for p in case.model.model.parameters())
    assert memory.entries <= weights < N_WINDOWS * LENGTH * VOCABULARY


# The balance


@pytest.mark.parametrize(("kl_weight", "mse_weight"), [(1e-2, 1e-3), (3e-2, 5e-4)])
def test_balanced_terms_pull_in_proportion_to_their_weights(
    kl_weight: float, mse_weight: float
) -> None:
    case = make_case()
    weights = {"logit_kl_weight": kl_weight, "block_mse_weight": mse_weight}
    for config, ratio in (
        ({}, kl_weight / 1e-2),
        ({"use_logit_kl": False, "use_block_mse": True}, mse_weight / 1e-3),
    ):
        ours = case.losses(**config, **weights)
        passes, x_hat = reconstructions(case, ours)
        ours.balance(passes, x_hat, pull=0.25)
        [gradient] = torch.autograd.grad(ours.loss(passes, x_hat)[0], x_hat)
        assert float(gradient.norm()) == pytest.approx(0.25 * ratio, rel=1e-5)


def test_balancing_two_terms_is_balancing_each() -> None:
    case = make_case()
    both = case.losses(use_block_mse=True)
    passes, x_hat = reconstructions(case, both)
    both.balance(passes, x_hat, pull=0.25)
    for config in ({}, {"use_logit_kl": False, "use_block_mse": True}):
        one = case.losses(**config)
        one.balance(reconstructions(case, one)[0], x_hat, pull=0.25)
        [(name, weight)] = one.weights.items()
        assert both.weights[name] == pytest.approx(weight)


def test_a_splice_that_changes_nothing_gets_no_weight() -> None:
    case = make_case()
    ours = case.losses()
    with torch.no_grad():
        case.model.model.get_output_embeddings().weight.zero_()
    ours.balance(*reconstructions(case, ours), pull=1.0)
    assert ours.weights == {"logit_kl": 0.0}


# A sample of the windows


@pytest.mark.parametrize("hook_name", ["hook_mlp_out", "hook_resid_post"])
def test_the_mean_of_all_samples_is_that_of_all_windows(hook_name: str) -> None:
    """Losses and gradients, of two samples of two windows each."""
    case = make_case(hook=Hook(1, hook_name))
    case = case._replace(windows=case.windows[:4], max_norm=math.inf)
    every, half = (case.losses(use_block_mse=True, end_to_end_stride=k) for k in (1, 2))
    passes, x_hat = reconstructions(case, every)
    loss, figures = every.loss(passes, x_hat)
    [gradient] = torch.autograd.grad(loss, x_hat)
    sampled, of_samples = torch.zeros_like(x_hat).view(4, LENGTH - 1, -1), []
    for first in (0, 1):
        order, spliced = torch.arange(4).roll(-first), half.spliced(4)
        read, some = half.read(case.windows[order], spliced, math.inf)
        assert sum(part.n_tokens for part in read) == len(x_hat)
        rows = x_hat.detach().view_as(sampled)[order[spliced]].flatten(0, 1).requires_grad_()
        value, parts = half.loss(some, rows, n_batch=len(x_hat))
        [g] = torch.autograd.grad(value, rows)
        sampled[order[spliced]] += g.view(2, LENGTH - 1, -1) / 2
        of_samples.append(parts | {"loss": value.detach()})
    for name, expected in (figures | {"loss": loss.detach()}).items():
        found = sum(float(of_sample[name]) for of_sample in of_samples) / 2
        assert found == pytest.approx(float(expected), rel=1e-5), name
    assert of_samples[0]["logit_kl"] != of_samples[1]["logit_kl"]
    torch.testing.assert_close(sampled.flatten(0, 1), gradient, **CLOSE)


def test_a_sample_is_balanced_as_all_windows_are() -> None:
    """Of four equal windows."""
    case = make_case()
    case = case._replace(windows=case.windows[:1].expand(4, -1), max_norm=math.inf)
    every, half = (case.losses(use_block_mse=True, end_to_end_stride=k) for k in (1, 2))
    passes, x_hat = reconstructions(case, every)
    x_hat = x_hat.detach()[: LENGTH - 1].repeat(4, 1)
    every.balance(passes, x_hat, pull=0.25)
    _, some = half.read(case.windows, half.spliced(4), math.inf)
    half.balance(some, x_hat[: 2 * (LENGTH - 1)], pull=0.25, n_batch=len(x_hat))
    assert half.weights == pytest.approx(every.weights)


# Settings


@pytest.mark.parametrize(
    ("hook", "layers", "expected"),
    [
        (POST, (), [2, 3]),
        (Hook(1, "hook_resid_pre"), (), [1, 2, 3]),
        (Hook(1, "hook_mlp_out"), (3, 1, 3), [1, 3]),
        (POST, (1,), "--block-mse-layers 1: the layers after .* are 2 to 3"),
        (POST, (2, 4), "--block-mse-layers 4"),
        (Hook(3, "hook_resid_post"), (), "--use-block-mse: no layer comes after blocks.3."),
    ],
)
def test_layers_behind_the_hook(hook: Hook, layers: tuple[int, ...], expected: Any) -> None:
    config = EndToEndConfig(use_block_mse=True, block_mse_layers=layers)
    if isinstance(expected, list):
        assert later_layers(config, hook, N_LAYERS) == expected
    else:
        with pytest.raises(SAEError, match=expected):
            later_layers(config, hook, N_LAYERS)
    for off in (EndToEndConfig(), EndToEndConfig(use_block_mse=True, use_end_to_end=False)):
        assert later_layers(off, hook, N_LAYERS) == []
