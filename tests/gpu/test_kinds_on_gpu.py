"""Every kind of SAE, the KL of logits and attention's gradient on a real GPU: the same bytes every
time, and the numbers of float32 or of PyTorch up to roundings."""

import pytest
import torch

if not torch.cuda.is_available() or torch.version.cuda is None:
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from short_training import make_sae
from synthetic import KINDS, SparseDirections, normal
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sae_core.models.ordered_attention import OrderedAttention
from sae_core.sae import dense_ops, kl_kernel, losses
from sae_core.sae.precision import Precision
from sae_core.sae_base import Compute
from sae_core.train_config import TrainingConfig
from sae_core.trainer.events import Observer
from sae_core.training import Trainer

GPU = torch.device("cuda")
ROUNDED = Precision(torch.bfloat16, torch.bfloat16)


def trained(kind: str, precision: Precision | None) -> Trainer:
    training = Trainer(
        make_sae(kind, n_dead=9, aux_penalty=0.5).to(GPU),
        SparseDirections(),
        TrainingConfig(num_epochs=2, early_stopping_patience=0, lr=0.01),
        Observer(),
        Compute(precision=precision),
        stepping="ordinary",
    )
    for _ in training.train():
        pass
    return training


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "pairs"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bytes_in_bfloat16(
    kind: str, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense_ops, "DENSE_SHARE", 0.0 if dense else 1.0)
    first, second = (trained(kind, ROUNDED) for _ in range(2))
    assert first.history == second.history
    for name, tensor in first.state().tensors.items():
        assert torch.equal(second.state().tensors[name], tensor), name
    right = trained(kind, None).history
    for name in ("recon_loss", "val_recon_loss"):
        assert first.history[name] == pytest.approx(right[name], rel=0.05), name


def test_the_kl_of_logits() -> None:
    """Of a vocabulary as large as Qwen3's, which no block divides."""
    clean, spliced = (normal(64, 151_935, seed=s).to(GPU, torch.bfloat16) for s in (1, 2))
    right, gradient = losses.kl_of_logits(clean, spliced, True)
    for _ in range(2):
        found, its_gradient = kl_kernel.kl_of_logits(clean.clone(), spliced, True)
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(its_gradient, gradient, rtol=2**-7, atol=1e-7)


def test_the_gradient_of_attention() -> None:
    """Grouped and causal, as Qwen3's; fused attention gives it too, but not the same bytes."""
    given = query, key, value = [
        normal(2, heads, 512, 64, seed=heads).to(GPU, torch.bfloat16).requires_grad_()
        for heads in (16, 8, 8)
    ]

    def results() -> list[Tensor]:
        out = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return [out, *torch.autograd.grad(out.float().pow(2).sum(), given)]

    right = results()
    with OrderedAttention():
        first, second = results(), results()
    assert torch.equal(first[0], right[0])
    for found, again, expected in zip(first, second, right, strict=True):
        assert torch.equal(found, again)
        assert (found - expected).norm() < 0.02 * expected.norm()
