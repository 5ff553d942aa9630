"""Cleaning by the Markdown parser: each construct, LaTeX and code as set, other scripts."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sae_core.data_processing.characters import count_long_words, count_words
from sae_core.data_processing.cleaning import clean
from sae_core.data_processing.counts import Counts
from sae_core.data_processing.lines import Settings
from sae_core.data_processing.process_config import ProcessConfig
from sae_core.data_processing.sources import Sources
from sae_core.data_processing.textbook_process import process


def cleaned(chapter: str, **settings: Any) -> list[str]:
    return ["|".join(lines) for lines in clean(chapter, Counts(), Settings(**settings))]


CONSTRUCTS = {
    "front matter": ("---\ntitle: Stars\nauthors: [Ann]\n---\n\nIt shines.", ["It shines."]),
    "front matter of dots": ("---\ntitle: Stars\n...\nIt shines.", ["It shines."]),
    "front matter of Hugo": ('+++\ntitle = "Stars"\n+++\nIt shines.', ["It shines."]),
    "a rule is no front matter": (
        "---\nIt shines and sets.\n\n---\n\nIt sets.",
        ["It shines and sets.", "It sets."],
    ),
    "escaped stars": (
        r"It is so (\*p < 0.05, \*\*p < 0.01).",
        ["It is so (*p < 0.05, **p < 0.01)."],
    ),
    "escaped brackets": (r"so it is \[sic\] now", ["so it is [sic] now"]),
    "stars between letters": ("5*3*2 and un**believ**able", ["5*3*2 and unbelievable"]),
    "strong glued to a word": ("**Note:**it shines.", ["Note:it shines."]),
    "tags of the keyboard and others": (
        "Press <kbd>Enter</kbd>, the <mark>marked</mark> <abbr title='x'>WHO</abbr> <q>one</q>.",
        ["Press Enter, the marked WHO one."],
    ),
    "details": (
        "<details open><summary>Answer</summary>\n\nIt is 5.\n</details>\nSo it is.",
        ["Answer", "It is 5.", "So it is."],
    ),
    "no tags": ("List<String> and <T>, a <b and c> d", ["List<String> and <T>, a <b and c> d"]),
    "Markdown between tags": ("<div class='a'>\nIt *shines*.\n</div>", ["It shines."]),
    "comment with blank lines": ("It is\n<!-- not\n\n# this -->\nso.", ["It is so."]),
    "comment before words": ("<!-- a\n\nb --> It shines.", ["It shines."]),
    "comment without end": ("<!-- It shines.\n\nIt sets.", ["<!-- It shines.", "It sets."]),
    "script": ("It<script>a\n\nb</script> shines.", ["It shines."]),
    "script of a block": ("<script>\na\n\nb\n</script>\nIt shines.", ["It shines."]),
    "image with a link in its words": (
        "![A star. Source: [Archive](http://x.y/a), and more](s.png) It shines.",
        ["It shines."],
    ),
    "image in a link": ("[![A star](s.png)](http://x.y) It shines.", ["It shines."]),
    "image with spaces in its address": ("![](figures/a star 1.png) It shines.", ["It shines."]),
    "image by reference": ("![A star][s] It shines.\n\n[s]: s.png", ["It shines."]),
    "address in angle brackets": ("see <https://x.y/a> now", ["see https://x.y/a now"]),
    "what Ann says": ("[Ann]: Yes\n\n[Bob]: No", ["[Ann]: Yes", "[Bob]: No"]),
    "footnotes": (
        "It shines.[^1] It sets[^b].\n\n[^1]: By day.\n[^b]: By night.\n\n    Often.\n\nSo it is.",
        ["It shines. It sets.", "By day.", "By night.", "Often.", "So it is."],
    ),
    "table without words under it": ("a | b\n--|--\n1 | 2\nSo it is.", ["So it is."]),
    "table of HTML in a cell": (
        "It is\n\n| <table>a | </table>b |\n|---|---|\n| <td>1 | 2 |\n\nso.",
        ["It is so."],
    ),
    "table of uneven rows": ("| a | b |\n|---|---|---|\n| 1 | 2 |\n\nSo it is.", ["So it is."]),
    "fence in a list": (
        "- one\n\n  ```\n  a  = 1\n    b\n  ```\n- two",
        ["one", "a  = 1\n  b", "two"],
    ),
    "fence without end": (
        "It shines\n```\nand sets.\n\nSo it is.",
        ["It shines and sets.", "So it is."],
    ),
    "heading mark in code": ("```\nx = 1 # One\n# Two\n```", ["x = 1 # One\n# Two"]),
    "pattern in code": ("`[^a-z]` and `a_b_c`", ["[^a-z] and a_b_c"]),
    "preformatted": (
        "<pre>\nif a &lt; b:\n  c\n</pre>\nIt shines.",
        ["if a < b:\n  c", "It shines."],
    ),
    "note of MyST": (
        "```{note}\n:class: a\nIt *shines*.\n```\nIt sets.",
        ["It shines.", "It sets."],
    ),
    "program of Quarto": ("```{python}\nprint(1)\n```", ["print(1)"]),
    "templates": (
        "::: {.callout-tip}\nIt shines.\n:::\n\n{% raw %}\n{{< video a >}}\n(label)=\nIt sets.",
        ["It shines.", "It sets."],
    ),
    "alert": ("> [!NOTE]\n> It shines.", ["It shines."]),
    "more than a number": (
        "> 5 kg is much.\n\n> It weighs\n> 5 kg.",
        ["> 5 kg is much.", "It weighs 5 kg."],
    ),
    "quotations in quotations": (">" * 60 + " It shines.", ["It shines."]),
    "tasks": ("- [x] one\n- [ ] two", ["one|two"]),
    "numbers of sources": ("so [1] and [2](#b)\n\n[1]: http://x.y", ["so [1] and [2]"]),
    "heading of HTML in a paragraph": (
        "It shines.<h3>On moons</h3>It sets.",
        ["It shines.", "It sets."],
    ),
    "tab-indented text": ("\tIt shines\n\tand sets.", ["It shines and sets."]),
}


@pytest.mark.parametrize(("chapter", "texts"), CONSTRUCTS.values(), ids=CONSTRUCTS.keys())
def test_construct(chapter: str, texts: list[str]) -> None:
    assert cleaned(chapter) == texts


FORMULAS = {
    "in a line": ("If $x_1 = 2$ holds", "If{} holds", ["$x_1 = 2$"]),
    "one letter": ("the $n$ stars", "the{} stars", ["$n$"]),
    "with stars and bars": (
        "as $a*b*c$ and $x_i y_i$ do",
        "as{} and{} do",
        ["$a*b*c$", "$x_i y_i$"],
    ),
    "with escapes": (r"the $\{a\}$ set", "the{} set", [r"$\{a\}$"]),
    "by a conversion": (r"of $ { 1.2 \ m } $ here", "of{} here", [r"$ { 1.2 \ m } $"]),
    "double": ("then $$x^2$$ is it", "then{} is it", ["$$x^2$$"]),
    "parentheses": (r"with \(x^2\) in it", "with{} in it", [r"\(x^2\)"]),
    "money": ("It costs $5 and $6 or 7$ each, 3.80$ more", None, []),
    "escaped dollars": (r"It costs \$5 and 6\$ now", "It costs $5 and 6$ now", []),
}


@pytest.mark.parametrize(("text", "without", "formulas"), FORMULAS.values(), ids=FORMULAS.keys())
def test_formulas_in_a_line(text: str, without: str | None, formulas: list[str]) -> None:
    without = text if without is None else without
    kept = without.format(*(f" {formula}" for formula in formulas))
    counts = Counts()
    assert cleaned(text) == [kept]
    assert cleaned(text, latex="placeholder") == [without.replace("{}", " [formula]")]
    assert clean(text, counts, Settings(latex="drop")) == [[without.replace("{}", "")]]
    assert counts.dropped.get("formula", []) == formulas


@pytest.mark.parametrize(
    "display",
    [
        "$$\nx = 1\n$$",
        "$$ x = 1 $$",
        "$$x = 1$$ (3)",
        "\\[x\n= 1\n\\]",
        "\\begin{align*}\n# x &= 1 \\\\\n> y &= 2\n\\end{align*}",
        "```{math}\nx = 1\n```",
    ],
)
@pytest.mark.parametrize("gap", ["\n", "\n\n"])
def test_a_display_is_part_of_its_sentence(display: str, gap: str) -> None:
    chapter = f"The law{gap}{display}{gap}holds here."
    kept = " ".join(display.removeprefix("```{math}").removesuffix("```").split())
    assert cleaned(chapter) == [f"The law {kept} holds here."]
    assert cleaned(chapter, latex="placeholder") == ["The law [formula] holds here."]
    assert cleaned(chapter, latex="drop") == ["The law holds here."]


def test_a_display_without_end_is_text() -> None:
    assert cleaned("It is\n$$\nso.\n\nIt shines.") == ["It is so.", "It shines."]


def test_code_as_it_is_set() -> None:
    chapter = "It prints `a_b`:\n\n```\nfor a in b:\n    c  \n```\n\nSo it is."
    assert cleaned(chapter) == ["It prints a_b:", "for a in b:\n    c", "So it is."]
    assert cleaned(chapter, code="drop") == ["It prints:", "So it is."]
    placed = "It prints [code]: [code]"
    assert cleaned(chapter, code="placeholder") == [placed, "So it is."]
    counts = Counts()
    clean(chapter, counts, Settings(code="drop"))
    assert counts.dropped == {"code": ["a_b", "for a in b:\n    c"]}


def test_settings_reach_the_texts_and_the_counts_the_file_of_sources(tmp_path: Path) -> None:
    (tmp_path / "1.md").write_text(
        "The force $F = ma$ acts on the bo-\ndy here.\n\n"
        "```\nprint(some, more, long, words)\n\nend\n```\n"
    )
    config = ProcessConfig((tmp_path,), output=tmp_path / "t.json", latex="drop", method="lines")
    assert process(config).texts == [
        "The force acts on the body here.",
        "print(some, more, long, words)",
    ]
    sources = Sources.load(config.output)
    assert sources is not None and sources.dropped["formula"].pieces == 1
    assert sources.repaired == {"word parted by a hyphen": 1}


REPAIRS = {
    "word parted by a hyphen": "a temper-\nature",
    "paragraph parted by a page": "The Sun is\n\na star.",
    "ligature": "It is de\ufb01ned.",
    "glued heading": "It shines.# Moons",
    "caption in a paragraph": "It shines.\nFIGURE 1.2 A star.",
    "lost formula": "It is  .",
    "bullet within a line": "one  • two",
    "invisible character": "a\u200bb",
}


@pytest.mark.parametrize(("what", "chapter"), REPAIRS.items(), ids=REPAIRS.keys())
def test_each_repair_is_counted(what: str, chapter: str) -> None:
    counts = Counts()
    clean(f"{chapter}\n", counts)
    assert +counts.repaired == Counter({what: 1})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("细胞是生命的基本单位。", 10),
        ("ほし は ひかる", 6),
        ("ดาวส่องแสง", 10),
        ("DNA是5个 base", 4),
        ("다섯 글자 넘는 단어", 4),
        ("यह तारा है और चमकता है", 6),
        ("این می\u200cدرخشد شب", 3),
        ("a star at 5 m shines", 3),
    ],
)
def test_scripts_without_spaces_count_characters(text: str, words: int) -> None:
    assert count_long_words(text) == words


def test_count_of_words_is_that_of_spaces_elsewhere() -> None:
    assert count_words("The Sun’s 5 stars - x") == 6
    assert count_words("细胞。DNA 5") == 4


@pytest.mark.parametrize(
    "text", ["می\u200cخواهم", "क्\u200dष", "👨\u200d👩\u200d👧", "❤\ufe0f\u200d🔥"]
)
def test_joiners_that_join_stay(text: str) -> None:
    assert cleaned(f"{text}, a\u200db\u200c c") == [f"{text}, ab c"]


def test_chinese_in_sentences_chunks_and_wrapped_lines(tmp_path: Path) -> None:
    (tmp_path / "1.md").write_text(
        "细胞是生命的\n基本单位。“真的吗？”是的！星星发光。", encoding="utf-8"
    )
    whole = "细胞是生命的基本单位。“真的吗？”是的！星星发光。"
    split = ["细胞是生命的基本单位。", "“真的吗？”", "是的！", "星星发光。"]

    def texts(**settings: Any) -> list[str]:
        output = tmp_path / "t.json"
        return process(ProcessConfig((tmp_path,), output=output, min_words=1, **settings)).texts

    assert texts() == [whole]
    assert texts(method="sentences") == split
    chunks = texts(method="chunks", chunk_size=10, chunk_overlap=0)
    assert "".join(chunks) == whole
    assert max(map(len, chunks)) <= 10
