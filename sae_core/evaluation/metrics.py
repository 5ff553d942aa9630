"""The figures of one SAE on held-out windows, each with its formula.

Cross-entropies (nats per token, over the predictions of every token but a window's first): of the
model as it is (`ce_clean`), and with the activation at the hook replaced by the SAE's
reconstruction (`ce_sae`), by its mean over the evaluated windows (`ce_mean_ablation`) or by zero
(`ce_zero_ablation`). The ablations replace it at every position. The SAE replaces it where it was
trained to: everywhere but at a window's first position, which never trains an SAE, and at the
tokens that its training excluded (`excluded_tokens`). At the first position the model has its BOS
token or, without one, an attention sink in most models.

    loss_recovered = (ce_zero_ablation - ce_sae) / (ce_zero_ablation - ce_clean)

(Cunningham et al., arXiv 2309.08600, as SAEBench has it), 1 being the model as it is.

    kl = mean over the same predictions of KL(p_clean || p_sae), in nats

from the clean to the spliced model. `ce_sae`, `loss_recovered` and `kl` are given four times:
without a suffix as above; with `_all_spliced` when the SAE replaces every activation, the first
one too; with `_sinks_kept` when attention sinks (outliers, see below) keep their activation as
well, so that the SAE replaces exactly the activations that can train it; with `_by_norm` when
every activation is given to the SAE, which keeps those that are longer than the norm that its
training recorded (`SparseAutoencoder.is_outlier`), and no others. `n_left_alone` counts the tokens
that keep their activation, with the same suffixes.

On the SAE's own activations, position 0 and excluded tokens left out:

    fvu = sum ||x - x_hat||^2 / sum ||x - mean(x)||^2

pooled over tokens and dimensions (not a mean of per-token ratios), once without the tokens whose
norm exceeds ten times the median (`fvu`) and once with them (`fvu_with_outliers`); `mse`, the mean
squared error per dimension, without them; `l0`, the
mean number of active features per token, and its quantiles; a feature's density, the share of
tokens it is active on; `dead_fraction`, the share of features active on no evaluated token;
`block_mse`, per layer after the hook, the mean squared difference per dimension between the
residuals of the clean and the spliced model, outliers left out.

An SAE that was stored without a threshold is calibrated on the evaluated tokens, to an L0 of k;
`calibration`, which no other SAE has, says what its threshold was.

Of a transcoder, x and the activation that is replaced are those at its target, and a token is an
outlier if its norm there or at the hook exceeds ten times the median.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_core.activations.clean_pass import CleanPass, clean_pass
from sae_core.activations.token_windows import seen_tokens, token_windows
from sae_core.corpus.split import Split
from sae_core.corpus.token_file import TokenFile
from sae_core.corpus.tokens import token_ids
from sae_core.evaluation.calibration import calibrated
from sae_core.evaluation.identity import density_histogram
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.sae.config import SAESpec
from sae_core.sae.losses import fraction_of_variance_unexplained, in_cache
from sae_core.sae.normalisation import OUTLIER_FACTOR
from sae_core.sae_base import SparseAutoencoder
from sae_core.train_config import BatchSize, DataConfig, WindowsConfig
from sae_core.utils.errors import SAEError
from sae_core.utils.memory import Microbatch

DATA_KEYS = tuple(field.name for field in fields(WindowsConfig))

LOGIT_ROWS = 128
"""Predictions whose probabilities are in memory at once."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

SPLICES = ("", "_all_spliced", "_sinks_kept", "_by_norm")
HEADLINE, ALL_SPLICED, SINKS_KEPT, BY_NORM = SPLICES
"""Suffixes of the figures of a spliced model, by which tokens keep their activation."""


class Reference(NamedTuple):
    """What the evaluated activations are like, from a first pass over them."""

    mean: Tensor
    """(D,) over all positions, at the target."""
    max_norms: dict[Hook, float]
    """By hook; above it a token counts as an outlier."""


