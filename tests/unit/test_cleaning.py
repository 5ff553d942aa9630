"""Cleaning of chapters: each kind of markup and boilerplate."""

from pathlib import Path

import pytest
from processed import LETTERS, run

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
