"""The analysis of features against a dense computation of the same."""

import csv
import io
import json
import math
from typing import Any

import pytest
import torch
from by_definition import in_memory
from synthetic import KINDS, random_sae
from tiny_model import WIDTH

from sae_core.corpus.corpora import json_list
from sae_core.corpus.token_file import TokenFile
from sae_core.corpus.tokenise import tokenise
from sae_core.data_processing.sources import Chapter, Sources
from sae_core.data_processing.texts import write_texts
from sae_core.evaluation import tally as tallies
from sae_core.evaluation.feature_files import Writer
from sae_core.evaluation.features import (
    Corpus,
    FeatureTable,
    feature_table,
    logit_effects,
    nearest,
    tally_features,
)
from sae_core.evaluation.tally import Best, Tally, TokenSample, hashed
from sae_core.evaluation.words import Pieces, Words
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.sae.precision import Precision
from sae_core.sae.sparse_ops import sparse
from sae_core.sae_base import SparseAutoencoder
from sae_core.settings.steps import FeaturesConfig

HOOK = Hook(1, "hook_resid_post")
LENGTH = 24
SHOWN = FeaturesConfig(top_windows=3, context_tokens=9)


def an_sae(kind: str = "batch_topk", **metadata: Any) -> SparseAutoencoder:
    where = {"hook_layer": HOOK.layer, "hook_name": HOOK.hook_name, "hook_spec": HOOK.spec}
    metadata = {"max_text_length": LENGTH} | metadata
    sae = random_sae(kind, torch.float32, d_in=WIDTH, d_sae=3 * WIDTH, metadata=metadata, **where)
    with torch.no_grad():
        sae.b_enc -= 8.0  # sparser
    return sae


def sources_of(texts: list[str]) -> Sources:
    first = len(texts) // 3
    chapters = (
        Chapter("physics", "a.md", first, 1),
        Chapter("biology", "b.md", len(texts) - first, 1),
    )
    return Sources(chapters, {})


