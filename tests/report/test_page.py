"""The page in a browser: it fits and draws, sorts and filters, opens a record, reads without scripts, prints, opens fast.

Needs Chromium and its driver (Debian: chromium, chromium-driver).
"""

import base64
import copy
import json
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from sparsebench.report import page
from sparsebench.report.rows import collect
from tests.helpers import failed, laid, made, vision

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--window-size=1400,1000")  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs Chromium and chromedriver"),
]
ROWS = "return [...document.querySelectorAll('#runs tbody tr')].map(r => [...r.cells].map(c => c.innerText))"


@contextmanager
def browser(folder, scripts=True):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    if not scripts:
        options.add_experimental_option("prefs", {"profile.managed_default_content_settings.javascript": 2})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def resize(driver, width):
    size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def until(driver, script, seconds=30):
    """Wait until `script` returns something, and return it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := driver.execute_script(script):
            return value
        time.sleep(0.2)
    raise AssertionError(f"never true: {script}")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report over runs of three methods and two kinds of models, one failure, and a name that is markup."""
    folder = tmp_path_factory.mktemp("page")
    runs = [made(method, s, perplexity=10 + 4 * s + i) for i, method in enumerate(("teal", "wina", "a-rather-long-name-of-a-method"))
            for s in (0.25, 0.5, 0.65)]  # fmt: skip
    evil = made("<img src=x onerror=document.title='broken'>", 0.4)
    laid(folder / "records", *runs, evil, vision(), vision(0.9), failed("x" * 300, "y" * 300))
    made_page = page.write(
        collect([folder / "records"]), folder / "report", "A title that takes more than one line on a phone"
    )
    return (folder / "report" / "report.html").as_uri(), made_page


@pytest.mark.parametrize("width", [1400, 390])
def test_nothing_sticks_out_and_every_chart_comes_to_life(written, tmp_path, width):
    address, made_page = written
    count = sum(len(group["charts"]) for group in made_page.charts.values())
    with browser(tmp_path) as driver:
        resize(driver, width)
        driver.get(address)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        for figure in driver.find_elements("css selector", "figure[data-chart]"):
            driver.execute_script("arguments[0].scrollIntoView()", figure)
            time.sleep(0.1)
        until(driver, f"return document.querySelectorAll('figure svg.marks').length == {count}")
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        assert driver.title != "broken" and not driver.get_log("browser")


def test_sorting_stays_inside_a_protocol_and_a_filter_leaves_its_rows(written, tmp_path):
    with browser(tmp_path) as driver:
        driver.get(written[0])
        driver.execute_script("document.querySelector('#runs').scrollIntoView()")
        until(driver, "return document.querySelector('#runs .dt-container')")
        heads = driver.execute_script("return [...document.querySelectorAll('#runs th')].map(h => h.innerText.trim())")
        sparsity, method = heads.index("sparsity"), heads.index("method")
        head = driver.find_elements("css selector", "#runs th")[sparsity]
        driver.execute_script("arguments[0].querySelector('.dt-column-order').click()", head)
        rows = driver.execute_script(ROWS)
        places = [(int(r[0]), float(r[sparsity].rstrip("%"))) for r in rows]
        assert places == sorted(places) and len(places) == 12 and len({p for p, _ in places}) == 2
        driver.execute_script(
            "const box = document.querySelector('#runs .dt-search input'); box.value = 'wina';"
            "box.dispatchEvent(new Event('input'))"
        )
        until(driver, "return document.querySelectorAll('#runs tbody tr').length == 3")
        assert {r[method] for r in driver.execute_script(ROWS)} == {"wina"}
        driver.execute_script(
            "const box = document.querySelector('#runs .dt-search input'); box.value = '';"
            "box.dispatchEvent(new Event('input'))"
        )
        until(driver, "return document.querySelectorAll('#runs tbody tr').length == 12")
        head = driver.find_elements("css selector", "#runs th")[method]
        driver.execute_script("arguments[0].querySelector('.dtcc-button_dropdown').click()", head)
        choices = until(
            driver, "return [...document.querySelectorAll('.dtcc-dropdown .dtcc-list button')].map(b => b.innerText)"
        )
        assert "teal" in [c.strip() for c in choices]
        driver.execute_script(
            "[...document.querySelectorAll('.dtcc-dropdown .dtcc-list button')].find(b => b.innerText.trim() == 'teal').click()"
        )
        until(driver, "return document.querySelectorAll('#runs tbody tr').length == 3")
        assert {r[method] for r in driver.execute_script(ROWS)} == {"teal"}


