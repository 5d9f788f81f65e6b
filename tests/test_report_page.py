"""The page of a report in a real browser: what it shows, what it asks for, and how it looks where it is read."""

import json
import shutil
import time
from urllib.parse import urlsplit

import pytest
import torch

from se_inject import blocks, inject
from se_inject.datasets import open_data
from se_inject.formats import InputFormat
from se_inject.loaders import EvalLoader
from se_inject.report import Wishes, make_report
from se_inject.report_page import make_page
from se_inject.timing import Conditions
from se_inject.validation import Validation
from se_inject.world import World
from tests.digits import DigitNet, write_digits

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver")
OPTIONS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars"
)
SECTIONS = {"network", "classes", "blocks", "images", "advice"}
# A panel a block (two stages), and the four of all blocks; the fewest shapes that each must have.
CHARTS = {
    "stage-0-block-0": 5, "stage-1-block-0": 5, "stage-1-block-1": 5, "distribution": 10, "variation": 6,
    "accuracy-lost": 6, "loss-added": 3,
}  # fmt: skip
TITLES = {
    "stage-0-block-0": {"channel", "mean gate", "block1.se"},
    "distribution": {"gate"},
    "variation": {"standard deviation of a gate over images", "class-specific", "within a class"},
    "accuracy-lost": {"top-1 lost, points of per cent"},
    "loss-added": {"mean cross-entropy added"},
}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    torch.manual_seed(0)
    model = inject(DigitNet(), example=torch.zeros(2, 1, 8, 8)).eval()
    for block in blocks(model).values():
        torch.nn.init.normal_(block.fc2.weight)
    world = World(torch.device("cpu"))
    data = open_data(str(write_digits(folder / "digits", 400)), mode="L", is_evaluation=True)
    loader = EvalLoader(
        data.val, InputFormat((1, 8, 8), (0.5,), (0.5,)), batch_size=50, workers=0, world=world, num_classes=10
    )
    wishes = Wishes(conditions=Conditions(rounds=1, compiled=False), name="tuned.pt", command="se-inject simplify " * 9)
    report = make_report(model, Validation(data, loader, world, 10), wishes)
    (folder / "report.html").write_text(make_page(report))
    return f"file://{folder / 'report.html'}"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in (*OPTIONS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--window-size=1280,900"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def show(browser, page):
    """Open the page as some reader has it, with its charts drawn."""

    def show(width=1280, height=900, scheme="light", media="screen"):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
        browser.get(page)
        wait_for(lambda: browser.execute_script("return document.documentElement.dataset.charts") == "drawn")
        return browser

    return show


def wait_for(is_done, seconds=120):
    end = time.monotonic() + seconds
    while not is_done():
        assert time.monotonic() < end, "the browser took too long"
        time.sleep(0.05)


def find_texts(browser, name):
    return set(
        browser.execute_script(
            "return [...document.querySelectorAll(`#${arguments[0]} svg text`)].map(e => e.textContent)", name
        )
    )


def test_the_page_opens_without_an_error_and_asks_no_network(show, browser):
    browser.get_log("performance"), browser.get_log("browser")
    show()
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked
    assert {urlsplit(url).scheme for url in asked} <= {"file", "data"}


def test_every_section_has_its_content(show):
    browser = show()
    texts = browser.execute_script(
        "return Object.fromEntries([...document.querySelectorAll('section')].map(e => [e.id, e.innerText]))"
    )
    assert set(texts) == SECTIONS
    for section, expected in {
        "network": ("without blocks, optimized", "ms", "top-1"),
        "classes": ("most often taken for", "Stage 0", "Stage 1"),
        "blocks": ("block2.se", "class-specific", "distance from 1"),
        "images": ("classified", "distance"),
        "advice": ("se-inject simplify", "because", "block1.se"),
    }.items():
        assert all(text in texts[section] for text in expected), (section, texts[section])
    sizes = browser.execute_script("return [...document.querySelectorAll('.pictures img')].map(e => e.naturalWidth)")
    assert len(sizes) == 12
    assert min(sizes) > 0


def test_charts_are_vectors_with_axes(show):
    browser = show()
    counts = browser.execute_script("""
        const shapes = ['path', 'line', 'rect'].map(name => `svg [class*=role-mark] ${name}`).join();
        return Object.fromEntries([...document.querySelectorAll('.chart')].map(
            e => [e.id, e.querySelectorAll(shapes).length]))""")
    assert set(counts) == set(CHARTS)
    assert {name: count for name, count in counts.items() if count < CHARTS[name]} == {}
    for name, titles in TITLES.items():
        assert titles <= find_texts(browser, name)
    assert browser.execute_script("return document.querySelectorAll('canvas').length") == 0


@pytest.mark.parametrize(
    ("mark", "expected"),
    [
        ("#stage-0-block-0 .layer_3_marks line:nth-child(8)", ("channel", "all images", "±")),
        ("#distribution .mark-rect path:nth-child(3)", ("share of gates", "block1.se")),
        ("#variation .mark-bar path, #variation .mark-rect path", ("standard deviation", "share of the variance")),
        ("#accuracy-lost .mark-symbol path", ("top-1 lost, points", "95 % interval from")),
    ],
)
def test_values_show_where_the_pointer_is(show, mark, expected):
    browser = show()
    place = browser.find_element("css selector", mark)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", place)
    webdriver.ActionChains(browser).move_to_element(place).perform()

    def read():
        return browser.execute_script("return document.querySelector('#vg-tooltip-element.visible')?.innerText ?? ''")

    wait_for(lambda: read() != "", 5)
    assert all(text in read() for text in expected), read()


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_never_scrolls_sideways(show, width):
    browser = show(width, 800)
    assert browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]") == [width, width]
    wide = browser.execute_script("""
        return [...document.querySelectorAll('.chart svg, .pictures li, pre, dl')].filter(
            e => e.getBoundingClientRect().right > innerWidth + 0.5 || e.getBoundingClientRect().left < 0).length""")
    assert wide == 0


