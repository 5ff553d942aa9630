"""On a GPU no sum depends on the order in which threads come: the same bytes every time.

`test_bfloat16.py` looks at trainings of all kinds, `tests/workflow/test_on_a_gpu.py` at commands.
"""

from typing import Any

import pytest
import torch
from ordered_sums import OrderedSums, raises_of
from pretend_gpu import GPU, PretendGPU, _move_module
from synthetic import normal
from tiny_model import VOCABULARY, configuration
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from sae_core.evaluation.tally import Tally
from sae_core.models import ordered_attention
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.models.ordered_attention import OrderedAttention
from sae_core.sae.sparse_ops import sparse

INDEX = torch.tensor([0, 2, 2, 1])
ROWS = torch.ones(4)


def gradient_of(f: Any, *shape: int) -> None:
    f(torch.ones(shape, requires_grad=True)).sum().backward()


def attention(x: Tensor) -> Tensor:
    return scaled_dot_product_attention(x, x, x, is_causal=True)


UNORDERED = {
    "index_add_": lambda: torch.zeros(3).index_add_(0, INDEX, ROWS),
    "scatter_add": lambda: torch.zeros(3).scatter_add(0, INDEX, ROWS),
    "scatter_reduce": lambda: torch.zeros(3).scatter_reduce(0, INDEX, ROWS, "sum"),
    "a weighted bincount": lambda: torch.bincount(INDEX, ROWS),
    "cumsum": lambda: ROWS.cumsum(0),
    "the gradient of gather": lambda: gradient_of(lambda x: x.gather(0, INDEX), 3),
    "the gradient of attention": lambda: gradient_of(attention, 1, 2, 8, 8),
}

ORDERED = {
    "integers": lambda: torch.zeros(3).long().index_add_(0, INDEX, INDEX),
    "the largest": lambda: torch.zeros(3).scatter_reduce(0, INDEX, ROWS, "amax"),
    "counts": lambda: torch.bincount(INDEX),
    "sums of rows": lambda: torch.ones(3, 4).cumsum(0),
    "the gradient of an index": lambda: gradient_of(lambda x: x[INDEX], 3),
    "attention": lambda: attention(torch.ones(1, 2, 8, 8)),
}


@pytest.mark.parametrize("name", [*UNORDERED, *ORDERED])
def test_what_has_no_order_is_noticed(name: str) -> None:
    assert raises_of((UNORDERED | ORDERED)[name]) == (name in UNORDERED)


@pytest.mark.parametrize("n_subjects", [0, 3])
def test_features_are_counted_in_an_order(n_subjects: int) -> None:
    """And as on a CPU: three batches of windows, with repeated features."""
    code = normal(12, 10, 7).float().relu()
    outlier = torch.rand(12, 10, generator=torch.Generator().manual_seed(0)) < 0.1
    subject = torch.arange(120).view(12, 10) % 3 if n_subjects else None

    def counted(device: torch.device) -> Tally:
        tally = Tally(7, n_subjects, top=2, context=3, device=device)
        for first in range(0, 12, 4):
            at = slice(first, first + 4)
            given = sparse([code[at].flatten(0, 1).clone().to(device)]), outlier[at].to(device)
            tally.add(*given, None if subject is None else subject[at].to(device))
        return tally.cpu()

    right = counted(torch.device("cpu"))
    with PretendGPU(), OrderedSums():
        found = counted(GPU)
    assert right.count.min() > 1
    for name, value in vars(right).items():
        if isinstance(value, Tensor):
            assert value.any() or value.numel() == 0
            torch.testing.assert_close(getattr(found, name).as_subclass(Tensor), value)


@pytest.mark.parametrize("masks", [0, 1, 3], ids=["causal", "one mask", "a mask each"])
@pytest.mark.parametrize("scores", [1, 2 * 4 * 6 * 6])
def test_attention_has_its_value_and_gradient(
    scores: int, masks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three texts, one or two at a time, with two queries a key (grouped), beside PyTorch's."""
    monkeypatch.setattr(ordered_attention, "SCORES", scores)
    given = [normal(3, heads, 6, 4, seed=heads).requires_grad_() for heads in (4, 2, 2)]
    mask = normal(masks, 1, 6, 6) > -0.5 if masks else None
    options: Any = {"enable_gqa": True, "is_causal": mask is None, "attn_mask": mask}

    def results() -> list[Tensor]:
        out = scaled_dot_product_attention(*given, **options)
        return [out, *torch.autograd.grad(out.pow(3).sum(), given)]

    right = results()
    with OrderedAttention(), OrderedSums():
        found = results()
    assert torch.equal(found[0], right[0]) and "Ordered" in type(found[0].grad_fn).__name__
    torch.testing.assert_close(found, right)
    with OrderedAttention(), torch.no_grad():
        assert torch.equal(scaled_dot_product_attention(*given, **options), right[0])


def test_the_gradient_through_a_language_model_has_an_order() -> None:
    """That of its fused attention has none. It is the same gradient."""
    net = AutoModelForCausalLM.from_config(configuration("qwen3")).double()
    tokens = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    residual, hook = normal(2, 9, net.config.hidden_size), Hook(0, "hook_resid_post")

    def gradient(model: LanguageModel, x: Tensor, tokens: Tensor) -> Tensor:
        hidden, _ = model.resume_hidden(tokens, x, hook, x.requires_grad_())
        return torch.autograd.grad(hidden.pow(3).sum(), x)[0]

    on_cpu = LanguageModel(net, tokenizer=None)
    right = gradient(on_cpu, residual.clone(), tokens)
    assert raises_of(lambda: gradient(on_cpu, residual.clone(), tokens))
    with PretendGPU():
        there = LanguageModel(_move_module(net, GPU), tokenizer=None)
        with OrderedSums():
            found = gradient(there, residual.to(GPU), tokens.to(GPU))
    torch.testing.assert_close(found.cpu().as_subclass(Tensor), right)