class _Sums:
    """Named sums over batches, in float64 on the CPU: not every device has float64."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def add(self, **terms: Tensor) -> None:
        for name, term in terms.items():
            self.values[name] = self.values.get(name, 0.0) + term.cpu().double()

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]


def data_config(spec: SAESpec) -> DataConfig:
    """How the SAE's texts were split and cut into windows; the defaults for what is not known."""
    known = {key: value for key in DATA_KEYS if (value := spec.metadata.get(key)) is not None}
    return DataConfig(**known, excluded_tokens=spec.excluded_tokens)


def held_out_repeated(spec: SAESpec, file: TokenFile) -> float:
    """The share of the SAE's held-out text that its training texts have too."""
    data = data_config(spec)
    return Split(file, data.val_fraction, data.seed).repeated()


def held_out_windows(spec: SAESpec, tokenizer: Any, file: TokenFile, most: int) -> Tensor:
    """(W, L) the windows of a token file that neither trained nor validated this SAE, `most` at
    most.

    Split, window length and seed are those that the SAE was trained with.

    Raises:
        SAEError: there are none.
    """
    windows = token_windows(file, tokenizer, data_config(spec)).evaluation(most)
    if len(windows) == 0:
        raise SAEError(
            "--val-fraction: the held-out texts give less than two windows, and the evaluation "
            "needs one that did not validate; hold out more or use a shorter --max-text-length"
        )
    return windows


@torch.no_grad()
def evaluate(
    model: LanguageModel, sae: SparseAutoencoder, windows: Tensor, batch_size: BatchSize
) -> dict[str, Any]:
    """The metrics of this module for `sae` on `windows` (W, L), as JSON values.

    `batch_size` windows are in memory at once; see `LanguageModel.windows_at_once`.

    Raises:
        SAEError: the SAE is for a model of another shape.
    """
    hook, target = _sites(sae.spec)
    if hook.layer >= model.n_layers or sae.spec.d_in != model.d_model:
        raise SAEError(
            f"--model-name: the SAE is for {hook.spec} of width {sae.spec.d_in}, and the model has "
            f"{model.n_layers} layers of width {model.d_model}; give the SAE's own model"
        )
    later = [Hook(layer, "hook_resid_post") for layer in range(hook.layer, model.n_layers)]
    later = [point for point in later if point != target]
    sae = sae.to(model.device)
    microbatch = model.forward_microbatch(windows.shape[1], batch_size)
    excluded = token_ids(model.tokenizer, sae.spec.excluded_tokens)
    reference = _reference(model, hook, target, windows, excluded, microbatch)
    options: dict[str, Any] = {"max_norms": reference.max_norms, "excluded": excluded}

    def measure(at: slice) -> tuple[_Sums, Tensor]:
        batch = clean_pass(model, windows[at], hook, target, later, **options)
        return _measured(model, sae, reference, batch)

    sums, l0 = _Sums(), []
    with calibrated(model, sae, windows, batch_size) as calibration:
        for found, active in microbatch.parts(len(windows), measure):
            sums.add(**found.values)
            l0.append(active)
    figures = _figures(sums, torch.cat(l0), [point.layer for point in later], windows, sae)
    return figures | calibration


def _sites(spec: SAESpec) -> tuple[Hook, Hook]:
    """Where an SAE reads, and where its output belongs."""
    hook = Hook(spec.hook_layer, spec.hook_name)
    return hook, hook.target(spec.target_hook_name) or hook


def _measured(
    model: LanguageModel, sae: SparseAutoencoder, reference: Reference, batch: CleanPass
) -> tuple[_Sums, Tensor]:
    """What one batch adds to the figures, and the active features of each of its tokens."""
    (_, target), sums = _sites(sae.spec), _Sums()
    x_hat, features = _reconstruct(sae, batch.x.float())
    _add_own_figures(sums, batch, x_hat, features)
    spliced = _splices(sums, model, target, batch, x_hat, sae.is_outlier(batch.x, batch.target))
    mean, ablated = reference.mean.expand_as(x_hat), {}
    for name, value in (("mean_ablation", mean), ("zero_ablation", torch.zeros_like(x_hat))):
        ablated[name], _ = model.resume_hidden(batch.tokens, batch.residual, target, value)
    _add_predictions(sums, model, batch, spliced, ablated)
    return sums, (features > 0).sum(-1)[batch.kept]