def test_a_point_says_its_figures_and_opens_its_record(written, tmp_path):
    with browser(tmp_path) as driver:
        driver.get(written[0])
        driver.execute_script("document.querySelector('figure[data-chart$=\"/sparsity\"]').scrollIntoView()")
        points = '[...document.querySelectorAll(\'figure[data-chart$="/sparsity"] svg .mark-symbol path[aria-label*="run: teal"]\')]'
        until(driver, f"return {points}.length")
        send = (
            f"const p = {points}[0], b = p.getBoundingClientRect(), at = {{bubbles: true, clientX: b.x + 3, clientY: b.y + 3}};"
            "for (const kind of arguments) p.dispatchEvent(new PointerEvent(kind, at))"
        )
        driver.execute_script(send, "pointermove", "mousemove")
        shown = until(driver, "return document.querySelector('#vg-tooltip-element')?.innerText")
        assert "perplexity" in shown and "sparsity" in shown and "MACs" in shown
        driver.execute_script(send, "pointerdown", "mousedown", "pointerup", "click")
        address = until(driver, "return location.href.endsWith('result.json') && location.href")
        record = json.loads(Path(unquote(urlparse(address).path)).read_text())
        assert record["config"]["method"]["name"] == "teal"


def test_without_scripts_and_on_paper_everything_can_be_read(written, tmp_path):
    address, made_page = written
    with browser(tmp_path, scripts=False) as driver:
        driver.get(address)
        text = driver.find_element("css selector", "body").text
        assert (
            "Scripts are off" in text
            and "Which method is best at half the work" in text
            and "At 50 % of the MACs" in text
        )
        assert len(driver.find_elements("css selector", "#runs tbody tr")) == 12
        pictures = driver.find_elements("css selector", "figure[data-chart] img")
        assert len(pictures) == sum(len(group["charts"]) for group in made_page.charts.values())
        assert driver.execute_script(
            "return [...document.images].every(i => i.complete && i.naturalWidth)"
        )  # unscrolled
        printed = driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True, "preferCSSPageSize": True})
        paper = base64.b64decode(printed["data"])
        assert paper.startswith(b"%PDF") and len(paper) > 50_000


def test_two_thousand_records_are_built_in_a_minute_and_open_in_three_seconds(tmp_path):
    records = []
    for i in range(2000):
        record = copy.deepcopy(made(f"method{i % 8}", 0.2 + 0.05 * (i // 8 % 10), perplexity=10 + i % 7, seed=i // 80))
        record["config"]["model"]["name"] = f"model{i % 5}"
        record["config_hash"] = f"{i:064x}"
        records.append(record)
    begun = time.monotonic()
    page.write(collect([laid(tmp_path / "records", *records)]), tmp_path / "report", "Two thousand")
    built = time.monotonic() - begun
    with browser(tmp_path) as driver:
        driver.get((tmp_path / "report" / "report.html").as_uri())
        timing = driver.execute_script("return performance.getEntriesByType('navigation')[0].toJSON()")
        driver.execute_script("document.querySelector('#runs').scrollIntoView()")
        until(driver, "return /\\b2,000\\b/.test(document.querySelector('#runs .dt-info')?.innerText)")
        assert len(driver.find_elements("css selector", "#runs tbody tr")) == 2000
    assert built < 60 and timing["loadEventEnd"] < 3000, (built, timing["loadEventEnd"])
