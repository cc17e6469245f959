"""The page in a real browser: nothing is asked of the network, nothing breaks, all that can be pressed works."""

import json
import shutil
import time
from pathlib import Path

import pandas as pd
import pytest
import report_runs
from command_line import invoke

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.chrome.service import Service  # noqa: E402 - after the skip
from selenium.webdriver.common.by import By  # noqa: E402

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (shutil.which("chromium") and shutil.which("chromedriver")), reason="needs chromium and its driver"),
]
EVIL = "<script>document.title='pwned'</script><img src=x onerror=document.title='pwned'>"


class Browser:
    """A headless Chromium of a given width, with what it logged."""

    def __init__(self) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
            options.add_argument(word)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        self.driver.set_page_load_timeout(300)
        self.driver.set_script_timeout(300)

    def open(self, page: Path, width: int = 1400, *, dark: bool = False) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        self.driver.get("about:blank")
        self.logs()
        self.driver.get(page.as_uri())

    def run(self, script: str, *arguments: object):
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def press(self, selector: str, index: int = 0) -> None:
        self.run("arguments[0].click()", self.all(selector)[index])

    def read_on(self) -> None:
        """Scroll through the page as a reader does, until every chart has been drawn."""
        for figure in self.all("figure.chart"):
            self.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", figure)
            self.wait("return arguments[0].querySelector('.main-svg') !== null", figure)

    def wait(self, script: str, *arguments: object, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not self.run(script, *arguments):
            assert time.monotonic() < end, script
            time.sleep(0.05)

    def logs(self) -> tuple[list[str], list[str]]:
        """Console errors and warnings, and addresses asked for, since the last call."""
        said = [entry["message"] for entry in self.driver.get_log("browser")]
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return said, asked


@pytest.fixture(scope="module")
def browser():
    browser = Browser()
    yield browser
    browser.driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    report_runs.write_all(folder / "runs", report_runs.configs())
    report_runs.write(folder / "runs", report_runs.config(seed=5, bits=4), state="diverged", message=EVIL)
    bench = report_runs.write_bench(folder / "bench.json")
    return _report(folder, folder / "runs", "--bench", bench, "--title", EVIL, "--law", "auto")


def _report(folder: Path, *words: object) -> Path:
    result = invoke("report", *words, "--out", folder / "r.html")
    assert result.exit_code == 0, result.output + repr(result.exception)
    return folder / "r.html"


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (1400, True), (390, False)])
def test_nothing_breaks_is_asked_for_or_runs_over(browser, page, width, dark):
    browser.open(page, width, dark=dark)
    browser.read_on()
    said, asked = browser.logs()
    assert said == []
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [page.as_uri()]
    assert browser.run("return document.title").startswith("<script>")
    assert browser.run("return document.documentElement.scrollWidth") <= width
    counts = browser.run("return [...document.querySelectorAll('.plot')].map(p => p.data.filter(t => t.x.length).length)")
    assert len(counts) == 10
    assert min(counts) > 0
    over = browser.run("""
        const boxes = [...document.querySelectorAll('h1, h2, h3, p, .tile, .plot, .legend, .choice, .table, figcaption, dl')];
        const seen = boxes.filter(b => b.checkVisibility({contentVisibilityAuto: true}));
        const shown = seen.map(b => [b, b.getBoundingClientRect()]).filter(([_, r]) => r.width && r.height);
        const bad = [];
        for (const [a, r] of shown) {
          if (r.right > innerWidth + 1 || r.left < -1) bad.push(['out', a.textContent.slice(0, 40)]);
          for (const [b, s] of shown)
            if (a !== b && !a.contains(b) && !b.contains(a) && r.left < s.right - 1 && s.left < r.right - 1
                && r.top < s.bottom - 1 && s.top < r.bottom - 1)
              bad.push([a.textContent.slice(0, 40), b.textContent.slice(0, 40)]);
        }
        return bad;""")
    assert over == []
    labels = browser.run("""
        const texts = plot => [...plot.querySelectorAll('.xtitle, .ytitle, .xtick, .ytick')];
        return [...document.querySelectorAll('.plot')].flatMap(plot => texts(plot).filter(t => {
          const r = t.getBoundingClientRect(), s = plot.getBoundingClientRect();
          return r.left < s.left - 2 || r.right > s.right + 2 || r.bottom > s.bottom + 2;
        }).map(t => t.textContent))""")
    assert labels == []
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(22, 24, 28)") is dark


def test_names_of_schemes_hide_and_show_and_stand_alone(browser, page):
    browser.open(page)
    browser.read_on()
    shown = "return document.querySelector('#chart-curves .plot').data.filter(t => t.visible).map(t => t.name)"
    everything = browser.run(shown)
    browser.press("#chart-curves .legend button")
    assert browser.run(shown) == everything[1:]
    assert browser.all("#chart-curves .legend button")[0].get_attribute("aria-pressed") == "false"
    browser.press("#chart-curves .legend button")
    assert browser.run(shown) == everything
    second = "document.querySelectorAll('#chart-curves .legend button')[1]"
    double = f"{second}.dispatchEvent(new MouseEvent('dblclick', {{bubbles: true}}))"
    browser.run(double)
    assert browser.run(shown) == [everything[1]]
    browser.run(double)
    assert browser.run(shown) == everything