def _splices(
    sums: _Sums,
    model: LanguageModel,
    target: Hook,
    batch: CleanPass,
    x_hat: Tensor,
    outlier: Tensor,
) -> dict[tuple[str, ...], Tensor]:
    """The final hidden states (B, L, D) of the model with the reconstructions, by the suffixes of
    the figures: one pass for all that leave the same tokens alone, as without a sink in this batch.
    `outlier` (B, L) bool are those that the SAE leaves alone itself."""
    none, unseen = torch.zeros_like(batch.kept), ~batch.seen
    left_alone = {HEADLINE: unseen, ALL_SPLICED: none, SINKS_KEPT: ~batch.kept, BY_NORM: outlier}
    alike: list[list[str]] = []
    for suffix, alone in left_alone.items():
        sums.add(**{f"n_left_alone{suffix}": alone.sum()})
        same = [others for others in alike if torch.equal(alone, left_alone[others[0]])]
        if same:
            same[0].append(suffix)
        else:
            alike.append([suffix])
    found = {}
    for suffixes in alike:
        value = torch.where(left_alone[suffixes[0]][..., None], batch.target.float(), x_hat)
        later = list(batch.later) if HEADLINE in suffixes else []
        found[tuple(suffixes)], spliced = model.resume_hidden(
            batch.tokens, batch.residual, target, value, later
        )
        for point in later:
            error = (spliced[point].float() - batch.later[point].float())[batch.kept]
            sums.add(**{f"mse_{point.layer}": error.pow(2).mean(-1).sum()})
    return found


def _reference(
    model: LanguageModel,
    hook: Hook,
    target: Hook,
    windows: Tensor,
    excluded: Sequence[int],
    microbatch: Microbatch,
) -> Reference:
    sums = _Sums()
    norms: dict[Hook, list[Tensor]] = {hook: [], target: []}

    def read(at: slice) -> tuple[Tensor, dict[Hook, Tensor]]:
        seen = seen_tokens(windows[at], excluded).to(model.device)
        return seen, model.activations(windows[at], list(norms))

    for seen, found in microbatch.parts(len(windows), read):
        sums.add(total=found[target].float().sum((0, 1)))
        for at, of_batches in norms.items():
            of_batches.append(found[at].float().norm(dim=-1)[seen])
    mean = (sums["total"] / windows.numel()).float().to(model.device)
    medians = {at: float(torch.cat(of_batches).median()) for at, of_batches in norms.items()}
    return Reference(mean, {at: OUTLIER_FACTOR * median for at, median in medians.items()})


