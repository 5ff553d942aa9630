"""Model cards, read as the Hub and as a stranger read them."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt
from published import FIGURES, METADATA, make_sae_directory
from synthetic import KINDS

from sae_core.labelling.label_files import write_labels
from sae_core.labelling.labels import Label
from sae_core.publishing.hub import run_files
from sae_core.publishing.model_card import BEGIN, END, SAEFacts, repo_card, sae_card
from sae_core.settings.services import RepoConfig
from sae_core.utils.errors import SAEError

NAME = "Qwen_Qwen3-0.6B.blocks.13.hook_resid_post.btop3sae.exp4"
REPO = RepoConfig(hf_repo_id="alice/saes", hf_license="mit", hf_dataset="alice/texts")


def facts(folder: Path, name: str = NAME, repo: RepoConfig = REPO, kind: str = "batch_topk"):
    made = make_sae_directory(folder / name, kind)
    return SAEFacts.read(made.folder, made.evaluation, repo)


def metadata(card: str) -> dict:
    empty, block, _ = card.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(block)


def rows(card: str) -> list[str]:
    return [line.split("](")[0][3:] for line in card.splitlines() if line.startswith("| [")]


@pytest.mark.parametrize("kind", KINDS)
def test_the_card_has_what_a_stranger_needs(kind: str, tmp_path: Path) -> None:
    about = facts(tmp_path, kind=kind)
    card = sae_card(about)
    assert metadata(card) == {
        "base_model": "Qwen/Qwen3-0.6B",
        "datasets": ["alice/texts"],
        "library_name": "saelens",
        "license": "mit",
        "tags": ["sparse-autoencoder", "saelens", "interpretability"],
    }
    for words in (
        f'load_pretrained("alice/saes/{NAME}")',
        f'SAE.from_pretrained("alice/saes", "{NAME}")',
        "| FVU | 0.1250 |",
        "| silent | 5.00% |",
        "| loss recovered, all spliced | 0.7330 |",
        "| loss recovered, sinks kept | 0.9330 |",
        "| left alone | 16 |",
        "| left alone, sinks kept | 21 |",
        "| loss recovered, by norm | 0.9300 |",
        f"| kind | {kind} |",
        "| lr | 0.001 |",
        "| seed | 420 |",
        f"| data sha256 | {METADATA['data_sha256']} |",
        f"| sha256 of weights.pt | `{about.weights_sha256}` |",
        about.spec.hook_spec,
    ):
        assert words in card, words
    assert "{" not in card and "None" not in card and "\n\n\n" not in card


def test_the_card_of_a_transcoder_names_both_hooks(tmp_path: Path) -> None:
    about = facts(tmp_path)
    about.spec.target_hook_name = "hook_mlp_out"
    card = sae_card(about)
    assert "A transcoder of the kind" in card and "A sparse autoencoder" not in card
    assert about.spec.hook_spec in card and "blocks.1.hook_mlp_out" in card
    assert "\n\n\n" not in card
    assert "`blocks.1.hook_resid_post-hook_mlp_out`" in repo_card(None, about, "alice/saes")


@pytest.mark.parametrize("target", ["", "hook_mlp_out"])
def test_the_card_says_which_activations_are_left_alone(target: str, tmp_path: Path) -> None:
    about = facts(tmp_path)
    assert "outliers" not in sae_card(about)
    about.spec.metadata |= {"outlier_norm": 1234.5678901}
    if target:
        about.spec.target_hook_name = target
        about.spec.metadata |= {"target_outlier_norm": 77.5}
    card = sae_card(about)
    assert "activations longer than 1234.57" in card and "SAELens has no such rule" in card
    assert ("77.5 at `blocks.1.hook_mlp_out`." in card) == bool(target)
    assert ("so does `sae(x)`" in card) != bool(target)
    assert "\n\n\n" not in card


def test_what_is_not_known_is_not_claimed(tmp_path: Path) -> None:
    repo = RepoConfig(hf_repo_id="alice/saes")
    about = facts(tmp_path, repo=repo)
    about.spec.metadata["model_name"] = "tiny"
    about.spec.metadata.pop("training")
    card = sae_card(replace(about, evaluation=None))
    assert set(metadata(card)) == {"library_name", "tags"}
    assert "It has not been evaluated." in card and "give the same SAE" not in card
    named = replace(about, repo=replace(repo, hf_base_model="Qwen/Qwen3-0.6B"))
    assert metadata(sae_card(named))["base_model"] == "Qwen/Qwen3-0.6B"


def test_a_label_is_shown_and_is_no_markup(tmp_path: Path) -> None:
    made = make_sae_directory(tmp_path / NAME)
    label = "![a](http://x.org/p.png) [b](http://x.org) <b> *c* `d` e|f \\\\ & ~~g~~ $h$"
    write_labels(tmp_path / "labels.jsonl", [Label(0, label, "", 0.5)])
    card = sae_card(SAEFacts.read(made.folder, made.evaluation, REPO, tmp_path / "labels.jsonl"))
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(card)
    [cell] = [t for t in tokens if t.type == "inline" and t.children and "p.png" in t.content]
    assert {t.type for t in cell.children} <= {"text", "text_special"}
    assert "".join(t.content for t in cell.children) == label


def test_labels_are_sent_and_the_card_says_how_good_they_are(tmp_path: Path) -> None:
    made = make_sae_directory(tmp_path / NAME)
    labels = tmp_path / "labels.jsonl"
    said = [Label(7, "a | <b>", "", 0.5, 0.75, 1.0), Label(8, status="refused"), Label(9, "c")]
    write_labels(labels, said)
    about = SAEFacts.read(made.folder, made.evaluation, REPO, labels)
    assert run_files(made.folder, made.evaluation, about)[f"{NAME}/labels.jsonl"] == labels
    card = sae_card(about)
    words = "2 of 3 features are labelled; mean detection 0.75; mean fuzzing 1.00; 1 refused."
    assert words in card and "features.csv" not in card and "\n\n\n" not in card
    assert "| 7 | a \\| &lt;b&gt; | 0.75 | 1.00 |\n| 9 | c | – | – |\n\n## How it was" in card
    without = SAEFacts.read(made.folder, made.evaluation, REPO)
    assert "numbered from 0 and have no names.\n\n## How" in sae_card(without)


def test_what_features_fire_on_is_sent_without_any_language_model(tmp_path: Path) -> None:
    made = make_sae_directory(tmp_path / NAME)
    table = tmp_path / "some.csv"
    table.write_text("feature,label\n0,photosynthesis (84%)\n")
    about = SAEFacts.read(made.folder, made.evaluation, REPO, features=table)
    assert run_files(made.folder, made.evaluation, about)[f"{NAME}/features.csv"] == table
    card = sae_card(about)
    assert "](./features.csv) says of every feature" in card and "labels.jsonl" not in card
    assert "\n\n\n" not in card


def test_the_repository_s_card_lists_every_sae_once(tmp_path: Path) -> None:
    names = [NAME.replace("13", "2"), NAME]
    card = repo_card(None, facts(tmp_path, names[1]), "alice/saes")
    card = repo_card(card, facts(tmp_path, names[0]), "alice/saes")
    assert rows(card) == names, "in order, layer 2 before layer 13"
    better = replace(facts(tmp_path), evaluation=FIGURES | {"fvu": 0.0625})
    renewed = repo_card(card, better, "alice/saes")
    assert rows(renewed) == names and "0.0625" in renewed
    assert repo_card(renewed, better, "alice/saes") == renewed, "nothing new, nothing changed"
    assert metadata(card)["base_model"] == ["Qwen/Qwen3-0.6B"]


def test_what_others_wrote_stays(tmp_path: Path) -> None:
    old = "---\nlicense: apache-2.0\ntags:\n- physics\n---\n\n# Ours\n\nBy Alice.\n"
    card = repo_card(old, facts(tmp_path), "alice/saes")
    card = card.replace("By Alice.", "By Alice and Bob.") + "\nThe end.\n"
    card = repo_card(card, facts(tmp_path, "another"), "alice/saes")
    assert "By Alice and Bob." in card and card.endswith("\nThe end.\n")
    assert metadata(card)["license"] == "apache-2.0" and "physics" in metadata(card)["tags"]
    assert "saelens" in metadata(card)["tags"] and set(rows(card)) == {NAME, "another"}
    assert rows(repo_card("just text", facts(tmp_path), "alice/saes")) == [NAME]


HEADING = "| SAE | language model |\n| --- | --- |\n"


@pytest.mark.parametrize(
    "old",
    [
        f"# Ours\n\nBefore.\n\n{BEGIN}\n\nThe end.\n",
        f"# Ours\n\nBefore.\n\n{BEGIN}\n{HEADING}| [one](./one) | a |\n\nThe end.\n",
        f"# Ours\n\nBefore.\n\n{END}\n\nThe end.\n",
        f"# Ours\n\nBefore.\n\n{END}\n{BEGIN}\n\nThe end.\n",
        f"Before.\n\n{BEGIN}\nThe end.\n{BEGIN}\n{HEADING}| [one](./one) | a |\n{END}\n",
        f"Before.\n\n{BEGIN}\n{HEADING}| [one](./one) | a |\n\nThe end.\n{END}\n",
    ],
)
def test_what_others_wrote_stays_whatever_became_of_the_marks(old: str, tmp_path: Path) -> None:
    card = repo_card(old, facts(tmp_path), "alice/saes")
    for words in ("Before.", "The end."):
        assert card.count(words) == 1
    assert set(rows(card)) == {NAME} | ({"one"} if "one" in old else set())
    again = repo_card(card, facts(tmp_path), "alice/saes")
    assert again == card, "nothing new, nothing changed"
    more = repo_card(card, facts(tmp_path, "another"), "alice/saes")
    assert set(rows(more)) == {*rows(card), "another"}
    assert all(more.count(words) == 1 for words in ("Before.", "The end."))


def test_a_card_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SAEError, match="README.md of alice/saes: .* fix it on the Hub"):
        repo_card("---\na: [\n---\n", facts(tmp_path), "alice/saes")
