"""Windows run through an unmodified language model: where a splice begins, and its baseline."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from sae_core.activations.token_windows import seen_tokens
from sae_core.models.language_model import Hook, LanguageModel, resume_point


class Reader(Protocol):
    """What reads windows as a `LanguageModel` does."""

    def activations(self, tokens: Tensor, hooks: Sequence[Hook]) -> dict[Hook, Tensor]: ...

    def hidden(
        self, tokens: Tensor, hooks: Sequence[Hook]
    ) -> tuple[Tensor, dict[Hook, Tensor]]: ...


class ReadWindows(NamedTuple):
    """B windows of L tokens, as an SAE gets them. D is the activation width."""

    x: Tensor
    """(B, L, D) activations at the hook."""
    seen: Tensor
    """(B, L) bool: see `seen_tokens`."""
    kept: Tensor
    """(B, L) bool: the tokens that train the SAE, the seen ones without outliers; N in all."""
    target: Tensor
    """(B, L, D) activations where the splice goes: a transcoder's target, otherwise x."""

    @property
    def n_tokens(self) -> int:
        """N"""
        return int(self.kept.sum())

    @property
    def n_outliers(self) -> int:
        """Seen tokens that are left out."""
        return int(self.seen.sum()) - self.n_tokens


class CleanPass(NamedTuple):
    """B windows of L tokens, run through the unmodified model. D is the activation width."""

    tokens: Tensor
    """(B, L)"""
    x: Tensor
    """(B, L, D) activations at the hook."""
    seen: Tensor
    """(B, L) bool: see `seen_tokens`."""
    kept: Tensor
    """(B, L) bool: the tokens that train the SAE, the seen ones without outliers; N in all."""
    residual: Tensor
    """(B, L, D) where the spliced pass begins."""
    hidden: Tensor
    """(B, L, D) what the logits are made of."""
    later: dict[Hook, Tensor]
    """(B, L, D) residuals after later layers."""
    target: Tensor
    """(B, L, D) activations where the splice goes: a transcoder's target, otherwise x."""

    @property
    def read(self) -> ReadWindows:
        """What the SAE gets."""
        return ReadWindows(self.x, self.seen, self.kept, self.target)

    @property
    def n_tokens(self) -> int:
        """N"""
        return self.read.n_tokens

    @property
    def n_outliers(self) -> int:
        """Seen tokens that are left out."""
        return self.read.n_outliers

    def at(self, windows: slice) -> "CleanPass":
        """Some of the windows."""
        return CleanPass(
            tokens=self.tokens[windows],
            x=self.x[windows],
            seen=self.seen[windows],
            kept=self.kept[windows],
            residual=self.residual[windows],
            hidden=self.hidden[windows],
            later={point: residual[windows] for point, residual in self.later.items()},
            target=self.target[windows],
        )


def clean_pass(
    model: LanguageModel,
    tokens: Tensor,
    hook: Hook,
    target: Hook,
    later: Sequence[Hook],
    max_norms: Mapping[Hook, float],
    shared: Reader | None = None,
    excluded: Sequence[int] = (),
) -> CleanPass:
    """Run windows (B, L) through the model.

    Args:
        shared: what runs it for several SAEs at once; by default the model for this one.
        hook: where the SAE reads.
        target: where its output goes; of an SAE, `hook` too.
        later: where the residual is wanted as well.
        max_norms: for `hook` and `target`: longer activations are outliers.
        excluded: tokens that train no SAE.
    """
    start, tokens = resume_point(hook), tokens.to(model.device)
    hidden, found = (shared or model).hidden(tokens, [hook, target, start, *later])
    x, seen, kept, at_target = _read(tokens, found, hook, target, max_norms, excluded)
    after = {point: found[point] for point in later}
    return CleanPass(tokens, x, seen, kept, found[start], hidden, after, at_target)


def read_windows(
    model: LanguageModel,
    tokens: Tensor,
    hook: Hook,
    target: Hook,
    max_norms: Mapping[Hook, float],
    shared: Reader | None = None,
    excluded: Sequence[int] = (),
) -> ReadWindows:
    """What the SAE gets of windows (B, L), without the layers after it. Arguments as those of
    `clean_pass`."""
    tokens = tokens.to(model.device)
    found = (shared or model).activations(tokens, [hook, target])
    return _read(tokens, found, hook, target, max_norms, excluded)


def _read(
    tokens: Tensor,
    found: Mapping[Hook, Tensor],
    hook: Hook,
    target: Hook,
    max_norms: Mapping[Hook, float],
    excluded: Sequence[int],
) -> ReadWindows:
    seen = seen_tokens(tokens, excluded)
    kept = seen.clone()
    for at in {hook, target}:
        kept &= found[at].float().norm(dim=-1) <= max_norms[at]
    return ReadWindows(found[hook], seen, kept, found[target])
