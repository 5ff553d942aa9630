"""What an SAE's features are about: one pass of the model over the texts, up to the hook.

A feature's density is the share of tokens on which it is active. Its share of a subject is the
mean activation on that subject's tokens divided by the sum of these means over the subjects, so a
longer subject does not count more. The tokens that it promotes and suppresses are what the model
would predict if the last residual were the feature's decoder direction alone, after the final
normalisation and the unembedding (direct logit attribution). Half the difference to the opposite
direction is taken, so that biases cancel. Only tokens that occur in the texts are listed: rare
ones, whose embeddings were hardly trained, would fill every list. Neighbours are the features with
the highest cosine between decoder rows; partners are active on the same tokens, by Jaccard's index.

Position 0 of a window, excluded tokens and outliers do not train an SAE and are not counted. The
one exception is the number of features that are active only on position 0, which random crops
should prevent.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_core.activations.token_windows import CorpusWindows, corpus_windows, seen_tokens
from sae_core.corpus.token_file import TokenFile
from sae_core.corpus.tokens import token_ids
from sae_core.data_processing.sources import Chapter
from sae_core.evaluation.tally import Records, Tally, Together
from sae_core.evaluation.window_means import WindowMeans
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.sae.config import SAESpec
from sae_core.sae.precision import Precision
from sae_core.sae.sparse_ops import SparseCode
from sae_core.sae_base import SparseAutoencoder
from sae_core.settings.steps import FeaturesConfig
from sae_core.train_config import BatchSize, DataConfig

DENSE = 0.03
"""A feature that is active on a larger share of the tokens is not among the interesting ones: such
features mark frequent words and the like."""

FEW_WINDOWS = 8
"""Nor is one that is active in fewer windows."""

SPECIFIC = 0.8
"""From this share of a subject on, a feature counts as specific to it."""

ROWS = 1024
"""Decoder rows whose cosines with all others are in memory at once."""

LOGITS = 2**22
"""Effects on logits that are in memory at once, over features and tokens."""

N_NEIGHBOURS = 6


class Corpus(NamedTuple):
    """The texts as windows, and where they come from."""

    file: TokenFile
    windows: CorpusWindows

    @classmethod
    def read(cls, file: TokenFile, spec: SAESpec, most: int) -> "Corpus":
        """At most `most` windows, as long as the windows that the SAE was trained with."""
        length = spec.metadata.get("max_text_length") or DataConfig.max_text_length
        return cls(file, corpus_windows(file, length, most))

    @property
    def subjects(self) -> list[str]:
        return self.file.sources.subjects if self.file.sources else []

    def chapter(self, text: int) -> Chapter | None:
        """The chapter that a text is from, if it is known."""
        if self.file.sources is None or self.file.origins is None:
            return None
        return self.file.sources.chapters[int(self.file.origins[text])]

    def subject_of_texts(self) -> Tensor | None:
        """(texts,) the index of each text's subject."""
        if self.file.sources is None or self.file.origins is None:
            return None
        index = {subject: number for number, subject in enumerate(self.subjects)}
        chapters = [index[chapter.subject] for chapter in self.file.sources.chapters]
        return torch.tensor(chapters)[torch.from_numpy(self.file.origins.astype("int64"))]


@dataclass(frozen=True)
class FeatureTable:
    """Figures of all F features, on the CPU."""

    tally: Tally
    best: Records
    sample: Records
    spread: Records
    """A random sample of the tokens on which each feature is active."""
    together: Together
    density: Tensor
    """(F,) share of tokens on which each is active."""
    shares: Tensor
    """(F, S) by subject; NaN for a feature that is never active."""
    neighbours: Tensor
    """(F, N_NEIGHBOURS) features with the nearest decoder rows, and their cosines."""
    cosines: Tensor

    @property
    def active(self) -> Tensor:
        """(F,) bool."""
        return self.density > 0

    @property
    def only_first(self) -> Tensor:
        """(F,) bool: active on position 0 and nowhere else."""
        return (self.tally.count == 0) & (self.tally.at_first > 0)


