"""A headless Chromium with one page in it, and what a reader does with that page."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
PICTURES = Path(__file__).resolve().parents[2] / "output" / "report"
PATIENCE = 60.0


class Browser:
    """One page at a time; fails when the page says anything on its console."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, address: str | Path, view: str = "") -> None:
        """Load a page, and wait until its view is drawn."""
        url = address.absolute().as_uri() if isinstance(address, Path) else address
        self.driver.get("about:blank")
        self.driver.get(f"{url}#{view}" if view else url)
        self.wait(lambda: self.all("[role=tab]"))

    def size(self, width: int, height: int, *, dark: bool = False) -> None:
        """The size of the window, and whether the reader prefers dark."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def view(self, name: str) -> None:
        """Click on a tab."""
        self.one(f"#tab-{name}").click()
        self.wait(lambda: self.one(f"#view-{name}").is_displayed())

    def all(self, selector: str) -> list[WebElement]:
        """What is displayed of a selector."""
        return [each for each in self.driver.find_elements(By.CSS_SELECTOR, selector) if each.is_displayed()]

    def one(self, selector: str) -> WebElement:
        """The first that is displayed."""
        found = self.all(selector)
        assert found, f"there is no {selector}"
        return found[0]

    def texts(self, selector: str) -> list[str]:
        """The texts of what is displayed, as the document has them."""
        script = """
            return [...document.querySelectorAll(arguments[0])]
                .filter((each) => each.getClientRects().length).map((each) => each.textContent);
        """
        found: list[str] = self.run(script, selector)
        return found

    def choose(self, label: str, value: str) -> None:
        """Choose from the list with this label in the view that is shown."""
        for each in self.all("[role=tabpanel] label"):
            if each.text.startswith(label):
                Select(each.find_element(By.TAG_NAME, "select")).select_by_value(value)
                return
        raise AssertionError(f"there is no {label}")

    def type(self, label: str, text: str) -> None:
        """Type into a field, after emptying it as a reader would."""
        field = self.one(f"[role=tabpanel] input[aria-label='{label}']")
        self.run("arguments[0].value = ''; arguments[0].dispatchEvent(new Event('input'));", field)
        if text:
            field.send_keys(text)

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a script in the page."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, until: Callable[[], Any], patience: float = PATIENCE) -> None:
        """Wait until something holds."""
        WebDriverWait(self.driver, patience, poll_frequency=0.05).until(lambda _driver: until())

    def console(self) -> list[str]:
        """What the page has said since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def picture(self, name: str, *, most: int = 2400) -> Path:
        """The whole page as a picture, kept for whoever looks at the build."""
        PICTURES.mkdir(parents=True, exist_ok=True)
        path = PICTURES / f"{name}.png"
        size = self.run("return [innerWidth, innerHeight, document.documentElement.scrollHeight]")
        dark = self.run("return matchMedia('(prefers-color-scheme: dark)').matches")
        self.size(size[0], min(max(size[1], size[2]), most), dark=dark)
        time.sleep(0.3)  # charts follow the size of their box when the browser tells them
        assert self.driver.save_screenshot(str(path))
        self.size(size[0], size[1], dark=dark)
        return path


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile in a new folder."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for option in (*OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
