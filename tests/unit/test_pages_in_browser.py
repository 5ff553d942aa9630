"""The pages in a real browser: they say nothing on the console, fetch nothing, and react."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, DRIVER, PHONE, WIDE, browser, look
from reported import a_corpus, a_making, a_run, an_entry, an_evaluation, entries
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from sae_core.reporting.feature_page import feature_page
from sae_core.reporting.page import report_page

MISSING = "needs Debian's chromium and chromium-driver"
if not (CHROMIUM and DRIVER) and os.environ.get("REQUIRE_BROWSER"):
    raise RuntimeError(f"REQUIRE_BROWSER is set: {MISSING}")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=MISSING),
    pytest.mark.xdist_group("browser"),
]

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"
LOCAL = re.compile(r"(file|data|about|chrome|blob)[:-]")


@pytest.fixture(scope="module")
def driver() -> Iterator[WebDriver]:
    with browser() as driver:
        yield driver


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both pages, as the workflow lays them out."""
    root = tmp_path_factory.mktemp("pages")
    corpus = a_corpus()
    runs = [a_run(an_evaluation(9, l0=20.0, kl=0.3), corpus), a_run(an_evaluation(20, kl=None))]
    (root / "report.html").write_text(report_page([*runs, a_run(an_evaluation(4))], a_making()))
    (root / "features").mkdir()
    odd = an_entry(55, "random", EVIL)
    page = feature_page([*entries(), odd], corpus, "../report.html")
    (root / f"features/{runs[0].name}.html").write_text(page)
    return root


class Page:
    """A page that has been opened."""

    def __init__(self, driver: WebDriver, path: Path, fragment: str = "") -> None:
        self.driver = driver
        driver.get("about:blank")
        for kind in ("browser", "performance"):
            driver.get_log(kind)
        driver.get(path.as_uri() + fragment)

    def find(self, css: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def texts(self, css: str) -> list[str]:
        return [e.text for e in self.driver.find_elements(By.CSS_SELECTOR, css)]

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def until(self, css: str, text: str) -> None:
        """Wait for an element to show a text."""
        WebDriverWait(self.driver, 20).until(lambda _: text in self.find(css).text)

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """What was asked of anything but this disk."""
        events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        sent = [e for e in events if e["method"] == "Network.requestWillBeSent"]
        assert sent, "not even the page itself was recorded"
        addresses = [e["params"]["request"]["url"] for e in sent]
        return [address for address in addresses if not LOCAL.match(address)]


@pytest.fixture(params=["light", "dark"])
def scheme(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def report(driver: WebDriver, folder: Path) -> Page:
    look(driver)
    return Page(driver, folder / "report.html")


@pytest.fixture
def features_path(folder: Path) -> Path:
    [path] = (folder / "features").iterdir()
    return path


@pytest.fixture
def features(driver: WebDriver, features_path: Path) -> Page:
    look(driver)
    return Page(driver, features_path)


# Both pages


@pytest.mark.parametrize("which", ["report", "features"])
@pytest.mark.parametrize("width", [WIDE, PHONE])
def test_pages_are_quiet_closed_and_fit(
    which: str, width: int, scheme: str, driver: WebDriver, folder: Path, features_path: Path
) -> None:
    look(driver, width, scheme == "dark")
    page = Page(driver, folder / "report.html" if which == "report" else features_path)
    assert page.complaints() == []
    assert page.requests() == []
    assert page.run("return innerWidth") == width
    assert page.run("return document.documentElement.scrollWidth") <= width


def test_colours_follow_the_reader(driver: WebDriver, folder: Path) -> None:
    def brightness(css: str, what: str) -> float:
        colour = page.run(f"return getComputedStyle(document.querySelector('{css}')).{what}")
        return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3

    for dark in (False, True):
        look(driver, dark=dark)
        page = Page(driver, folder / "report.html")
        text = brightness("svg[aria-label^=Loss] text", "fill")
        paper = brightness(".plot", "backgroundColor")
        assert (brightness("body", "backgroundColor") < 128) == dark
        assert (paper < 128) == dark and (text > 128) == dark


# The run page


def column(page: Page, heading: str) -> list[str]:
    headings = page.texts("table#figures thead th")
    at = [h.strip(" ↕↑↓\u2009") for h in headings].index(heading) + 1
    return page.texts(f"table#figures tbody tr > :nth-child({at})")


def sort_by(page: Page, heading: str) -> None:
    buttons = page.driver.find_elements(By.CSS_SELECTOR, "table#figures thead button")
    next(b for b in buttons if b.text.strip(" ↕↑↓\u2009") == heading).click()


def test_sorting_the_summary(report: Page) -> None:
    assert [name.split(".blocks.")[1][:2] for name in column(report, "SAE")] == ["4.", "9.", "20"]
    sort_by(report, "L0")
    assert column(report, "L0") == ["32.3", "32.3", "20.0"]
    sort_by(report, "L0")
    assert column(report, "L0") == ["20.0", "32.3", "32.3"]
    sort_by(report, "KL")
    assert column(report, "KL") == ["0.3000", "0.2100", "–"]
    sort_by(report, "KL")
    assert column(report, "KL") == ["0.2100", "0.3000", "–"], "what has no value stays last"
    sort_by(report, "SAE")
    assert [name.split(".blocks.")[1][:2] for name in column(report, "SAE")] == ["4.", "9.", "20"]


def test_the_way_to_the_features_and_back(report: Page) -> None:
    report.find("table.summary a[href^='features/']").click()
    report.until("h1", "Features")
    report.find("main > p > a").click()
    report.until("h1", "Sparse autoencoders")


# The feature browser


def listed(page: Page) -> list[int]:
    return [int(number) for number in page.texts("#list b")]


def test_the_list_begins_as_chosen_and_shows_its_first(features: Page) -> None:
    assert listed(features) == [7, 12, 400, 31, 55]
    assert features.find("#detail h2").text == "Feature 7"
    assert features.find("#list a[aria-current]").get_attribute("data-feature") == "7"


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("number", [7, 12, 31, 55, 400]),
        ("density", [400, 7, 55, 12, 31]),
        ("rarest first", [31, 12, 55, 7, 400]),
        ("share of chemistry", [12, 31, 7, 55, 400]),
    ],
)
def test_sorting_features(by: str, expected: list[int], features: Page) -> None:
    Select(features.find("#sort")).select_by_value(by)
    assert listed(features) == expected


