"""From Markdown chapters to texts: each method, what is dropped, each error."""

import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from processed import LETTERS, run

from sae_core.data_processing.cleaning import clean
from sae_core.data_processing.counts import Counts
from sae_core.data_processing.sources import Dropped
from sae_core.data_processing.textbook_process import ProcessConfig, process
from sae_core.data_processing.texts import read_texts
from sae_core.utils.errors import SAEError

ROOT = Path(__file__).resolve().parents[2]
AS_FILE = ["sae_core/data_processing/textbook_process.py"]
AS_MODULE = ["-m", "sae_core.data_processing.textbook_process"]

SUN = "The Sun is a star that shines by fusion."
MOON = "The Moon goes round the Earth once in a month."


def command(how: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, *how, *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


def test_short_and_repeated_texts(tmp_path: Path) -> None:
    report = run(tmp_path / "in", f"{SUN}\n\n(a) (b) 1 2 3 x y\n\n{MOON}", SUN.upper())
    assert report.texts == [SUN, MOON]
    assert report.sources.dropped == {"too short": Dropped(1, 7), "duplicate": Dropped(1, 9)}
    assert run(tmp_path / "in", min_words=9).texts == [MOON]


def test_dropped_pieces_are_counted(tmp_path: Path) -> None:
    chapter = f"# On stars\n\n![](s.jpg)\n\n***\n\n17\n\n1.1 Moons\n\n<table></table>\n\n{SUN}"
    counts = Counts()
    assert clean(chapter, counts) == [[SUN]]
    assert counts.dropped == {
        "heading": ["On stars"],
        "image": ["![](s.jpg)"],
        "markup only": ["***"],
        "outline entry": ["1.1 Moons"],
        "page number": ["17"],
        "table": [""],
    }
    counted = run(tmp_path / "in", chapter, f"# On moons\n\n# Rings\n\n{MOON}").sources.dropped
    assert counted["heading"] == Dropped(pieces=3, words=5)
    assert {reason: what.pieces for reason, what in counted.items()} == {
        reason: 3 if reason == "heading" else 1 for reason in counts.dropped
    }


def test_order_of_folders_and_files(tmp_path: Path) -> None:
    for place in ("b/2.md", "b/1.md", "a/1.md", "a/1.txt"):
        file = tmp_path / place
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"The text of {place} is here.")
    config = ProcessConfig(folders=(tmp_path / "b", tmp_path / "a"), output=tmp_path / "texts.json")
    report = process(config)
    assert report.texts == [f"The text of {p} is here." for p in ("b/1.md", "b/2.md", "a/1.md")]
    assert report.chapters == [tmp_path / p for p in ("b/1.md", "b/2.md", "a/1.md")]
    assert read_texts(config.output) == report.texts


def test_names_in_any_case_and_nested_folders_by_a_pattern(tmp_path: Path) -> None:
    for place in ("b.MD", "a.Markdown", "x.txt", "~a.md", "part/c.md", "part/.git/d.md", "e.mdx"):
        file = tmp_path / "in" / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"The text of {place} is here.")

    def read(pattern: str) -> list[str]:
        config = ProcessConfig((tmp_path / "in",), output=tmp_path / "t.json", pattern=pattern)
        return [chapter.file for chapter in process(config).sources.chapters]

    assert read("*") == ["in/a.Markdown", "in/b.MD"]
    assert read("**/*") == ["in/a.Markdown", "in/b.MD", "in/part/c.md"]
    assert read("p*/*") == ["in/part/c.md"]
    done = command(AS_FILE, "--folders", tmp_path / "in", "--output", tmp_path / "t.json")
    _, _, says = done.stdout.partition("passed over")
    assert says.split()[0] == "4"
    assert [line.partition(": ")[0].split("/in/")[1] for line in says.splitlines()[1:]] == [
        "e.mdx",
        "part",
        "x.txt",
        "~a.md",
    ]


