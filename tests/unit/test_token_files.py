"""Tokenised texts: the same windows as from lists of texts, whatever the processes and batches."""

import errno
import hashlib
import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from by_definition import in_memory, split_texts, stream
from running import run_here
from tiny_model import tokenizer
from transformers import ByT5Tokenizer

from sae_core.activations.token_windows import TokenWindows, corpus_notes, token_windows
from sae_core.corpus import tokenise as module
from sae_core.corpus.cache import cached_tokens
from sae_core.corpus.corpora import json_list
from sae_core.corpus.split import Split
from sae_core.corpus.token_file import TokenFile, check_tokenizer
from sae_core.corpus.token_manifest import TokenManifest
from sae_core.corpus.tokenise import Corpus, tokenise
from sae_core.corpus.tokens import Tokens
from sae_core.data_processing.sources import Chapter, Sources
from sae_core.data_processing.textbook_process import chunks
from sae_core.data_processing.texts import write_texts
from sae_core.models.tokenizers import tokenizer_sha256
from sae_core.train_config import DataConfig
from sae_core.utils.errors import SAEError

LENGTH = 32
SUBJECTS = ("physics", "biology")


def written(folder: Path, texts: list[str], name: str = "texts.json") -> Corpus:
    write_texts(folder / name, texts)
    return json_list(folder / name, "--data-path")


def opened(corpus: Corpus, made: Any, folder: Path, processes: int = 1) -> TokenFile:
    tokenise(corpus, made, folder, processes)
    return TokenFile.open(folder)


def every_window(windows: TokenWindows) -> list[torch.Tensor]:
    some = [windows.train(p, torch.arange(windows.n_train)) for p in (0, 1)]
    return [*some, windows.validation(), windows.evaluation()]


@pytest.fixture(scope="module")
def chapters(root: Path) -> dict[str, list[str]]:
    """The texts of two chapters, apart and overlapping."""
    raw = [root / f"sae_core/data/raw_data/{s}_chapters/chapter_01.md" for s in SUBJECTS]
    read = [path.read_text(encoding="utf-8") for path in raw]
    return {
        "paragraphs": [text for chapter in read for text in chapter.split("\n\n") if text.strip()],
        "chunks": [text for chapter in read for text in chunks(chapter, 400, 250)],
    }


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("method", ["paragraphs", "chunks"])
@pytest.mark.parametrize("val_fraction", [0.0, 0.1, 0.5])
def test_windows_are_those_of_the_joined_texts(
    method: str, bos: bool, val_fraction: float, chapters: dict[str, list[str]], tmp_path: Path
) -> None:
    """Also where chunks overlap, so that a text is cut where its neighbour is on the other side."""
    texts = chapters[method]
    made = tokenizer(" ".join(texts[:20]), bos)
    file = opened(written(tmp_path, texts), made, tmp_path / "tokens")
    windows = token_windows(file, made, DataConfig(LENGTH, val_fraction, 7))
    sides = split_texts(texts, val_fraction, 7)
    parts = [stream(made, side) if side else torch.empty(0).int() for side in sides]
    expected = TokenWindows(*parts, LENGTH, 7, 1 if bos else None)
    assert windows.n_train > 100 and bool(windows.n_evaluation) == bool(val_fraction)
    for found, wanted in zip(every_window(windows), every_window(expected), strict=True):
        assert torch.equal(found, wanted)
    split = Split(file, val_fraction, 7)
    assert ([*split.texts(False)], [*split.texts(True)]) == sides


@pytest.mark.parametrize(
    ("method", "expected"), [("paragraphs", "26b18fc4cc2ce3b8"), ("chunks", "5f866e38e63a30d1")]
)
def test_windows_of_the_sample_chapters_stay_the_same(
    method: str, expected: str, chapters: dict[str, list[str]]
) -> None:
    """As windows were made before there were token files."""
    made = ByT5Tokenizer()
    windows = token_windows(in_memory(made, chapters[method]), made, DataConfig(128, 0.1, 0))
    digest = hashlib.sha256()
    for part in every_window(windows):
        digest.update(part.numpy().tobytes())
    assert digest.hexdigest()[:16] == expected