def test_questions_change_what_is_drawn(browser, page):
    browser.open(page)
    browser.read_on()
    plot = "document.querySelector('#chart-frontier .plot')"
    label = f"return {plot}.layout.xaxis.title.text"
    points = f"return {plot}.data.reduce((n, t) => n + (t.mode === 'markers' ? t.x.length : 0), 0)"
    assert "(bits)" in browser.run(label)
    assert browser.run(points) == 12
    browser.press("#chart-frontier [data-answer='memory']")
    assert "(bytes)" in browser.run(label)
    browser.press("#chart-frontier [data-answer='all']")
    assert "(bytes)" in browser.run(label)
    assert browser.run(points) == 24
    hover = browser.run("return document.querySelector('#chart-frontier .plot').data.find(t => t.mode === 'markers').text[0]")
    assert hover.startswith("<b>bf16</b><br>")
    assert "-s0-" in hover


def test_tables_sort_and_filter(browser, page):
    browser.open(page)

    def column(i: int) -> list[str]:
        rows = "[...document.querySelectorAll('[data-table=runs] tbody tr')].filter(r => !r.hidden)"
        return browser.run(f"return {rows}.map(r => r.cells[{i}].textContent)")

    browser.press("[data-table=runs] th button", 6)
    losses = [float(text) for text in column(6) if text != "–"]
    assert losses == sorted(losses)
    assert column(6)[-1] == "–"  # the run without a loss is last in both directions
    browser.press("[data-table=runs] th button", 6)
    assert [float(text) for text in column(6) if text != "–"] == losses[::-1]
    assert column(6)[-1] == "–"
    browser.all("[data-table=runs] input")[0].send_keys("quest w2a2 107k")
    assert column(0)
    assert all("107K-quest-w2a2" in name for name in column(0))
    assert browser.all("[data-table=runs] output")[0].text == f"{len(column(0))} of 25 rows"


def test_the_theme_can_be_chosen_and_print_draws_all(browser, page):
    browser.open(page)
    ink = "return document.querySelector('#chart-frontier .plot').data.find(t => t.name === 'bf16').marker.color"
    browser.run("document.querySelector('#chart-frontier').scrollIntoView({behavior: 'instant'})")
    browser.wait("return document.querySelector('#chart-frontier .main-svg') !== null")
    assert browser.run(ink) == "#000000"
    browser.press("#theme")
    assert browser.run(ink) == "#e8e8e8"
    browser.run("window.dispatchEvent(new Event('beforeprint'))")
    assert browser.run(ink) == "#000000"
    assert browser.run("return [...document.querySelectorAll('.plot')].every(p => p.data && p.data.length)")
    browser.run("window.dispatchEvent(new Event('afterprint'))")
    assert browser.run(ink) == "#e8e8e8"


def test_names_of_runs_are_only_text(browser, tmp_path):
    cells = [(n, s, b) for n in (1e5, 2e5, 4e5) for s, b in ((EVIL, 4), ("bf16", 16))]
    rows = [
        {"run": f"{EVIL}{i}", "scheme": s, "N": n, "D": 20 * n, "loss": 3 - n / 1e6 - b / 100, "w_bits": b, "a_bits": b}
        for i, (n, s, b) in enumerate(cells)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "evil.csv", index=False)
    browser.open(_report(tmp_path, tmp_path / "evil.csv"))
    browser.read_on()
    assert browser.run("return document.title") == "evil.csv · questctl"
    assert browser.all("img") == []
    assert f"{EVIL}3" in browser.run("return document.querySelector('[data-table=runs]').textContent")
    hover = browser.run("return document.querySelector('#chart-frontier .plot').data.flatMap(t => t.text || []).join()")
    assert "&lt;script&gt;" in hover
    assert "<script>" not in hover
    assert browser.logs()[0] == []


@pytest.mark.slow
def test_a_thousand_runs_open_and_scroll(browser, tmp_path):
    ratios = tuple(range(8, 108, 2))
    some = report_runs.configs(ratios=ratios, presets=("53K", "107K", "214K", "640K", "1.3M"))
    assert len(some) == 1000
    report_runs.write_all(tmp_path / "runs", some, lines=500)
    page = _report(tmp_path, tmp_path / "runs")
    browser.open(page)
    browser.run("""window.stalls = []; new PerformanceObserver(l => window.stalls.push(...l.getEntries().map(e => e.duration)))
        .observe({type: 'longtask', buffered: true})""")
    browser.read_on()
    assert browser.logs()[0] == []
    assert max(browser.run("return window.stalls"), default=0) < 10_000  # milliseconds, on a machine that is busy otherwise