@pytest.mark.parametrize("pattern", ["/etc/*", "../*", "", "part_**/*"])
def test_a_pattern_stays_in_the_folder(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(SAEError, match="^--pattern"):
        ProcessConfig((tmp_path,), pattern=pattern)


def test_method_lines(tmp_path: Path) -> None:
    chapter = (
        "# INTRODUCTION TO IT Learn\nthese:\n• stars\n• moons and\nrings\n\nIt\nshines.\n"
        "1. It sets.\n\nalpha  \nbeta\\\ngamma"
    )
    texts = ["Learn these:", "stars", "moons and rings", "It shines.", "1. It sets.", *LETTERS]
    assert run(tmp_path / "in", chapter, method="lines", min_words=1).texts == texts


def test_method_sentences(tmp_path: Path) -> None:
    sentences = [
        "Dr. J. B. Smith of the U.S. Navy saw 3.5 stars, e.g. Vega (cf. Fig. 3), et al. He did.",
        "1. Is it so?",
        "“It is.”",
        "It cools...",
        "(b) How?",
        "Élan.",
    ]
    chapter = " ".join(sentences)
    assert run(tmp_path / "in", chapter, method="sentences", min_words=1).texts == sentences


@pytest.mark.parametrize(
    ("size", "overlap"), [(1, 0), (7, 3), (20, 0), (20, 19), (60, 30), (999, 9)]
)
def test_method_chunks(tmp_path: Path, size: int, overlap: int) -> None:
    chapter = f"{SUN}\n\n{MOON}"
    settings = {"method": "chunks", "chunk_size": size, "chunk_overlap": overlap}
    chunks = run(tmp_path / "in", chapter, **settings).texts
    text, start = f"{SUN}\n{MOON}", 0
    for before, chunk in zip([None, *chunks], chunks, strict=False):
        end = start + len(before) if before else 0
        start = text.index(chunk, max(0, end - overlap))
        assert start - end <= 1
        assert len(chunk) <= size or not any(map(str.isspace, chunk))
        assert set(chunk.split()) <= set(text.split())
    assert text.endswith(chunks[-1])


def test_overlap_of_chunks(tmp_path: Path) -> None:
    settings = {"method": "chunks", "chunk_size": 20, "chunk_overlap": 9}
    chunks = run(tmp_path / "in", SUN, **settings).texts
    assert chunks == [
        "The Sun is a star",
        "is a star that",
        "star that shines by",
        "shines by fusion.",
    ]


def test_one_chapter_at_a_time_is_in_memory(tmp_path: Path) -> None:
    peaks = []
    for n in (2, 8):
        chapters = ["\n\n".join(f"{SUN} {c} {i} {'x' * 999}" for i in range(300)) for c in range(n)]
        for number, chapter in enumerate(chapters):
            (tmp_path / f"{number}.md").write_text(chapter)
        size = len(chapters[0])
        del chapters, chapter
        tracemalloc.start()
        report = process(ProcessConfig(folders=(tmp_path,), output=tmp_path / "texts.json"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert report.sources.chapters[-1].texts == 300
    assert peaks[1] - peaks[0] < size  # six chapters more


def test_a_chapter_that_cannot_be_read_leaves_the_earlier_texts(tmp_path: Path) -> None:
    run(tmp_path / "in", SUN, MOON)
    (tmp_path / "in" / "chapter_1.md").write_bytes(b"\xff")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(SAEError, match="chapter_1.md: not UTF-8"):
        run(tmp_path / "in")
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_same_chapters_same_bytes(tmp_path: Path) -> None:
    output = tmp_path / "texts.json"
    written = [run(tmp_path / "in", SUN, MOON) and output.read_bytes() for _ in range(2)]
    assert written[0] == written[1]


@pytest.mark.parametrize("how", [AS_FILE, AS_MODULE], ids=["file", "module"])
def test_command(tmp_path: Path, how: list[str]) -> None:
    output = tmp_path / "new" / "texts.json"
    (tmp_path / "1.md").write_text(f"# On stars\n\n{SUN}\n\n{MOON}")
    done = command(how, "--folders", tmp_path, "--output", output, "--method", "sentences")
    assert (done.returncode, done.stderr) == (0, "")
    assert read_texts(output) == [SUN, MOON]
    rows = [line.split() for line in done.stdout.splitlines()]
    for row in (["chapters", "1"], ["texts", "2"], ["words", "19"], ["heading", "1", "2"]):
        assert row in rows


ERRORS = {
    "missing folder": (["--folders", "{0}/no"], "--folders {0}/no: no such folder"),
    "a file": (["--folders", "{0}/bad/1.md"], "--folders {0}/bad/1.md: no such folder"),
    "no chapters": (["--folders", "{0}/empty"], "--folders {0}/empty: contains no .md file"),
    "not UTF-8": (["--folders", "{0}/bad"], "{0}/bad/1.md: not UTF-8 (byte 3)"),
    "nothing left": (
        ["--folders", "{0}/good", "--min-words", "99"],
        "--folders {0}/good: nothing is left of the chapters after cleaning",
    ),
    "overlap": (
        ["--chunk-size", "50", "--chunk-overlap", "50"],
        "--chunk-overlap 50: must be below --chunk-size 50",
    ),
    "negative overlap": (["--chunk-overlap", "-1"], "--chunk-overlap -1: must be at least 0"),
    "size": (["--chunk-size", "0"], "--chunk-size 0: must be at least 1"),
    "words": (["--min-words", "0"], "--min-words 0: must be at least 1"),
    "no folders": (["--folders"], "--folders: give at least one folder"),
    "unwritable": (["--folders", "{0}/good", "--output", "{0}/good/1.md/t"], "cannot be written"),
}


@pytest.mark.parametrize(("arguments", "says"), ERRORS.values(), ids=ERRORS.keys())
def test_error(tmp_path: Path, arguments: list[str], says: str) -> None:
    for name in ("empty", "bad", "good"):
        (tmp_path / name).mkdir()
    (tmp_path / "bad" / "1.md").write_bytes(b"caf\xe9 is not UTF-8")
    (tmp_path / "good" / "1.md").write_text(SUN)
    output = tmp_path / "texts.json"
    output.write_text("earlier")
    words = [word.format(tmp_path) for word in arguments]
    done = command(AS_FILE, *([] if "--output" in words else ["--output", output]), *words)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert says.format(tmp_path) in done.stderr
    assert done.stderr.count("\n") == 1
    assert output.read_text() == "earlier"


def test_wrong_method_is_a_usage_error() -> None:
    done = command(AS_FILE, "--method", "words")
    assert done.returncode == 2
    assert "--method" in done.stderr


def test_torch_stays_out() -> None:
    code = "import sys, sae_core.data_processing.textbook_process; sys.exit('torch' in sys.modules)"
    assert command(["-c", code]).returncode == 0
