"""A page about features in Chromium: how long it takes to write, to open, to search and to sort.

Every feature has its windows and a label of its own.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from browser import browser, look, ready
from reported import an_entry, write_features
from selenium.webdriver.remote.webdriver import WebDriver

SYLLABLES = ("ba", "de", "fi", "go", "lu", "mo", "na", "rim", "sok", "tel")
WORDS = [a + b + c for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES]
SEARCHED = ("badefi", "ba", "mo", "telsok", "nothing")

CHANGE = """
const [id, value] = arguments, done = arguments[arguments.length - 1];
const element = document.getElementById(id), began = performance.now();
let last = began;
const observer = new MutationObserver(() => { last = performance.now(); });
observer.observe(document.body, {childList: true, subtree: true, attributes: true});
element.value = value;
element.dispatchEvent(new Event(id === "search" ? "input" : "change", {bubbles: true}));
setTimeout(() => { observer.disconnect(); done((last - began) / 1000); }, 2000);
"""
"""Seconds from a change of a field to the last change of the page."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, default=65_536)
    options = parser.parse_args()
    columns = ("features", "written, CPU", "memory", "opens", "search", "sort")
    print("| " + " | ".join(columns) + " |\n" + "|--:" * len(columns) + "|")
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        page = write_features(Path(folder), entries(options.features))
        written = time.process_time() - began
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        with browser() as driver:
            driver.set_script_timeout(60)
            look(driver)
            opens = [opened(driver, page.as_uri()) for _ in range(5)]
            searches = [changed(driver, "search", word) for word in SEARCHED]
            changed(driver, "search", "")
            script = "return [...document.getElementById('sort').options].map((o) => o.value)"
            sorts = [changed(driver, "sort", key) for key in driver.execute_script(script)]
    shown = (f"{statistics.median(opens):.2f} s", f"{max(searches):.2f} s", f"{max(sorts):.2f} s")
    print(f"| {options.features} | {written:.0f} s | {memory:.2f} GB | {' | '.join(shown)} |")


def entries(n: int) -> Iterator[dict[str, Any]]:
    for feature in range(n):
        word, other = WORDS[feature % len(WORDS)], WORDS[feature * 7 // len(WORDS) % len(WORDS)]
        entry = an_entry(feature, word, 0.02 * (feature % 997 + 1) / 997)
        yield entry | {"label": f"{word}, {other} ({feature % 100}%)"}


def opened(driver: WebDriver, address: str) -> float:
    driver.get("about:blank")
    began = time.perf_counter()
    driver.get(address)
    ready(driver)
    return time.perf_counter() - began


def changed(driver: WebDriver, field: str, value: str) -> float:
    return driver.execute_async_script(CHANGE, field, value)


if __name__ == "__main__":
    main()