def test_filters(features: Page) -> None:
    Select(features.find("#filter")).select_by_value("mostly biology")
    assert listed(features) == [400]
    Select(features.find("#filter")).select_by_value("random")
    assert listed(features) == [31, 55]


@pytest.mark.parametrize(
    ("words", "expected"),
    [("400", [400]), ("#12", [12]), ("Membrane", [400]), ("joule", [7, 12, 400, 31, 55]),
     ("great acid of", [12]), ("nothing like it", [])],
)  # fmt: skip
def test_search(words: str, expected: list[int], features: Page) -> None:
    features.find("#search").send_keys(words)
    assert listed(features) == expected
    assert features.find("#count").text == f"{len(expected)} of 5 features"


def test_a_link_leads_to_a_feature(driver: WebDriver, features_path: Path) -> None:
    look(driver)
    page = Page(driver, features_path, "#feature=400")
    assert page.find("#detail h2").text == "Feature 400"
    page.find("#detail .chips a").click()  # a neighbour
    page.until("#detail h2", "Feature 12")
    assert page.run("return location.hash") == "#feature=12"
    driver.back()
    page.until("#detail h2", "Feature 400")
    page.find("#detail button[aria-label='Next feature']").click()
    page.until("#detail h2", "Feature 31")


def test_a_link_to_a_feature_that_is_not_shown(driver: WebDriver, features_path: Path) -> None:
    page = Page(driver, features_path, "#feature=499")
    assert "Feature 499 is not shown on this page" in page.find("#detail").text


def test_tokens_are_shaded_by_activation(features: Page) -> None:
    shades = features.run(
        "return [...document.querySelectorAll('#detail .text')[0].children]"
        ".map(s => [s.textContent, getComputedStyle(s).backgroundColor, s.className])"
    )
    assert [word for word, *_ in shades] == ["The", "great", "energy", "of", "↵", "x"]
    assert features.find("#detail .text").text == "The great energy of↵x"
    alpha = [float(re.findall(r"[\d.]+", colour)[3:][0]) for _, colour, _ in shades[:2]]
    assert alpha[0] == 0 < alpha[1] < float(re.findall(r"[\d.]+", shades[2][1])[-1]) <= 0.9
    assert shades[2][2] == "peak"


def test_a_chapter_with_markup_shows_it(driver: WebDriver, features_path: Path) -> None:
    page = Page(driver, features_path, "#feature=55")
    assert page.find("#detail h2").text == "Feature 55"
    assert EVIL in page.find("#detail .text").text
    assert page.driver.title.startswith("Features of")
    assert page.complaints() == [] and not page.driver.find_elements(By.TAG_NAME, "img")
