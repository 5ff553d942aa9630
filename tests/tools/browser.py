"""Debian's chromium, headless, as the tests drive it; by hand, it takes pictures of pages:

python tests/tools/browser.py PAGE FOLDER    400 and 1,400 pixels wide, light and dark
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

WIDE, PHONE = 1400, 390
HEIGHT = 900
TIMEOUT = 120
"""Seconds for a page to load."""


@contextmanager
def browser() -> Iterator[WebDriver]:
    """A browser that records what its pages say and ask the network for."""
    options = Options()
    options.binary_location = str(CHROMIUM)
    for word in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    driver.set_page_load_timeout(TIMEOUT)
    try:
        yield driver
    finally:
        driver.quit()


def look(driver: WebDriver, width: int = WIDE, dark: bool = False, height: int = HEIGHT) -> None:
    """Set the size of the page's window, and the scheme of colours that the reader prefers."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width == PHONE}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def ready(driver: WebDriver) -> None:
    """Wait until a page has loaded the data beside it, if it is one that does."""
    script = "return !document.getElementById('scroll') || document.body.dataset.ready === 'yes'"
    WebDriverWait(driver, TIMEOUT).until(lambda d: d.execute_script(script))


def main(address: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path, _, fragment = address.partition("#")
    with browser() as driver:
        for width in (WIDE, PHONE):
            for dark in (False, True):
                look(driver, width, dark)
                driver.get(f"{Path(path).resolve().as_uri()}#{fragment}")
                ready(driver)
                length = driver.execute_script("return document.documentElement.scrollHeight")
                look(driver, width, dark, min(length, 4000))
                name = f"{Path(path).stem}-{width}-{'dark' if dark else 'light'}.png"
                driver.save_screenshot(str(folder / name))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