@pytest.fixture(scope="module")
def corpus(
    language_model: LanguageModel, texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Corpus:
    some = texts[:6]
    path = tmp_path_factory.mktemp("corpus") / "texts.json"
    write_texts(path, some)
    sources_of(some).save(path)
    tokenise(json_list(path, "--data-path"), language_model.tokenizer, path.with_name("tokens"))
    return Corpus.read(TokenFile.open(path.with_name("tokens")), an_sae().spec, 1000)


def tallied(
    model: LanguageModel, sae: SparseAutoencoder, corpus: Corpus, batch_size: int = 4
) -> FeatureTable:
    *_, tally = tally_features(model, sae, corpus, SHOWN, batch_size)
    return feature_table(sae, tally)


class Dense:
    """The same from the dense code of the whole corpus."""

    @torch.no_grad()
    def __init__(self, model: LanguageModel, sae: SparseAutoencoder, corpus: Corpus) -> None:
        x = model.activations(corpus.windows.tokens, [HOOK])[HOOK].float()
        max_norm = sae.spec.metadata.get("outlier_norm", math.inf)
        self.outlier = x.norm(dim=-1) > max_norm
        every = sae.encode(x)
        self.first = every[:, 0]
        self.code = every.clone()  # (W, L, F)
        self.code[:, 0] = 0
        self.code[self.outlier] = 0
        self.counted = ~self.outlier
        self.counted[:, 0] = False


@pytest.fixture(scope="module")
def dense(language_model: LanguageModel, corpus: Corpus) -> Dense:
    return Dense(language_model, an_sae(), corpus)


@pytest.fixture(scope="module")
def table(language_model: LanguageModel, corpus: Corpus) -> FeatureTable:
    return tallied(language_model, an_sae(), corpus)


@pytest.mark.parametrize("finder", [None, Precision(torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sparse_code_is_the_dense_one(kind: str, finder: Precision | None) -> None:
    sae, x = an_sae(kind), 3 * torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(sae.encode_sparse(x, finder).to_dense(), sae.encode(x))


def test_counts_and_sums(table: FeatureTable, dense: Dense) -> None:
    tally, active = table.tally, dense.code > 0
    assert 0.01 < float(active.float().mean()) < 0.5
    assert torch.equal(tally.count, active.sum((0, 1)))
    assert torch.equal(tally.windows, active.any(1).sum(0))
    assert torch.equal(tally.at_first, (dense.first > 0).sum(0))
    torch.testing.assert_close(tally.total, dense.code.double().sum((0, 1)))
    assert tally.n_tokens == int(dense.counted.sum()) and tally.n_outliers == 0
    torch.testing.assert_close(table.density, active.double().sum((0, 1)) / tally.n_tokens)
    assert torch.equal(tally.histogram.sum(1), tally.count)


def test_top_windows_and_their_context(table: FeatureTable, dense: Dense) -> None:
    """One record a window, the greatest first, with every token's activation around it."""
    best, before = table.best, table.tally.before
    for feature in table.active.nonzero().squeeze(1).tolist():
        peaks, at = dense.code[..., feature].max(1)
        expected = peaks.sort(descending=True, stable=True)
        n = min(SHOWN.top_windows, int((peaks > 0).sum()))
        torch.testing.assert_close(best.value[feature, :n], expected.values[:n])
        assert (best.place[feature, n:] == -1).all()
        for rank in range(n):
            window = int(expected.indices[rank])
            peak = int(at[window])
            assert int(best.place[feature, rank]) == window * LENGTH + peak
            row = torch.zeros(LENGTH + 2 * SHOWN.context_tokens)
            row[SHOWN.context_tokens :][:LENGTH] = dense.code[window, :, feature]
            around = row[SHOWN.context_tokens + peak - before :][: SHOWN.context_tokens]
            torch.testing.assert_close(
                best.context[feature, rank].float(), around.bfloat16().float()
            )


def test_the_sample_is_random_and_of_the_feature(table: FeatureTable, dense: Dense) -> None:
    sample = table.sample
    for feature in table.active.nonzero().squeeze(1).tolist():
        n = min(tallies.SAMPLE, int(table.tally.windows[feature]))
        assert int((sample.place[feature] >= 0).sum()) == n
        window, at = sample.place[feature, :n] // LENGTH, sample.place[feature, :n] % LENGTH
        assert len(window.unique()) == n
        torch.testing.assert_close(sample.value[feature, :n], dense.code[window, at, feature])


def test_the_sample_of_tokens_is_of_the_feature(table: FeatureTable, dense: Dense) -> None:
    code = dense.code.flatten(0, 1)
    for feature in table.active.nonzero().squeeze(1).tolist():
        n = min(tallies.TOKEN_SAMPLE, int(table.tally.count[feature]))
        places = table.spread.place[feature]
        assert (places[:n] >= 0).all() and (places[n:] == -1).all()
        assert len(places[:n].unique()) == n
        torch.testing.assert_close(table.spread.value[feature, :n], code[places[:n], feature])


@pytest.mark.parametrize("batch", [7, 60, 300])
def test_of_equal_records_the_earlier_are_kept(batch: int) -> None:
    draw, best = torch.Generator().manual_seed(0), Best(4, 6, 0, torch.device("cpu"))
    key = torch.randint(1, 9, (300,), generator=draw).float()
    feature = torch.randint(0, 3, (300,), generator=draw)  # the fourth has none
    for at in torch.arange(300).split(batch):
        part = key[at]
        best.offer(feature[at], part, part, at, lambda chosen: torch.zeros(len(chosen), 0))
    found = best.ordered()
    for number in range(3):
        own = (feature == number).nonzero().squeeze(1).tolist()
        expected = sorted(own, key=lambda place: (-float(key[place]), place))[:6]
        assert found.place[number].tolist() == expected
    assert found.place[3].tolist() == [-1] * 6


def test_hashes_are_uniform() -> None:
    values = hashed(torch.arange(100_000), 2)
    assert 0 <= float(values.min()) and float(values.max()) < 1
    counts = torch.histc(values, bins=20, min=0, max=1)
    assert float(counts.std()) < 200  # 69 is expected
    assert float((values[1:] - values[:-1]).abs().mean()) == pytest.approx(1 / 3, abs=0.01)


def test_shares_count_each_subject_alike(table: FeatureTable, dense: Dense, corpus: Corpus) -> None:
    of_text = corpus.subject_of_texts()
    assert of_text is not None
    subject = of_text[corpus.windows.text.long()]
    means = torch.stack(
        [dense.code[(subject == s) & dense.counted].double().mean(0) for s in (0, 1)], 1
    )
    expected = means / means.sum(1, keepdim=True)
    torch.testing.assert_close(table.shares, expected, equal_nan=True)
    assert corpus.subjects == ["physics", "biology"]


def test_outliers_are_counted_apart(language_model: LanguageModel, corpus: Corpus) -> None:
    x = language_model.activations(corpus.windows.tokens, [HOOK])[HOOK].float()
    sae = an_sae(outlier_norm=float(x.norm(dim=-1).quantile(0.9)))
    found, expected = tallied(language_model, sae, corpus), Dense(language_model, sae, corpus)
    assert found.tally.n_outliers == int(expected.outlier[:, 1:].sum()) > 0
    assert torch.equal(found.tally.count, (expected.code > 0).sum((0, 1)))


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_batch_size_changes_nothing(
    batch_size: int, language_model: LanguageModel, corpus: Corpus, table: FeatureTable
) -> None:
    other = tallied(language_model, an_sae(), corpus, batch_size)
    assert torch.equal(other.tally.count, table.tally.count)
    assert torch.equal(other.best.place, table.best.place)
    assert torch.equal(other.sample.place, table.sample.place)
    assert torch.equal(other.spread.place, table.spread.place)


def test_features_active_together(table: FeatureTable, dense: Dense) -> None:
    active = (dense.code > 0).flatten(0, 1).double()
    both = active.T @ active
    together = table.together
    assert together.n_tokens == table.tally.n_tokens
    found = torch.zeros_like(both)
    found[together.first, together.second] = together.tokens.double()
    assert torch.equal(found, both.triu(1))
    either = active.sum(0)[:, None] + active.sum(0) - both
    torch.testing.assert_close(
        together.jaccard.double(), (both / either)[together.first, together.second],
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip
    n = together.n_tokens
    counted = active[dense.counted.flatten()]
    share = counted.mean(0)
    bits = (both / n / (share[:, None] * share)).log2()
    correlation = torch.corrcoef(counted.T)
    at = together.first, together.second
    torch.testing.assert_close(together.pmi.double(), bits[at], rtol=1e-4, atol=1e-4)
    phi = correlation[at].nan_to_num()  # 0 where a feature is active on every token
    torch.testing.assert_close(together.correlation, phi, rtol=1e-4, atol=1e-4)


def test_a_sample_of_tokens_keeps_to_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tallies, "PAIR_BUDGET", 3000)
    sample, n_tokens, per_token = TokenSample(), 5000, 4
    for first in range(0, n_tokens, 500):
        tokens = torch.arange(first, first + 500)
        feature = torch.randint(50, (500, per_token)).sort(1).values
        feature += torch.arange(per_token) * 50  # all different
        sample.add(tokens, tokens.repeat_interleave(per_token), feature.flatten())
    together = sample.pairs(200)
    assert 1500 / 6 < together.n_tokens <= 3000 / 6
    assert int(together.tokens.sum()) == together.n_tokens * 6
    assert int(together.active.sum()) == together.n_tokens * per_token


def test_features_of_position_0_alone() -> None:
    """Feature 0 is active there and nowhere else, 1 there and elsewhere, 2 elsewhere, 3 nowhere;
    4 is active on an outlier only."""
    code = torch.zeros(6, 5, 5)
    code[:, 0, [0, 1]] = 1.0
    code[2, 3, [1, 2]] = 2.0
    code[4, 4, 4] = 9.0
    outlier = torch.zeros(6, 5, dtype=torch.bool)
    outlier[4, 4] = True
    tally = Tally(5, 0, top=2, context=3, device=torch.device("cpu"))
    for first in (0, 3):
        batch = slice(first, first + 3)
        tally.add(sparse([code[batch].flatten(0, 1).clone()]), outlier[batch], None)
    table = feature_table(random_sae("standard", d_sae=5), tally)
    assert table.only_first.tolist() == [True, False, False, False, False]
    assert tally.at_first.tolist() == [6, 6, 0, 0, 0] and tally.count.tolist() == [0, 1, 1, 0, 0]
    assert tally.n_first_active == 12 and tally.n_outliers == 1 and tally.n_tokens == 23
    assert table.best.context[1, 0].tolist() == [0.0, 2.0, 0.0]


# The decoder


@pytest.mark.parametrize("rows", [5, 1024])
def test_nearest_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_core.evaluation.features.ROWS", rows)
    W = torch.randn(23, 8, generator=torch.Generator().manual_seed(0))
    W[7] = 3 * W[4]
    found, cosines = nearest(W, 3)
    all_cosines = torch.cosine_similarity(W[:, None], W[None], dim=-1).fill_diagonal_(-2)
    torch.testing.assert_close(cosines, all_cosines.topk(3).values)
    assert found[7, 0] == 4 and found[4, 0] == 7


def test_logit_effects_are_those_of_the_unembedding(
    language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to a factor, with the final normalisation's weights folded in."""
    directions = an_sae().W_dec[:40]
    model: Any = language_model.model
    expected = (directions * model.model.norm.weight) @ model.lm_head.weight.T
    tokens = torch.tensor([3, 0, 77])
    monkeypatch.setattr("sae_core.evaluation.features.LOGITS", 30)
    rows, found = zip(*logit_effects(language_model, directions, tokens), strict=True)
    assert torch.equal(torch.cat(rows), torch.arange(40)) and len(rows) == 4
    factor = WIDTH**0.5
    expected = factor * expected[:, tokens]
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-3, atol=1e-3)


def test_biases_cancel_in_logit_effects(
    language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every part of the rows."""
    monkeypatch.setattr("sae_core.evaluation.features.LOGITS", 30)
    directions, tokens = an_sae().W_dec[:40], torch.tensor([3, 0, 77])

    def effects() -> torch.Tensor:
        return torch.cat([found for _, found in logit_effects(language_model, directions, tokens)])

    without, unembed = effects(), language_model.unembed
    bias = torch.tensor([1.0, -2.0, 3.0])
    monkeypatch.setattr(language_model, "unembed", lambda *given: unembed(*given) + bias)
    torch.testing.assert_close(effects(), without)


# What is shown


@pytest.fixture(scope="module")
def writer(language_model: LanguageModel, corpus: Corpus, table: FeatureTable) -> Writer:
    return Writer(language_model, an_sae(), corpus, table)


def test_an_entry_shows_the_windows_of_its_feature(
    writer: Writer, table: FeatureTable, corpus: Corpus, dense: Dense
) -> None:
    feature = int(table.tally.windows.argmax())
    [entry] = writer.entries([feature])
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry
    assert entry["max"] == pytest.approx(float(dense.code[..., feature].max()), rel=1e-3)
    assert len(entry["top"]) == SHOWN.top_windows
    for window in entry["top"] + entry["quantiles"]:
        assert len(window["tokens"]) == len(window["activations"]) <= SHOWN.context_tokens
        assert window["activations"][window["peak"]] > 0
        source = corpus.file.texts[window["text"]]
        assert window["tokens"][window["peak"]].strip() in f"{source}<|endoftext|>"
        assert window["chapter"] == ("a.md" if window["text"] < 2 else "b.md")
    peaks = [window["activations"][window["peak"]] for window in entry["quantiles"]]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] < entry["max"]
    assert sum(entry["histogram"]["counts"]) == entry["tokens"]
    assert sum(entry["subjects"].values()) == pytest.approx(1, abs=1e-3)
    promoted = [value for _, value in entry["promoted"]]
    suppressed = [value for _, value in entry["suppressed"]]
    assert promoted == sorted(promoted, reverse=True) and suppressed == sorted(suppressed)
    assert promoted[0] > 0 > suppressed[0]


def test_figures_of_the_corpus(writer: Writer, table: FeatureTable, dense: Dense) -> None:
    figures = writer.corpus_figures()
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert figures["n_tokens"] == int(dense.counted.sum())
    active = dense.code > 0
    assert figures["l0"] == pytest.approx(float(active.sum()) / figures["n_tokens"], rel=1e-3)
    assert sum(figures["similarity"]["nearest_cosine"]["counts"]) == figures["active"]
    jaccards = [jaccard for _, _, _, jaccard, *_ in figures["co_occurrence"]["pairs"]]
    assert jaccards == sorted(jaccards, reverse=True)
    subjects = figures["subjects"]
    assert sum(s["tokens"] for s in subjects.values()) == figures["n_tokens"]
    assert len(subjects["physics"]["most_active"]) <= subjects["physics"]["specific_features"]


def test_every_feature_has_a_row(writer: Writer, table: FeatureTable) -> None:
    rows = list(csv.DictReader(io.StringIO(writer.rows())))
    assert [int(row["feature"]) for row in rows] == list(range(table.tally.n_features))
    assert [int(row["tokens"]) for row in rows] == table.tally.count.tolist()
    assert {"share_physics", "share_biology"} <= set(rows[0])
    entries = {entry["feature"]: entry for entry in writer.entries(writer.telling_order())}
    assert set(entries) == set(table.active.nonzero().squeeze(1).tolist())
    assert all(entries[f]["label"] == rows[f]["label"] != "" for f in entries)
    silent = [row["label"] for row in rows if int(row["feature"]) not in entries]
    assert set(silent) <= {"never active", "position 0 only"}


def test_without_sources_there_are_no_subjects(
    language_model: LanguageModel, corpus: Corpus
) -> None:
    plain = corpus._replace(file=in_memory(language_model.tokenizer, list(corpus.file.texts)))
    table = tallied(language_model, an_sae(), plain)
    writer = Writer(language_model, an_sae(), plain, table)
    entry = next(writer.entries(writer.telling_order()))
    assert entry["subjects"] == {} and entry["top"][0]["chapter"] is None
    assert "share_" not in writer.rows() and writer.corpus_figures()["subjects"] == {}


def test_a_feature_that_is_never_active_breaks_nothing(
    language_model: LanguageModel, corpus: Corpus
) -> None:
    sae = an_sae()
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    table = tallied(language_model, sae, corpus)
    writer = Writer(language_model, sae, corpus, table)
    json.dumps(writer.corpus_figures(), allow_nan=False)
    assert writer.telling_order() == []
    json.dumps(next(writer.entries([3])), allow_nan=False)
    assert len(writer.rows().splitlines()) == 1 + sae.spec.d_sae


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"<0x{token:02X}>"


def test_characters_of_several_tokens_are_whole() -> None:
    pieces = Pieces(Bytes()).of(list("a₂ b→".encode()))
    assert pieces == ["a", "", "", "₂", " ", "b", "", "", "→"]
    assert Pieces(Bytes()).of([0xE2, 0x61, 0xC2]) == ["‹E2›", "a", "‹C2›"]
    words = Words(Pieces(Bytes()), torch.tensor([list("a b→, c".encode())]), 0)
    names, before = ([words.names[i] for i in row] for row in (words.ids, words.before))
    assert names == ["a", "b", "b", "→", "→", "→", ",", "c", "c"]
    assert before[3:7] == ["b", "b", "b", "→"]
    cut = Pieces(Bytes()).of(list("→₂→".encode()[1:-1]))
    assert cut == ["‹86›", "‹92›", "", "", "₂", "‹E2›", "‹86›"], "only what is cut is not whole"