def read_colours(browser):
    return browser.execute_script("""
        const colour = (query, name) => getComputedStyle(document.querySelector(query))[name];
        return {
            paper: colour('body', 'backgroundColor'), text: colour('body', 'color'),
            axis: colour('#accuracy-lost svg .role-axis-title text', 'fill'),
            line: colour('#stage-0-block-0 .mark-line path:nth-of-type(1)', 'stroke'),
            bar: colour('#loss-added .role-mark path', 'fill')}""")


def test_charts_are_dark_with_the_page_and_light_on_paper(show):
    light = read_colours(show(scheme="light"))
    dark = read_colours(show(scheme="dark"))
    printed = read_colours(show(scheme="dark", media="print"))
    assert light["paper"] == "rgb(255, 255, 255)"
    assert {name for name in light if light[name] == dark[name]} == set()
    assert (dark["axis"], dark["line"]) == (dark["text"], dark["text"])
    assert {name: value for name, value in printed.items() if name != "paper"} == {
        name: value for name, value in light.items() if name != "paper"
    }


def test_a_change_of_the_scheme_shows_at_once(show):
    browser = show(scheme="light")
    before = read_colours(browser)
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "screen", "features": features})
    assert read_colours(browser)["axis"] != before["axis"]


def test_charts_follow_the_width_of_the_window(show):
    browser = show(1280)
    before = browser.execute_script("return document.querySelector('#distribution svg').getBoundingClientRect().width")
    size = {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    wait_for(
        lambda: (
            browser.execute_script("return document.querySelector('#distribution svg').getBoundingClientRect().width")
            < 0.8 * before
        )
    )
    assert browser.execute_script("return document.documentElement.scrollWidth") == 360


def test_the_page_can_be_read_without_its_pictures(show):
    browser = show()
    bare = browser.execute_script("""
        return [...document.querySelectorAll('img:not([alt]), .chart:not([aria-label]), table:not(:has(caption)),' +
            'th:not([scope]), section:not([aria-labelledby]), .scroll:not([tabindex])')].map(e => e.outerHTML)""")
    assert bare == []
    levels = browser.execute_script("return [...document.querySelectorAll('h1, h2, h3')].map(e => e.tagName)")
    assert levels[:3] == ["H1", "H2", "H2"]
