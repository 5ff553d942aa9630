"""Checks of pictures and pages: an SVG file's words; a page needs nothing from outside."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree


def words(svg: bytes) -> list[str]:
    """The texts of an SVG file, which must be well-formed."""
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    return ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("}text")]


class Elements(HTMLParser):
    """The tags, attributes, ids and links of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            self.attributes.add(name)
            if name == "id":
                self.ids.append(value)
            elif name in ("src", "href", "xlink:href"):
                self.links.append(value)


def assert_closed(page, outside=()):
    """Nothing is loaded, and its links lead to a place on it, or to pages beside it."""
    elements = Elements(page)
    assert not elements.tags & {"iframe", "img", "object", "embed", "base", "form"}
    assert not re.search(r"url\(\s*[\"']?(?!#)|@import|\bfetch\(|XMLHttpRequest|WebSocket", page)
    assert len(elements.ids) == len(set(elements.ids))
    links = {link for link in elements.links if not link.startswith("#feature=")} - {"data:,"}
    assert {link for link in links if not link.startswith("#")} == set(outside)
    assert {link[1:] for link in links if link.startswith("#")} <= set(elements.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(elements.ids)
    assert "default-src 'none'" in page  # browsers load nothing either