def _reconstruct(sae: SparseAutoencoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L, D) reconstructions and (B, L, F) features."""
    features = sae.encode(x)
    return sae.decode(features).float(), features


def _add_own_figures(sums: _Sums, batch: CleanPass, x_hat: Tensor, features: Tensor) -> None:
    for suffix, mask in (("", batch.kept), ("_with_outliers", batch.seen)):
        rows = batch.target.float()[mask]
        sums.add(
            **{
                f"n{suffix}": mask.sum(),
                f"error{suffix}": (rows - x_hat[mask]).pow(2).sum(),
                f"squared{suffix}": rows.pow(2).sum(),
                f"total{suffix}": rows.sum(0),
            }
        )
    sums.add(active=(features > 0)[batch.kept].sum(0))


def _add_predictions(
    sums: _Sums,
    model: LanguageModel,
    batch: CleanPass,
    spliced: Mapping[tuple[str, ...], Tensor],
    ablated: Mapping[str, Tensor],
) -> None:
    """The summed cross-entropies of the logits of hidden states (B, L, D), and of the spliced ones
    the KL from the clean model's. The logits of all tokens never exist at once: with a large
    vocabulary they would take more memory than the model."""
    target, length = batch.tokens[:, 1:].flatten(), batch.tokens.shape[1] - 1
    for part in torch.arange(len(target), device=target.device).split(LOGIT_ROWS):
        at = part // length, part % length
        clean, wanted = model.unembed(batch.hidden[at]), target[part]
        sums.add(ce_clean=_figures_of(wanted, clean)["ce"])
        for name, hidden in ablated.items():
            sums.add(**{f"ce_{name}": _figures_of(wanted, model.unembed(hidden[at]))["ce"]})
        for suffixes, hidden in spliced.items():
            found = _figures_of(wanted, model.unembed(hidden[at]), clean)
            for suffix in suffixes:
                sums.add(**{f"{name}_sae{suffix}": value for name, value in found.items()})


def _figures_of(target: Tensor, *logits: Tensor) -> dict[str, Tensor]:
    """`ce`, the summed cross-entropy of logits (n, V) for targets (n,), and with those of the clean
    model after them `kl`, from it."""
    log_likelihood, kl = [], []
    for of_rows, wanted, *clean in in_cache(logits[0], target[:, None], *logits[1:]):
        log_p = F.log_softmax(of_rows, dim=-1, dtype=torch.float32)
        log_likelihood.append(log_p.gather(1, wanted))
        for of_clean in clean:
            log_clean = F.log_softmax(of_clean, dim=-1, dtype=torch.float32)
            kl.append(torch.linalg.vecdot(log_clean.exp(), log_clean.sub_(log_p)))
    ce = -torch.cat(log_likelihood).sum()
    return {"ce": ce, "kl": torch.cat(kl).sum()} if kl else {"ce": ce}


def _figures(
    sums: _Sums, l0: Tensor, layers: list[int], windows: Tensor, sae: SparseAutoencoder
) -> dict[str, Any]:
    n_predictions = windows.shape[0] * (windows.shape[1] - 1)
    ce = {
        name: float(sums[f"ce_{name}"]) / n_predictions
        for name in ("clean", "mean_ablation", "zero_ablation")
    }
    fvu = {
        suffix: fraction_of_variance_unexplained(
            sums[f"error{suffix}"], sums[f"squared{suffix}"], sums[f"total{suffix}"],
            int(sums[f"n{suffix}"]),
        )
        for suffix in ("", "_with_outliers")
    }  # fmt: skip
    n_tokens = int(sums["n"])
    block_mse = {str(layer): float(sums[f"mse_{layer}"]) / n_tokens for layer in layers}
    errors = list(block_mse.values())
    return {
        "l0": float(l0.double().mean()),
        "l0_quantiles": {str(q): float(torch.quantile(l0.double(), q)) for q in QUANTILES},
        "fvu": fvu[""],
        "fvu_with_outliers": fvu["_with_outliers"],
        "mse": float(sums["error"]) / n_tokens / sae.spec.d_in,
        **{f"ce_{name}": value for name, value in ce.items()},
        **_spliced_figures(sums, n_predictions),
        "dead_fraction": float((sums["active"] == 0).double().mean()),
        "density_histogram": density_histogram(sums["active"] / n_tokens),
        "block_mse": block_mse,
        "block_mse_mean": sum(errors) / len(errors) if errors else None,
        "block_mse_min": min(errors, default=None),
        "block_mse_max": max(errors, default=None),
        "n_tokens": n_tokens,
        "n_windows": windows.shape[0],
        "n_outlier_tokens": int(sums["n_with_outliers"]) - n_tokens,
    }


def _spliced_figures(sums: _Sums, n_predictions: int) -> dict[str, float | int]:
    """The figures of the spliced model, with each choice of tokens left alone."""
    zero, clean = (float(sums[name]) / n_predictions for name in ("ce_zero_ablation", "ce_clean"))
    figures: dict[str, float | int] = {}
    for suffix in SPLICES:
        ce = float(sums[f"ce_sae{suffix}"]) / n_predictions
        figures |= {
            f"ce_sae{suffix}": ce,
            f"loss_recovered{suffix}": (zero - ce) / (zero - clean),
            f"kl{suffix}": float(sums[f"kl_sae{suffix}"]) / n_predictions,
            f"n_left_alone{suffix}": int(sums[f"n_left_alone{suffix}"]),
        }
    return figures
