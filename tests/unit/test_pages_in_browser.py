"""The pages in a real browser: they say nothing on the console, fetch nothing, and react."""

import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, DRIVER, PHONE, WIDE, browser, look, ready
from reported import (
    a_corpus,
    a_label,
    a_making,
    a_run,
    an_entry,
    an_evaluation,
    entries,
    write_features,
)
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from sae_core.reporting.feature_data import CHUNK, data_folder
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
    write_features(root / "features", [*entries(), an_entry(55, EVIL)], corpus)
    return root


class Page:
    """A page that has been opened."""

    def __init__(self, driver: WebDriver, path: Path, fragment: str = "") -> None:
        self.driver = driver
        driver.get("about:blank")
        for kind in ("browser", "performance"):
            driver.get_log(kind)
        driver.get(path.as_uri() + fragment)
        ready(driver)

    def find(self, css: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def text(self, css: str) -> str:
        """What the first such element shows: "" while there is none."""
        return (self.texts(css) or [""])[0]

    def texts(self, css: str) -> list[str]:
        """Of all such elements at one moment: the page may replace them at any."""
        shown = "[...document.querySelectorAll(arguments[0])].map(e => e.innerText.trim())"
        return self.driver.execute_script(f"return {shown}", css)

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def until(self, css: str, text: str) -> None:
        """Wait for an element to show a text."""
        WebDriverWait(self.driver, 20).until(lambda _: text in self.text(css))

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """What was asked of anything but this disk."""
        addresses = self._addresses()
        assert addresses, "not even the page itself was recorded"
        return [address for address in addresses if not LOCAL.match(address)]

    def scripts(self) -> list[str]:
        """The names of the scripts that were loaded since the last call."""
        names = [address.rpartition("/")[2] for address in self._addresses()]
        return [name for name in names if name.endswith(".js")]

    def _addresses(self) -> list[str]:
        events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        sent = [e for e in events if e["method"] == "Network.requestWillBeSent"]
        return [e["params"]["request"]["url"] for e in sent]


@pytest.fixture(params=["light", "dark"])
def scheme(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def report(driver: WebDriver, folder: Path) -> Page:
    look(driver)
    return Page(driver, folder / "report.html")


@pytest.fixture
def features_path(folder: Path) -> Path:
    [path] = (folder / "features").glob("*.html")
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


def luminance(colour: Sequence[float]) -> float:
    """Relative luminance of WCAG 2.2, of (red, green, blue) from 0 to 255."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (value / 255 for value in colour)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_strongest_token_can_be_read(
    scheme: str, driver: WebDriver, features_path: Path
) -> None:
    """Contrast of WCAG's level AA, with the shade over the card's colour."""
    look(driver, dark=scheme == "dark")
    page = Page(driver, features_path)

    def colour(css: str, what: str) -> list[float]:
        found = page.run(f"return getComputedStyle(document.querySelector('{css}')).{what}")
        return list(map(float, re.findall(r"[\d.]+", found)))

    *shade, opacity = colour("#detail .text .peak", "backgroundColor")
    card = colour("#detail", "backgroundColor")
    mixed = [opacity * a + (1 - opacity) * b for a, b in zip(shade, card, strict=True)]
    dark, light = sorted(map(luminance, (mixed, colour("#detail .text .peak", "color"))))
    assert opacity > 0.8 and (light + 0.05) / (dark + 0.05) >= 4.5


# The run page


def column(page: Page, heading: str) -> list[str]:
    headings = page.texts("table#figures thead th")
    at = [h.strip(" ↕↑↓\u00a0") for h in headings].index(heading) + 1
    return page.texts(f"table#figures tbody tr > :nth-child({at})")


def sort_by(page: Page, heading: str) -> None:
    buttons = page.driver.find_elements(By.CSS_SELECTOR, "table#figures thead button")
    next(b for b in buttons if b.text.strip(" ↕↑↓\u00a0") == heading).click()


def test_arrows_stand_beside_their_words(report: Page) -> None:
    """A space at which no line breaks joins the arrow to the last word."""
    arrow = "return getComputedStyle(document.querySelector('#figures button'), '::after').content"
    assert report.run(arrow).strip('"') == "\u00a0↕"
    sort_by(report, "L0")
    assert "↓" in report.run(arrow.replace("#figures", "#figures [aria-sort]"))


def test_the_contents_lead_to_the_parts(report: Page) -> None:
    report.find(".contents a[href='#sae-2']").click()
    top = report.run("return document.getElementById('sae-2').getBoundingClientRect().top")
    assert 0 <= top < 100


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


def test_the_list_is_in_the_order_of_the_file_and_the_first_is_shown(features: Page) -> None:
    assert listed(features) == [7, 12, 400, 31, 55]
    assert features.text("#detail h2") == "Feature 7"
    assert features.text("#detail .named") == "energy (84%), physics"
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
    until_listed(features, expected)


def until_listed(page: Page, expected: list[int]) -> None:
    def found(_: WebDriver) -> bool:
        return listed(page) == expected

    WebDriverWait(page.driver, 20).until(found, f"{expected}")


def test_filters(features: Page) -> None:
    Select(features.find("#filter")).select_by_value("mostly biology")
    until_listed(features, [400])
    Select(features.find("#filter")).select_by_value("active on under 2% of tokens")
    until_listed(features, [12, 31, 55])


@pytest.mark.parametrize(
    ("words", "expected", "said"),
    [("400", [400], ""), ("#12", [12], ""), ("Membrane", [400], ": 1 peak on it"),
     ("joule", [7, 12, 400, 31, 55], ": 5 show it"), ("great acid of", [12], ": 1 show it"),
     ("of grea", [7, 12, 400, 31, 55], ": 5 show it"),
     ("84%", [7, 12, 400, 31, 55], ": 5 are labelled so"),
     ("nothing like it", [], "")],
)  # fmt: skip
def test_search(words: str, expected: list[int], said: str, features: Page) -> None:
    features.find("#search").send_keys(words)
    until_listed(features, expected)
    assert features.text("#count") == f"{len(expected)} of 5 features{said}"
    assert features.complaints() == []


def test_search_ranks_what_peaks_on_a_word_first_and_marks_it(
    driver: WebDriver, tmp_path: Path
) -> None:
    """The first merely shows it, the next peak on a longer word, on it once, on it often."""
    shows = an_entry(1, "vinegar") | {"promoted": [[" acid", 1.0]]}
    longer, once, often = an_entry(2, "acidity"), an_entry(3, "acid"), an_entry(4, "acid")
    longer["peaks"], once["peaks"] = [["acidity", 1]], [["salt", 3], ["acid", 1]]
    page = Page(driver, write_features(tmp_path, [shows, longer, once, often]))
    page.find("#search").send_keys("acid")
    until_listed(page, [4, 3, 2, 1])
    assert "3 peak on it, 1 show it" in page.text("#count")
    page.until("#detail h2", "Feature 4")
    marks = page.texts("#detail .text mark")
    assert len(marks) == 5 and set(marks) == {"acid"}
    assert page.texts("#list li:nth-child(3) .label mark") == ["acid"], "the beginning of acidity"


def test_a_link_leads_to_a_feature(driver: WebDriver, features_path: Path) -> None:
    look(driver)
    page = Page(driver, features_path, "#feature=400")
    assert page.text("#detail h2") == "Feature 400"
    page.find("#detail .chips a").click()  # a neighbour
    page.until("#detail h2", "Feature 12")
    assert page.run("return location.hash") == "#feature=12"
    driver.back()
    page.until("#detail h2", "Feature 400")
    page.find("#detail button[aria-label='Next feature']").click()
    page.until("#detail h2", "Feature 31")


def test_a_link_to_a_feature_that_is_not_active(driver: WebDriver, features_path: Path) -> None:
    page = Page(driver, features_path, "#feature=499")
    assert "Feature 499 is active on none of the 12,000 tokens" in page.text("#detail")
    page = Page(driver, features_path, "#feature=512")
    assert "no feature 512: they are numbered from 0 to 511" in page.text("#detail")


def test_every_number_of_a_feature_is_a_link(features: Page) -> None:
    features.run("document.querySelector('details.about').open = true")
    numbers = [*features.texts(".overview a"), *features.texts("#detail .chips a")]
    assert {"7", "12", "400", "499"} <= set(numbers)
    chips = features.driver.find_elements(By.XPATH, "//h3[contains(., 'similar')]/..//li")
    assert all(chip.find_elements(By.TAG_NAME, "a") for chip in chips) and len(chips) == 2


def test_features_of_many_files_are_loaded_when_they_are_opened(
    driver: WebDriver, tmp_path: Path
) -> None:
    look(driver)
    n = 3 * CHUNK
    path = write_features(tmp_path, [an_entry(i) for i in range(n)], a_corpus() | {"d_sae": n})
    page = Page(driver, path)
    assert page.scripts() == ["index.js", "features-0.js"]
    assert 5 < len(listed(page)) < 60, "the list holds what is in sight"
    page.run(f"location.hash = 'feature={n - 1}'")
    page.until("#detail h2", f"Feature {n - 1}")
    assert page.scripts() == ["features-2.js"]
    assert listed(page)[-1] == n - 1, "the list has moved there"
    assert page.complaints() == []


def test_the_list_is_one_stop_of_tab_and_arrows_lead_through_it(
    driver: WebDriver, tmp_path: Path
) -> None:
    look(driver)
    n = 3 * CHUNK
    page = Page(driver, write_features(tmp_path, map(an_entry, range(n))))

    def focus(*keys: str) -> str | None:
        """The feature whose row has the focus after these keys."""
        for key in keys:
            driver.switch_to.active_element.send_keys(key)
            time.sleep(0.1)  # for what follows a scroll
        return driver.switch_to.active_element.get_attribute("data-feature")

    page.find("#filter").click()
    assert focus(Keys.ESCAPE, Keys.TAB) == "0"
    assert focus(*[Keys.ARROW_DOWN] * 12) == "12", "beyond what was in sight"
    assert focus(Keys.ARROW_UP) == "11"
    assert focus(Keys.END) == focus(Keys.ARROW_DOWN) == str(n - 1)
    assert focus(Keys.ENTER) == str(n - 1)
    page.until("#detail h2", f"Feature {n - 1}")
    assert focus(Keys.TAB) is None
    assert page.run("return document.querySelector('#detail').contains(document.activeElement)")
    assert focus(Keys.SHIFT + Keys.TAB) == str(n - 1)
    assert focus(Keys.HOME) == "0"


def test_without_its_data_the_page_says_what_is_missing(driver: WebDriver, tmp_path: Path) -> None:
    path = write_features(tmp_path, entries())
    data_folder(path).rename(tmp_path / "elsewhere")
    driver.get(path.as_uri())
    WebDriverWait(driver, 20).until(lambda d: d.find_elements(By.CSS_SELECTOR, "#detail p"))
    assert data_folder(path).name in driver.find_element(By.ID, "detail").text


def test_labels_by_an_llm_are_shown_and_sorted(driver: WebDriver, tmp_path: Path) -> None:
    labels = [
        a_label(12, detection=0.6),
        a_label(400, detection=0.9),
        a_label(31, label="", status="not in the schema", detection=None, fuzzing=None),
    ]
    page = Page(driver, write_features(tmp_path, entries(), labels=labels))
    Select(page.find("#sort")).select_by_value("detection")
    until_listed(page, [400, 12, 7, 31])
    page.until("#detail .named", "what 400 is about")
    shown = page.text("#detail")
    assert "It fires on that." in shown and "0.90\ndetection" in shown
    assert "fires on: membrane (84%), physics" in shown
    page.run("location.hash = 'feature=31'")
    page.until("#detail .named", "the (84%), physics")
    assert "not in the schema" in page.text("#detail")


POINT_AT_CELL = """
    const [row, column, n] = arguments, plot = document.getElementById("together");
    const box = plot.getBoundingClientRect();
    const at = (start, size, i) => start + (size * (i + 0.5)) / n;
    plot.dispatchEvent(new PointerEvent("pointermove", {
        clientX: at(box.left, box.width, column), clientY: at(box.top, box.height, row),
    }));
"""


def test_a_cell_of_the_map_says_how_often_two_features_are_together(
    driver: WebDriver, tmp_path: Path
) -> None:
    path = data_folder(write_features(tmp_path, entries())) / "map.html"
    driver.get(path.as_uri())
    assert len(driver.find_elements(By.CSS_SELECTOR, "#map circle")) == 3
    assert len(driver.find_elements(By.CSS_SELECTOR, "#together .cluster")) == 1
    for (row, column), said in {
        (1, 2): "7: energy (84%), physics and 12: acid (84%), physics: 81%, PMI 7.9 bits, "
        "correlation 0.89",
        (0, 2): "never",
        (0, 0): "400: membrane",
    }.items():
        driver.execute_script(POINT_AT_CELL, row, column, 3)
        assert said in driver.find_element(By.ID, "pair").text
    driver.find_element(By.CSS_SELECTOR, "#near a").click()
    ready(driver)
    assert driver.current_url.endswith("#feature=7")


def test_white_space_and_parts_of_characters_have_signs(driver: WebDriver, tmp_path: Path) -> None:
    entry = an_entry(7) | {"promoted": [[" ", 3.0], ["\n\n", 2.0], [" to", 1.0], ["‹E282›", 0.5]]}
    entry["top"][0]["tokens"] = ["The", " ", "\t", "", "₂", "<|end|>"]
    page = Page(driver, write_features(tmp_path, [entry]))
    assert page.texts("#detail .chips code")[:4] == ["␣", "↵↵", "␣to", "‹E282›"]
    assert page.text("#detail .text") == "The␣⇥◌₂¶"
    assert "◌ part of a character" in page.text("#detail .shading")


def test_values_can_be_read_without_a_mouse(features: Page) -> None:
    value = (
        "return getComputedStyle(document.querySelector('#detail .text .peak'), '::after').content"
    )
    assert features.run(value) == "none"
    features.find("#values").click()
    assert features.run(value) == '"8"'
    assert "8, this feature's largest" in features.text("#detail .shading")
    features.find("#detail .numbers summary").click()
    assert "1 to 2\t70" in features.text("#detail .numbers table")


@pytest.mark.parametrize("width", [WIDE, PHONE])
def test_what_is_chosen_is_not_clipped(width: int, driver: WebDriver, features_path: Path) -> None:
    """The width of the longest choice, against the room in the control."""
    look(driver, width)
    page = Page(driver, features_path)
    script = """
      return ["sort", "filter"].map((id) => {
        const select = document.getElementById(id), style = getComputedStyle(select);
        const pen = document.createElement("canvas").getContext("2d");
        pen.font = style.font;
        const widest = Math.max(...[...select.options].map((o) => pen.measureText(o.text).width));
        const padding = parseFloat(style.paddingLeft) + parseFloat(style.paddingRight);
        return select.clientWidth - padding - 20 - widest;
      });"""
    assert min(page.run(script)) > 0


def test_tokens_are_shaded_by_activation(features: Page) -> None:
    shades = features.run(
        "return [...document.querySelectorAll('#detail .text')[0].children]"
        ".map(s => [s.textContent, getComputedStyle(s).backgroundColor, s.className])"
    )
    assert [word for word, *_ in shades] == ["The", "great", "energy", "of", "↵", "x"]
    assert features.text("#detail .text") == "The great energy of↵x"
    alpha = [float(re.findall(r"[\d.]+", colour)[3:][0]) for _, colour, _ in shades[:2]]
    assert alpha[0] == 0 < alpha[1] < float(re.findall(r"[\d.]+", shades[2][1])[-1]) <= 0.9
    assert shades[2][2] == "peak"


def test_a_chapter_with_markup_shows_it(driver: WebDriver, features_path: Path) -> None:
    page = Page(driver, features_path, "#feature=55")
    assert page.text("#detail h2") == "Feature 55"
    assert EVIL in page.text("#detail .text")
    assert page.driver.title.startswith("Features of")
    assert page.complaints() == [] and not page.driver.find_elements(By.TAG_NAME, "img")