def test_processes_and_batches_change_nothing(
    texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, corpus = tokenizer(" ".join(texts)), written(tmp_path, texts)
    first = opened(corpus, made, tmp_path / "a")
    monkeypatch.setattr(module, "BATCH_TEXTS", 5)
    assert opened(corpus, made, tmp_path / "b", 3).manifest == first.manifest
    assert opened(corpus, made, tmp_path / "c", 1).manifest == first.manifest
    assert torch.equal(torch.from_numpy(np.array(first.tokens)), stream(made, texts).int())
    assert [*first.texts] == texts and first.texts[-1] == texts[-1]


def test_what_the_manifest_says(texts: list[str], tmp_path: Path) -> None:
    made = tokenizer(" ".join(texts), bos=True)
    given = ["", texts[0], " \n\t", f"{texts[1]} <|endoftext|>", "\u2003", f"<bos> {texts[2]}"]
    corpus = written(tmp_path, given)
    file = opened(corpus, made, tmp_path / "tokens")
    found = file.manifest
    assert found is not None and [*file.texts] == [text for text in given if text.strip()]
    assert (found.n_texts, found.n_empty, found.n_spelled, found.spelled) == (
        3,
        3,
        2,
        "<|endoftext|>",
    )
    assert (found.bos, found.end_of_text, found.n_tokens) == (1, 0, len(file.tokens))
    assert found.data_sha256 == hashlib.sha256((tmp_path / "texts.json").read_bytes()).hexdigest()
    assert corpus_notes(file, DataConfig(LENGTH, 0.0, 0)) == [
        "empty texts: 3 of 6, left out",
        "texts that contain a control token: 2, such as <|endoftext|>; it is read as text",
    ]
    [note] = corpus_notes(in_memory(made, texts), DataConfig(LENGTH, 0.5, 0))
    assert note == "held-out text that also occurs in training texts: 0.0%"
    starts = file.starts.tolist()
    assert file.text_of(np.array([0, starts[1] - 1, starts[1]])).tolist() == [0, 0, 1]


def test_every_text_knows_its_chapter(texts: list[str], tmp_path: Path) -> None:
    write_texts(tmp_path / "texts.json", [texts[0], "", *texts[1:4]])
    chapters = (Chapter("a", "a.md", 2, 1), Chapter("b", "b.md", 0, 0), Chapter("a", "c.md", 3, 1))
    Sources(chapters, {}).save(tmp_path / "texts.json")
    corpus = json_list(tmp_path / "texts.json", "--data-path")
    file = opened(corpus, tokenizer(" ".join(texts)), tmp_path / "tokens")
    assert file.origins is not None and file.origins.tolist() == [0, 2, 2, 2]
    words = [len(text.split()) for text in texts]
    assert file.sources is not None and file.sources.chapters == (
        Chapter("a", "a.md", 1, words[0]),
        Chapter("b", "b.md", 0, 0),
        Chapter("a", "c.md", 3, sum(words[1:4])),
    ), "the empty text is left out"


def test_max_tokens(texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_TEXTS", 3)
    made = tokenizer(" ".join(texts))
    whole = in_memory(made, texts)
    for most in (1, int(whole.starts[4]), int(whole.starts[4]) + 1, 10**9):
        corpus = written(tmp_path, texts)._replace(max_tokens=most)
        file = opened(corpus, made, tmp_path / "tokens")
        n = min(len(texts), int(np.searchsorted(whole.starts, most)))
        assert [*file.texts] == texts[:n] and len(file.tokens) == whole.starts[n]
        assert len(file.tokens) >= min(most, len(whole.tokens)) > whole.starts[n - 1]


def test_blank_texts_alone(texts: list[str], tmp_path: Path) -> None:
    made = tokenizer(" ".join(texts))
    with pytest.raises(SAEError, match=r"texts\.json: has no text that is not empty"):
        tokenise(written(tmp_path, [" ", "\n"]), made, tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


# What identifies a tokenizer


def test_a_tokenizer_is_what_it_does(texts: list[str], tmp_path: Path) -> None:
    made = tokenizer(" ".join(texts))
    same = tokenizer(" ".join(texts))
    same.chat_template, same.model_max_length = "{{ messages }}", 5
    same("a text", truncation=True, max_length=1)
    assert tokenizer_sha256(same) == tokenizer_sha256(made)
    made.save_pretrained(tmp_path)
    assert tokenizer_sha256(type(made).from_pretrained(tmp_path)) == tokenizer_sha256(made)
    others = [tokenizer(" ".join(texts), bos=True), tokenizer(" ".join(texts[3:])), ByT5Tokenizer()]
    ended = tokenizer(" ".join(texts))
    ended.eos_token = "a"
    assert len({tokenizer_sha256(t) for t in (made, *others, ended)}) == 5


def test_tokens_of_another_tokenizer_are_refused(texts: list[str], tmp_path: Path) -> None:
    made, other = tokenizer(" ".join(texts)), tokenizer(" ".join(texts), bos=True)
    file = opened(written(tmp_path, texts), made, tmp_path / "tokens")
    check_tokenizer(tmp_path / "tokens", file, made)
    with pytest.raises(SAEError, match="--tokens .*tokens: made with another tokenizer"):
        check_tokenizer(tmp_path / "tokens", file, other)


# Files


@pytest.mark.parametrize("name", ["tokens.bin", "token_starts.bin", "texts.bin", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "changed"])
def test_a_damaged_file(name: str, damage: str, texts: list[str], tmp_path: Path) -> None:
    tokenise(written(tmp_path, texts), tokenizer(" ".join(texts)), tmp_path / "tokens")
    path = tmp_path / "tokens" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"empty": b"", "cut": content[:-9]}.get(damage, bytes(content)))
    if damage == "missing":
        path.unlink()
    if name == "texts.bin" and damage != "missing":  # read through only where a text is wanted
        return
    with pytest.raises(SAEError, match=f"tokens/{name}: "):
        TokenFile.open(tmp_path / "tokens")


def test_a_failure_leaves_what_was_there(texts: list[str], tmp_path: Path) -> None:
    made = tokenizer(" ".join(texts))
    corpus = written(tmp_path, texts)
    tokenise(corpus, made, tmp_path / "tokens")
    before = TokenManifest.load(tmp_path / "tokens")
    broken = (tmp_path / "texts.json").read_text().rstrip("]\n") + ",\n3]"
    (tmp_path / "texts.json").write_text(broken)
    with pytest.raises(SAEError, match="item 24 .* is a JSON number"):
        tokenise(corpus, made, tmp_path / "tokens")
    assert TokenManifest.load(tmp_path / "tokens") == before
    assert {path.name for path in tmp_path.iterdir()} == {"texts.json", "tokens"}


def test_a_process_that_is_killed(
    texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_TEXTS", 3)
    monkeypatch.setattr(Tokens, "spelled", lambda self, text: os.kill(os.getpid(), 9))
    with pytest.raises(SAEError, match="a process that tokenises was killed"):
        tokenise(written(tmp_path, texts), tokenizer(" ".join(texts)), tmp_path / "tokens", 2)
    assert not (tmp_path / "tokens").exists()


def test_processes_end_with_the_one_that_started_them(
    texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_TEXTS", 3)
    monkeypatch.setattr(module, "WATCH", 0.01)
    corpus, made = written(tmp_path, texts), tokenizer(" ".join(texts))
    (tmp_path / "pids").mkdir()

    def noted(tokens: Tokens, some: Any) -> Any:
        (tmp_path / "pids" / str(os.getpid())).touch()
        time.sleep(90)

    monkeypatch.setattr(Tokens, "packed", noted)
    parent = os.fork()
    if not parent:
        tokenise(corpus, made, tmp_path / "tokens", 2)
        os._exit(0)
    wait_until(lambda: len([*(tmp_path / "pids").iterdir()]) == 2)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    children = [int(path.name) for path in (tmp_path / "pids").iterdir()]
    wait_until(lambda: not any(map(runs, children)))


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def runs(pid: int) -> bool:
    """Whether a process has not ended; one that nobody has asked about may still be listed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("processes", "options"),
    [(2, []), (1, ["--max-tokens", "1500"]), (1, ["--subject-field", "subject"])],
)
def test_a_command_that_is_killed_goes_on_where_it_was(
    processes: int,
    options: list[str],
    texts: list[str],
    tiny_model: Path,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "BATCH_TEXTS", 2)
    monkeypatch.setattr(module, "STORE_SECONDS", 0.0)
    records = [{"text": t, "subject": SUBJECTS[i // 3 % 2]} for i, t in enumerate(texts)]
    records[3:3] = [{"text": " ", "subject": "none"}] * 2
    lines = [json.dumps(record) for record in records]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    words = ["--data-path", tmp_path / "texts.jsonl", "--tokenizer", tiny_model, *options]
    words += ["--processes", processes]

    def ends(strike: int | None) -> bool:
        """Whether the command ends by itself; it is killed as it is about to add a batch."""
        child = os.fork()
        if not child:
            kill_at(monkeypatch, tmp_path / "added", strike)
            run_here(root / "scripts/tokenize_corpus.py", *words, "--output", tmp_path / "tokens")
            os._exit(0)
        return os.waitpid(child, 0)[1] == 0

    run_here(root / "scripts/tokenize_corpus.py", *words, "--output", tmp_path / "whole")
    tries = 1
    while not ends(3 if tries < 9 else None):
        tries += 1
    assert contents(tmp_path / "tokens") == contents(tmp_path / "whole")
    n_batches = -(-TokenManifest.load(tmp_path / "whole").n_texts // 2)
    n_added = len((tmp_path / "added").read_text().split())
    assert tries > 1 and n_added == n_batches + tries - 1, "only the last batch comes again"
    assert {path.name for path in tmp_path.iterdir()} == {
        *("texts.jsonl", "tokens", "whole", "added")
    }


def kill_at(patch: pytest.MonkeyPatch, note: Path, strike: int | None) -> None:
    """Note every batch that is added to a folder of tokens, and have this process killed at one."""
    add, count = module.Writer.add, itertools.count(1)

    def struck(self: Any, batch: Any, most: int | None) -> None:
        with note.open("a") as file:
            file.write("batch\n")
        if next(count) == strike:
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, batch, most)

    patch.setattr(module.Writer, "add", struck)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("change", ["texts", "tokenizer", "code", "state", "cut"])
def test_the_beginning_of_something_else_is_not_used(
    change: str, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_TEXTS", 3)
    monkeypatch.setattr(module, "STORE_SECONDS", 0.0)
    corpus, made = written(tmp_path, texts), tokenizer(" ".join(texts))
    spelled = Tokens.spelled

    def full(self: Tokens, text: str) -> str | None:
        if text == texts[13]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return spelled(self, text)

    with monkeypatch.context() as patch:
        patch.setattr(Tokens, "spelled", full)
        with pytest.raises(SAEError, match="No space left on device"):
            tokenise(corpus, made, tmp_path / "tokens", 1)
    begun = tmp_path / ".tokens.writing"
    assert json.loads((begun / "state.json").read_text())["written"]["n_texts"] == 12
    if change == "texts":
        corpus = written(tmp_path, texts[1:])
    elif change == "tokenizer":
        made = tokenizer(" ".join(texts), bos=True)
    elif change == "code":
        monkeypatch.setattr(module, "code_hash", lambda script: "another")
    elif change == "state":
        (begun / "state.json").write_text("{")
    else:
        (begun / "tokens.bin").write_bytes(b"")
    times: list[int] = []
    encode = Tokens.packed
    monkeypatch.setattr(
        Tokens, "packed", lambda self, some: times.append(len(some)) or encode(self, some)
    )
    tokenise(corpus, made, tmp_path / "tokens", 1)
    assert sum(times) == len(texts) - (change == "texts")
    tokenise(corpus, made, tmp_path / "whole", 1)
    assert contents(tmp_path / "tokens") == contents(tmp_path / "whole")


def test_the_same_texts_are_tokenised_once(
    texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    made, times = tokenizer(" ".join(texts)), []
    encode = Tokens.packed

    def counted(self: Tokens, some: Any) -> Any:
        times.append(len(some))
        return encode(self, some)

    monkeypatch.setattr(Tokens, "packed", counted)
    root = tmp_path / "root"
    first = cached_tokens(written(tmp_path, texts), made, root)
    again = cached_tokens(written(tmp_path, texts, "moved.json"), tokenizer(" ".join(texts)), root)
    assert again.manifest == first.manifest and times == [len(texts)]
    cached_tokens(written(tmp_path, texts[1:]), made, root)
    cached_tokens(written(tmp_path, texts), tokenizer(" ".join(texts), bos=True), root)
    assert len(times) == 3 and len([*root.iterdir()]) == 3
    for path in root.glob("*/tokens.bin"):
        path.write_bytes(b"")
    assert cached_tokens(written(tmp_path, texts), made, root).manifest == first.manifest
    assert "tokens.bin: missing, or not as it was written" in capsys.readouterr().out


def test_a_manifest_is_json(texts: list[str], tmp_path: Path) -> None:
    tokenise(written(tmp_path, texts), tokenizer(" ".join(texts)), tmp_path / "tokens")
    found = json.loads((tmp_path / "tokens/manifest.json").read_text())
    for name, sha256 in found["files"].items():
        content = (tmp_path / "tokens" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == sha256