@torch.no_grad()
def tally_features(
    model: LanguageModel,
    sae: SparseAutoencoder,
    corpus: Corpus,
    config: FeaturesConfig,
    batch_size: BatchSize,
    precision: Precision | None = None,
    means: WindowMeans | None = None,
) -> Iterator[Tally]:
    """The pass over the corpus: the tally after each batch of windows.

    Args:
        means: what also takes the batches, if the texts have subjects.
    """
    sae = sae.to(model.device, torch.float32)
    hook = Hook(sae.spec.hook_layer, sae.spec.hook_name)
    excluded = token_ids(model.tokenizer, sae.spec.excluded_tokens)
    of_text, windows = corpus.subject_of_texts(), corpus.windows
    n_subjects = len(corpus.subjects)
    tally = Tally(
        sae.spec.d_sae, n_subjects, config.top_windows, config.context_tokens, model.device
    )
    microbatch = model.forward_microbatch(windows.tokens.shape[1], batch_size)

    def encoded(at: slice) -> tuple[Tensor, Tensor, SparseCode, Tensor, Tensor]:
        x = model.activations(windows.tokens[at], [hook])[hook].float()
        code = sae.encode_sparse(x.flatten(0, 1), precision)
        seen = seen_tokens(windows.tokens[at], excluded).to(model.device)
        return windows.text[at], x, code, sae.is_outlier(x), seen

    for text, x, code, outlier, seen in microbatch.parts(len(windows.tokens), encoded):
        subject = None if of_text is None else of_text[text.long()].to(model.device)
        tally.add(code, outlier, subject, seen)
        if means is not None and subject is not None:
            means.add(x, code, seen & ~outlier, subject)
        yield tally


def feature_table(sae: SparseAutoencoder, tally: Tally) -> FeatureTable:
    """The figures that follow from a finished tally and the decoder."""
    neighbours, cosines = nearest(sae.W_dec)
    tally = tally.cpu()
    means = tally.by_subject.double() / tally.subject_tokens.clamp(min=1)
    return FeatureTable(
        tally,
        tally.best.ordered(),
        tally.sample.ordered(),
        tally.spread.ordered(),
        tally.tokens.pairs(tally.n_features),
        tally.count.double() / max(1, tally.n_tokens),
        means / means.sum(1, keepdim=True),
        neighbours.cpu(),
        cosines.cpu(),
    )


@torch.no_grad()
def nearest(W_dec: Tensor, n: int = N_NEIGHBOURS) -> tuple[Tensor, Tensor]:
    """(F, n) the features whose decoder rows (F, D) have the largest cosine, and the cosines."""
    unit = F.normalize(W_dec.float(), dim=1)
    n = min(n, len(unit) - 1)
    found, cosines = [], []
    for first in range(0, len(unit), ROWS):
        block = unit[first : first + ROWS] @ unit.T
        block.diagonal(first).fill_(-2.0)  # itself
        best = block.topk(n, dim=1)
        found.append(best.indices)
        cosines.append(best.values)
    return torch.cat(found), torch.cat(cosines)


@torch.no_grad()
def logit_effects(
    model: LanguageModel, directions: Tensor, tokens: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """The direct effect of each row of (n, D) directions in the residual on the logits of (T,)
    tokens, some rows at a time: the rows' numbers (r,), and the effects (r, T)."""
    last = Hook(model.n_layers - 1, "hook_resid_post")
    rows, is_odd = max(1, LOGITS // len(tokens)), False
    for number in torch.arange(len(directions)).split(rows):
        unread = torch.zeros(len(number), 1, dtype=torch.long)
        value = directions[number][:, None].to(model.device) * directions.shape[1] ** 0.5

        def logits(value: Tensor, unread: Tensor = unread) -> Tensor:
            hidden, _ = model.resume_hidden(unread, value, last, value)
            return model.unembed(hidden, tokens).float().squeeze(1)

        up = logits(value)
        if not is_odd:  # as it is in a model without biases, where one of the two says both
            down = logits(-value)
            is_odd, up = torch.equal(up, -down), (up - down) / 2
        yield number, up.cpu()
