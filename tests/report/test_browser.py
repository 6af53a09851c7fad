"""The report in Debian's Chromium: the viewer is driven, axe looks for barriers, nothing is fetched.

`TUCODEC_SCREENSHOTS=DIR` keeps the screenshots.
"""

import base64
import io
import os
import shutil
from collections.abc import Iterator
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightning_tucodec.quality.curves import Curve, ImageCurves
from lightning_tucodec.report.compare import build_page
from lightning_tucodec.report.gallery import picture
from lightning_tucodec.report.page import Scene, View, write_page
from lightning_tucodec.report.sources import Entry, Evaluation, Material, Run
from tests.support import photo

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="Debian's packages chromium and chromium-driver are not installed",
)

SIZES = {"desktop": (1440, 900), "phone": (390, 844)}

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--force-device-scale-factor=1", "--hide-scrollbars"),
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every part of a real one.

    Sixteen curves, BD-rates with and without intervals and a refused one, training curves, costs,
    configurations, sources, and two images in three views.
    """
    material = Material()
    codecs = [f"codec-{i}:preset=medium" for i in range(10)]
    names = ["tiny", "vvc", *codecs, "VTM <3 & more", "BPG 8b 444 x265 ycbcr", "elic2022"]
    for index, name in enumerate(names):
        bpp = np.array([0.1, 0.2, 0.4, 0.8]) * (1 + 0.1 * index)
        quality = {"psnr": [27.0, 30, 33, 36], "ms_ssim_db": [10.0, 12, 14, 16]}
        curve = Curve.of(name, bpp, quality, "made up")
        psnr, similar = np.array(quality["psnr"]), 1 - 10 ** (-np.array(quality["ms_ssim_db"]) / 10)
        images = [np.stack([v, v * 1.01]) for v in (bpp, psnr, similar)]
        by_image = ImageCurves(name, ["cat.png", "cup.png"], *images)
        measured = index < 12
        material.entries.append(Entry(curve, by_image if measured else None, measured))
    few = Curve.of("one point", [0.3], {"psnr": [31.0], "ms_ssim_db": [13.0]}, "made up")
    material.entries.append(Entry(few))
    sets = [
        {"codec": f"{n}:q={q}", "images": 2, "encode_seconds": q, "decode_seconds": 0.1}
        for n in codecs
        for q in (10, 20, 30, 40)
    ]
    word = {
        "version": "libaom-av1 3.15.1 in ffmpeg 9.0.2-17",
        "colour": "RGB -> Y'CbCr BT.709 full range, 10 bit, 4:2:0 centre-sited",
        "options": {"q": 10, "optimize": True},
    }
    said = {entry["codec"]: word for entry in sets}
    rows = [{"image": "cat.png", "codec": sets[0]["codec"], "ceiling_psnr": 40.0}]
    rules = {
        "psnr": "RGB, 8 bit, pooled: squared error summed over all values of all images (CLIC)"
    }
    material.evaluations.append(Evaluation(Path("results.json"), sets, rows, said, rules))
    for index in range(2):
        steps = range(1, 200)
        metrics = [{"opt_step": s, "time": s, "train/loss": 1 + 9 / s + index} for s in steps]
        metrics += [{"opt_step": s, "val/centres_used": s / 10} for s in steps[::20]]
        material.runs.append(Run(f"run-{index}", {"model": {"lmbda": index}}, metrics))
    pictures = []
    for name, kind in (("cat.png", "chelsea.png"), ("cup.png", "coffee.png")):
        image = photo(kind, 192, 128)
        red = np.zeros_like(image)
        red[..., 0] = 255
        views = [("original", image), ("negative", 255 - image), ("red", red)]
        shown = [View(n, "0.15 bpp", picture(i, 1 << 20)[0], 192, 128) for n, i in views]
        pictures.append(Scene(name, 192, 128, shown))
    page, _ = build_page(material, "vvc", "Learned and classical codecs, compared", 20)
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_page(path, page._replace(scenes=pictures))
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    driver.set_script_timeout(120)
    yield driver
    driver.quit()


def load(browser: Any, report: Path, size: str) -> None:
    """Open the page at a size, and wait until charts and pictures are drawn."""
    width, height = SIZES[size]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(report.as_uri())
    browser.execute_async_script(
        "const done = arguments[0]; viewer.load().then(() => requestAnimationFrame(() => done()));"
    )


def pixels(browser: Any) -> np.ndarray:
    """What the viewer's canvas shows, H×W×3."""
    script = "return canvas.toDataURL('image/png').split(',')[1]"
    data = base64.b64decode(browser.execute_script(script))
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def element(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def press(browser: Any, keys: str) -> None:
    """Keys for the viewer."""
    element(browser, "#stage").send_keys(keys)


def choose(browser: Any, select: str, name: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(element(browser, select)).select_by_visible_text(name)
    browser.execute_async_script("const done = arguments[0]; viewer.load().then(done);")


def screenshot(browser: Any, name: str) -> None:
    folder = os.environ.get("TUCODEC_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        shot = {"captureBeyondViewport": True, "format": "png"}
        data = browser.execute_cdp_cmd("Page.captureScreenshot", shot)["data"]
        (Path(folder) / f"{name}.png").write_bytes(base64.b64decode(data))


def middle(shown: np.ndarray) -> np.ndarray:
    """A part that is inside the picture whatever its shape."""
    height, width = shown.shape[:2]
    return shown[height // 4 : -height // 4, width // 3 : -width // 3]


def is_red(part: np.ndarray) -> bool:
    return bool(np.abs(part.astype(int) - [255, 0, 0]).max() <= 2)


def test_slider(browser: Any, report: Path) -> None:
    load(browser, report, "desktop")
    choose(browser, "#view-b", "red")
    shown = pixels(browser)
    height, width = shown.shape[:2]
    rows = slice(height // 4, height // 3)
    assert is_red(shown[rows, width * 6 // 10 : width * 9 // 10])
    left = shown[rows, width // 10 : width * 4 // 10]
    assert not is_red(left)
    # The divider goes where the pointer drags it, and where keys on the range move it.
    from selenium.webdriver import ActionChains
    from selenium.webdriver.support.ui import WebDriverWait

    canvas, divider = (element(browser, selector) for selector in ("#canvas", "#divider"))
    chain = ActionChains(browser).move_to_element(canvas).click_and_hold()
    chain.move_by_offset(-width * 4 // 10, 0).release().perform()
    # A browser hands on moves of the pointer with its next frame.
    arrived = pytest.approx(100, abs=15)
    WebDriverWait(browser, 30).until(lambda _: float(divider.get_property("value")) == arrived)
    assert is_red(pixels(browser)[rows, width * 2 // 10 : width * 9 // 10])
    before = float(divider.get_property("value"))
    divider.send_keys("\ue014" * 5)
    assert float(divider.get_property("value")) == before + 5
    browser.execute_script("viewer.setSplit(1)")
    # A is the original, enlarged without smoothing or shown at its size.
    press(browser, "1")
    shown = pixels(browser)
    top, start = (shown.shape[0] - 128) // 2, (shown.shape[1] - 192) // 2
    part = shown[top : top + 128, start : start + 192]
    assert np.abs(part[:, :-4].astype(int) - photo("chelsea.png", 192, 128)[:, :-4]).max() <= 1


def test_flicker_original_and_images_by_keys(browser: Any, report: Path) -> None:
    load(browser, report, "desktop")
    choose(browser, "#view-a", "negative")
    choose(browser, "#view-b", "red")
    press(browser, "f")
    states = browser.execute_async_script(
        "const done = arguments[0], seen = []; const timer = setInterval(() => {"
        "seen.push(viewer.swapped); if (seen.length > 60) { clearInterval(timer); done(seen); }}, 50);"
    )
    changes = sum(a != b for a, b in pairwise(states))
    assert 2 <= changes <= 9  # below three a second
    press(browser, " ")
    first = pixels(browser)
    press(browser, " ")
    second = pixels(browser)
    assert is_red(middle(first)) != is_red(middle(second))
    press(browser, "o")
    assert element(browser, "#original").get_attribute("aria-pressed") == "true"
    original = pixels(browser)
    assert not is_red(middle(original))
    press(browser, "on")
    assert "cup.png" in element(browser, "#canvas").get_attribute("aria-label")
    # A and B are still the same codecs.
    assert "negative" in element(browser, "#caption").text


def test_zoom_and_pan_are_the_same_on_both_sides(browser: Any, report: Path) -> None:
    load(browser, report, "desktop")
    choose(browser, "#view-b", "original")
    press(browser, "d+++")
    before = pixels(browser)
    press(browser, "\ue014\ue015")
    shown = pixels(browser)
    assert not np.array_equal(before, shown)
    half = shown.shape[1] // 2
    left, right = (shown[60:, start + 4 : start + half - 4] for start in (0, half))
    assert np.array_equal(left, right)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_barriers_and_nothing_fetched(browser: Any, report: Path, size: str, theme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    load(browser, report, size)
    browser.execute_script(
        "for (const part of document.querySelectorAll('details')) part.open = true"
    )
    source = files("axe_core_python").joinpath("axe.min.js").read_text("utf-8")
    browser.execute_script(source)
    result = browser.execute_async_script(
        "const done = arguments[0]; axe.run().then(done, (error) => done({error: String(error)}));"
    )
    assert "error" not in result, result
    serious = {
        violation["id"]: [node["html"][:200] for node in violation["nodes"]]
        for violation in result["violations"]
        if violation["impact"] in ("serious", "critical")
    }
    assert not serious
    assert result["passes"]
    screenshot(browser, f"{size}-{theme}")
    # Nothing sticks out to the side of the window.
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    fetched = browser.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert not [name for name in fetched if not name.startswith(("data:", "blob:"))]
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    drawn = browser.execute_script("return document.querySelectorAll('.plot .main-svg').length")
    assert drawn >= 2 * len(browser.find_elements("css selector", ".plot"))


def test_tables_sort(browser: Any, report: Path) -> None:
    load(browser, report, "desktop")
    table = "document.querySelector('#bd tbody').rows"
    column = f"[...{table}].map((row) => row.cells[2].dataset.value)"
    button = element(browser, "#bd th:nth-child(3) button")
    for direction, factor in (("ascending", 1), ("descending", -1)):
        button.send_keys("\ue007")
        head = element(browser, "#bd th:nth-child(3)")
        assert head.get_attribute("aria-sort") == direction
        values = [factor * float(v) for v in browser.execute_script(f"return {column}") if v]
        assert len(values) == 28
        assert values == sorted(values)


def test_legends_choose_lines(browser: Any, report: Path) -> None:
    load(browser, report, "phone")
    # Every line has a name below its chart, nothing to scroll, all inside of the window.
    names = browser.execute_script(
        "return [...document.querySelector('#curves .legend').children].map((b) => {"
        "const box = b.getBoundingClientRect(); return [b.innerText.trim(), box.left, box.right]; })"
    )
    shown = [name for name, *_ in names]
    assert {"VTM <3 & more", "4:2:0 ceiling", "convex hull", "Hide all"} <= set(shown)
    assert all(left >= 0 and right <= SIZES["phone"][0] for _, left, right in names)
    plots = "[...document.querySelectorAll('#curves .plot')]"
    count = f"return {plots}.map((plot) => plot.querySelectorAll('.trace').length)"
    before = browser.execute_script(count)
    assert before == [len(shown) - 1, len(shown) - 2]
    button = element(browser, "#curves .legend [data-name='VTM <3 & more']")
    button.send_keys("\ue007")
    # Both charts hide it.
    assert browser.execute_script(count) == [n - 1 for n in before]
    pressed = "return document.querySelectorAll('#curves .legend [aria-pressed=false]').length"
    assert browser.execute_script(pressed) == 2
    every = element(browser, "#curves .legend .all")
    assert every.text == "Show all"
    every.send_keys("\ue007")
    assert browser.execute_script(count) == before
    every.send_keys("\ue007")
    assert browser.execute_script(count) == [0, 0]
    every.send_keys("\ue007")
    element(browser, "[data-rates=log]").send_keys("\ue007")
    kinds = f"return {plots}.map((plot) => plot.layout.xaxis.type)"
    assert browser.execute_script(kinds) == ["log", "log"]
    assert browser.execute_script(count) == before


def test_charts_answer_the_pointer(browser: Any, report: Path) -> None:
    from selenium.webdriver import ActionChains

    load(browser, report, "desktop")
    point = element(browser, "#curves .plot .scatterlayer .point")
    ActionChains(browser).move_to_element(point).perform()
    browser.execute_async_script("setTimeout(arguments[0], 300)")
    assert "dB" in element(browser, "#curves .plot").get_attribute("aria-label")
    assert element(browser, "#curves .plot .hoverlayer").text
