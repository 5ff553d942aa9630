"""HTML tags in Markdown: which of them are tags, and which open and close one another."""

import re
from collections.abc import Iterable

from markdown_it.common.html_blocks import block_names
from markdown_it.token import Token

NAME = re.compile(r"</?([A-Za-z][\w:-]*)")
INLINE_NAMES = frozenset(
    "a abbr acronym audio b bdi bdo big br button canvas cite code data del dfn em embed font i "
    "img input ins kbd label map mark math meter noscript object output picture progress q rp rt "
    "ruby s samp script select small span strike strong style sub sup svg textarea time tt u "
    "var video wbr".split()
)
NAMES = INLINE_NAMES | frozenset(block_names)
BLOCKS = frozenset(block_names) | {"pre"}
HEADINGS = frozenset(f"h{level}" for level in range(1, 7))
HIDING = frozenset({"script", "style", "svg"})
WITHOUT_VALUE = frozenset(
    "allowfullscreen async autoplay checked compact controls defer disabled hidden loop muted "
    "noshade nowrap open readonly required reversed selected".split()
)


def name_of(tag: str) -> str:
    """The name of a tag in lower case; nothing if it is text that looks like one: a<b and c>d."""
    found = NAME.match(tag)
    if found is None:
        return ""
    name = found[1].lower()
    attributes = tag[found.end() : -1].rstrip("/").lower()
    if name not in NAMES and "-" not in name:
        return ""
    if "=" not in attributes and not WITHOUT_VALUE.issuperset(attributes.split()):
        return ""
    return name


def is_closing(tag: str) -> bool:
    """Whether it is `</name>`."""
    return tag.startswith("</")


def matched(tokens: Iterable[Token]) -> set[int]:
    """The `id` of the tags of tables, scripts and styles that have the other half.

    Of tables in tables both are there; a script contains no tags, so that the first one closes it.
    """
    found: set[int] = set()
    tables: list[int] = []
    hidden: Token | None = None
    for token in tokens:
        if token.type != "html_inline":
            continue
        name = name_of(token.content)
        if name == "table" and not is_closing(token.content):
            tables.append(id(token))
        elif name == "table" and tables:
            found |= {tables.pop(), id(token)}
        elif name in HIDING and not is_closing(token.content):
            hidden = token
        elif name in HIDING and hidden and name_of(hidden.content) == name:
            found |= {id(hidden), id(token)}
            hidden = None
    return found
