"""From Markdown chapters to texts: each rule of cleaning, each method, each error."""

import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from sae_core.data_processing.cleaning import clean
from sae_core.data_processing.counts import Counts
from sae_core.data_processing.sources import Dropped
from sae_core.data_processing.textbook_process import ProcessConfig, Report, process
from sae_core.data_processing.texts import read_texts
from sae_core.utils.errors import SAEError

ROOT = Path(__file__).resolve().parents[2]
AS_FILE = ["sae_core/data_processing/textbook_process.py"]
AS_MODULE = ["-m", "sae_core.data_processing.textbook_process"]

SUN = "The Sun is a star that shines by fusion."
LETTERS = ("alpha", "beta", "gamma")
MOON = "The Moon goes round the Earth once in a month."


def run(folder: Path, *chapters: str, **settings: Any) -> Report:
    """Process a folder of these chapters."""
    folder.mkdir(exist_ok=True)
    for number, chapter in enumerate(chapters):
        (folder / f"chapter_{number}.md").write_bytes(chapter.encode())
    output = folder.parent / "texts.json"
    return process(ProcessConfig(folders=(folder,), output=output, **settings))


def command(how: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, *how, *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


CLEANING = {
    "gutenberg": (
        "Title\n\n*** START OF THE PROJECT GUTENBERG EBOOK SKY,\nBY NOBODY ***\n\nShining stars."
        "\n\n*** END OF THE PROJECT GUTENBERG EBOOK SKY ***\n\nLicence.",
        ["Shining stars."],
    ),
    "old gutenberg": (
        "Etext\n*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\nShining "
        "stars.\n\nEnd of Project Gutenberg Etext Sky",
        ["Shining stars."],
    ),
    "byte-order mark": ("\ufeffShining stars.", ["Shining stars."]),
    "CRLF": ("Shining\r\nstars.\r\n\r\nMoons.\rRise.", ["Shining stars.", "Moons. Rise."]),
    "form feed": ("It shines.\fIt sets.", ["It shines.", "It sets."]),
    "odd spaces": ("a\u00a0star\u2009and\ta\u200b moon", ["a star and a moon"]),
    "soft hyphen": ("a super\u00adnova", ["a supernova"]),
    "ligatures only": ("de\ufb01ned as 5 m² or ½ kg", ["defined as 5 m² or ½ kg"]),
    "entities": ("Salt &amp; sea, Earth&#x27;s crust, AT&T", ["Salt & sea, Earth's crust, AT&T"]),
    "entity without end": (f"A star&#{'1' * 5000}; shines.", [f"A star&#{'1' * 5000}; shines."]),
    "HTML heading in a wrap": ("<h2>On <h1>stars</h1>\nshine.", ["shine."]),
    "HTML comment not closed": ("It <!-- shines <!-- and sets.", ["It <!-- shines <!-- and sets."]),
    "HTML table in a table": (
        "It is <table>a<table>b</table>c</table>so.</table>Moons",
        ["It is so.", "Moons"],
    ),
    "HTML tags": ("H<sub>2</sub>O <!-- not\nthis --> if a<b and c>d", ["H2O if a<b and c>d"]),
    "HTML line break": ("It shines<br/>and sets.", ["It shines and sets."]),
    "HTML blocks": ("<h2>On stars</h2><p>One.</p><p>Two.</p>", ["One.", "Two."]),
    "hyphenated word": ("a well-made temp-\nerature", ["a well-made temperature"]),
    "hyphen of its own": ("a well-\nmade one, well-made", ["a well-made one, well-made"]),
    "hyphen given up": ("a fire-\nfly, fire-fly, firefly", ["a firefly, fire-fly, firefly"]),
    "dash at the end": ("rock -\nroll", ["rock - roll"]),
    "hyphen after a digit": ("a 5-\nfold rise", ["a 5-fold rise"]),
    "hyphen at a hard break": ("a temper-  \nature", ["a temperature"]),
    "hyphen before a name": ("the trans-\nAlpine road", ["the trans- Alpine road"]),
    "hard wrap": ("The Sun\nis a\n12 km star.", ["The Sun is a 12 km star."]),
    "lost formulas": ("If  is  , then  ( ) holds (about  ) .", ["If is, then holds (about)."]),
    "lost formulas in a list": (", , Find x, , and y", ["Find x, and y"]),
    "heading": (
        "# On stars\n\nIt shines.\n\n### On moons ###\nIt sets.",
        ["It shines.", "It sets."],
    ),
    "underlined heading": ("On stars\n========\n\nIt shines.", ["It shines."]),
    "heading glued to the start": (
        "# INTRODUCTION TO STARS A star is\n\na ball of gas.",
        ["A star is a ball of gas."],
    ),
    "sentence in a heading": (
        "# INTRODUCTION A star is so big.\n\nIt shines.",
        ["A star is so big.", "It shines."],
    ),
    "heading in two cases": ("# INTRODUCTION Old and new\n\nIt shines.", ["It shines."]),
    "title in two cases": ("HEXAGONAL Crystal", ["HEXAGONAL Crystal"]),
    "rule under a sentence": ("It shines.\n---\nIt sets.", ["It shines.", "It sets."]),
    "plain heading glued to the start": ("INTRODUCTION A star shines.", ["A star shines."]),
    "heading before lower case": ("# Key Equations\n\ndensity of it", ["density of it"]),
    "acronym in a heading": ("# DNA Replication\n\nwhere it is", ["where it is"]),
    "heading that is a sentence": (
        "# You may take data from the pictures as exact.\n\nIt shines.",
        ["You may take data from the pictures as exact.", "It shines."],
    ),
    "heading glued to the end": (
        "It shines.# 1.2 Moons\n\nIn C# Programs",
        ["It shines.", "In C# Programs"],
    ),
    "image line": ("It shines.\n\n![A star](i/s_(1).jpg)\n\nIt sets.", ["It shines.", "It sets."]),
    "image in a line": ("It ![star](i/s.jpg)shines<img src='s.jpg'>.", ["It shines."]),
    "HTML table": ("<table><tr><td>1</td>\n\n</tr></table>\n\nIt sets.", ["It sets."]),
    "HTML table glued": (
        "It shines.<table><tr><td>1</td></tr></table>Moons",
        ["It shines.", "Moons"],
    ),
    "HTML table cut off": (
        "It shines.<table><tr><td>One cell\n\nIt sets.",
        ["It shines.", "It sets."],
    ),
    "Markdown table": (
        "| one |\n|---|\n| 2 |\n\none | two\n--|--\nsix | ten\n\n| one | two |\n\n|v| is.",
        ["|v| is."],
    ),
    "caption": (
        "It shines.  \nFIGURE 1.2 A star. (NASA)",
        ["It shines.", "FIGURE 1.2 A star. (NASA)"],
    ),
    "caption as heading": ("# Figure 1.2 A star.", ["Figure 1.2 A star."]),
    "figure in a wrap": ("It is in\nFigure 1.2 A.", ["It is in Figure 1.2 A."]),
    "mention of a figure": (
        "It is in\nFigure 1.2 and shines.",
        ["It is in Figure 1.2 and shines."],
    ),
    "fence": ("```python\nprint(1)\n```", ["print(1)"]),
    "rules and punctuation": (
        "It shines.\n\n***\n\n. , !\n\n- - -\n\nIt sets.",
        ["It shines.", "It sets."],
    ),
    "page number": (
        "It shines on the\n\n42\n\nEarth.\n\n- 43 -\n\nxliv",
        ["It shines on the", "Earth."],
    ),
    "page number within": ("It shines on the\n42\nEarth.", ["It shines on the Earth."]),
    "running header": (
        "12 Book of Stars\n\nIt shines.\n\nBook of Stars 13\n\nIt sets.\n\n14 Book of Stars",
        ["It shines.", "It sets."],
    ),
    "twice is no running header": (
        "Book of Stars\n\nIt shines.\n\nBook of Stars\n",
        ["Book of Stars", "It shines."],
    ),
    "repeated starts": (
        "\n\n".join(f"Now:\nThis is one line of more than eight words\n{n}." for n in LETTERS),
        [f"Now: This is one line of more than eight words {n}." for n in LETTERS],
    ),
    "repeated prose": (
        "So it is.\n\nAnd\n\nSo it is, yes.\n\nthus it\n",
        ["So it is.", "And", "So it is, yes.", "thus it"],
    ),
    "outline": (
        "1.1 On Stars   \n1.2 On Moons\n\nRings . . . . . 7\n\n1. It shines.",
        ["1. It shines."],
    ),
    "decimal in a wrap": (
        "It has about\n1.5 Suns of mass\nin it",
        ["It has about 1.5 Suns of mass in it"],
    ),
    "emphasis": (
        "**A *big* star**, __not__ _this_ `one`: 2*3*4, x_1, y_1",
        ["A big star, not this one: 2*3*4, x_1, y_1"],
    ),
    "links": (
        "See [here](http://x.y/a_(b)), [there][1] or [1]: [^2] rate = k[A][B].\n\n[1]: http://x.y",
        ["See here, there or [1]: rate = k[A][B]."],
    ),
    "complex ions": ("Take [Fe(CN)6](NO3) now", ["Take [Fe(CN)6](NO3) now"]),
    "escapes": (r"5 \* 3 and x\_1", ["5 * 3 and x_1"]),
    "quotation": ("> It shines\n> and sets.", ["It shines and sets."]),
    "bullets": ("Say:\n• one\n- two  • three\n* four", ["Say: one two three four"]),
    "section's name glued to the end": (
        "It shines.Key Terms  \n\nsun a star (here).Summary\n\nSee (1).Key Term\n\nIt.Key Termsof",
        ["It shines.", "sun a star (here).", "See (1).Key Term", "It.Key Termsof"],
    ),
    "kind of an exercise": (
        "38. Professional Application Dr. No saw it.\n\n39. Professional Application:\n\nIt sets."
        "\n\n4. Critical Thinking (a) Why?\n\n5. Critical Thinking is hard.",
        ["38. Dr. No saw it.", "It sets.", "4. (a) Why?", "5. Critical Thinking is hard."],
    ),
    "bare captions": (
        "It shines.\n\nFIGURE 1.2   \n\n# TABLE 3\n\nFig. 4.\n\nIt is in\nFigure 1.2\n\nFIGURE 5\n"
        "Moons",
        ["It shines.", "It is in Figure 1.2", "FIGURE 5 Moons"],
    ),
    "pointers to media": (
        "It shines. Click to view content (http://x.y/a)# Moons\n\nAccess multimedia content "
        "(http://x.y/a-b).\n\nClick to view content\n\nClick to view content now.",
        ["It shines.", "Click to view content now."],
    ),
    "prose in an HTML table": (
        "<table><tr><td>Sun</td><td colspan=2>The <b>Sun</b> is a star that shines by fusion.</td>"
        "<td>a rock that goes round the Earth&#x27;s middle</td><td>On Stars and Moons of the Sky, "
        "One Two</td></tr></table>",
        ["The Sun is a star that shines by fusion.", "a rock that goes round the Earth's middle"],
    ),
    "prose in a Markdown table": (
        "| Sun | is |\n|---|---|\n| The Sun is a star that shines by fusion. | big |\nSo it is.",
        ["The Sun is a star that shines by fusion.", "So it is."],
    ),
    "entry of a glossary as a heading": (
        "# anion a charged atom or molecule\n\n# pH, Buffers, Acids, and Bases\n\n"
        "moon a rock of the sky\n---\n\nIt sets.",
        ["anion a charged atom or molecule", "moon a rock of the sky", "It sets."],
    ),
    "page break": ("The Sun is a big\n\nstar.", ["The Sun is a big star."]),
    "page break within a word": ("The Sun is bril-\n\nliant.", ["The Sun is brilliant."]),
    "page break with a caption": (
        "The Sun is\n\nFIGURE 1.2 A star\n\na star.",
        ["The Sun is a star.", "FIGURE 1.2 A star"],
    ),
    "no page break": ("It shines.\n\nso it sets.", ["It shines.", "so it sets."]),
    "glossary": ("sun a star\n\nmoon a rock", ["sun a star", "moon a rock"]),
    "heading, no page break": (
        "It is given by\n\n# Law\n\nwhere it is",
        ["It is given by", "where it is"],
    ),
}


@pytest.mark.parametrize(("chapter", "texts"), CLEANING.values(), ids=CLEANING.keys())
def test_cleaning(tmp_path: Path, chapter: str, texts: list[str]) -> None:
    assert run(tmp_path / "in", chapter, min_words=1).texts == texts


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
