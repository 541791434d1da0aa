"""Is the page of a comparison one that can be sent to a colleague? Opened in a real browser, without a network."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.study.compare import Comparison, compare
from llmtrain.study.report import sentences
from llmtrain.study.report_page import drawn_rows, write_html
from tests.compare_runs import write_run

pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCHEDULES = {
    "cosine": (),
    "linear": (),
    "wsd10": ("decay=10%",),
    "wsd20": ("decay=20%",),
    "constant": (),
    "polynomial": ("power=2.0",),
    "inverse_sqrt": (),
    "step": (),
    "sgdr": (),
    "exponential": ("floor=0.1",),
}
ROWS, SEEDS = 10_000, 5
# The luminance of the ground, and of every text and curve with that of what it stands on (WCAG 2, relative luminance).
COLOURS = """() => {
  const linear = value => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const luminance = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(text => linear(Number(text) / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = luminance(getComputedStyle(document.body).backgroundColor);
  const seen = [...document.querySelectorAll("p, li, td, th, button, h1, #loss .curve")].map(element => {
    const style = getComputedStyle(element), button = element.tagName === "BUTTON";
    return [element.tagName, luminance(element.tagName === "path" ? style.stroke : style.color),
            button ? luminance(style.backgroundColor) : ground];
  });
  return [ground, seen];
}"""
Visit = Callable[..., Page]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten schedules with five seeds of 10,000 updates each, noisy, with a spike."""
    folder = tmp_path_factory.mktemp("study")
    generator = np.random.default_rng(0)
    for index, (name, words) in enumerate(SCHEDULES.items()):
        overrides = [f"schedule.{word}" for word in (f"name={name.rstrip('0123456789')}", *words)]
        for seed in range(1, SEEDS + 1):
            noise = generator.normal(0, 0.05, ROWS)
            noise[7000 + seed] += 2.5

            def losses(k: np.ndarray, end: float = 3 + 0.02 * index, noise: np.ndarray = noise) -> np.ndarray:
                return end + 6 * (k**-0.5 - ROWS**-0.5) + noise[: len(k)]

            end = 3 + 0.02 * index + 0.01 * seed + generator.normal(0, 0.002)
            write_run(folder / f"{name}_s{seed}", end, *overrides, seed=seed, updates=ROWS, losses=losses)
    return folder


@pytest.fixture(scope="module")
def comparison(study: Path) -> Comparison:
    return compare([study], baseline="cosine")


@pytest.fixture(scope="module")
def page_file(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "new" / "report.html"
    write_html(comparison, path)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """Open a file without a network; at the end nothing may stand in its console or have been asked for."""
    contexts, faults = [], []

    def opened(path: Path, scheme: Any = "light", width: int = 1280) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        contexts.append(context)
        context.set_default_timeout(20_000)
        page = context.new_page()
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or faults.append(request.url))
        page.goto(path.as_uri())
        expect(page.locator("#loss .curve").first).to_be_visible()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert faults == []


def test_fifty_runs_fit_into_a_mail(page_file: Path, study: Path) -> None:
    """The page could not be sent, or would show curves without the spikes that matter."""
    assert page_file.stat().st_size < 3_000_000
    text = page_file.read_text()
    assert not re.search(r"(src|href)=.(https?:)?//", text)
    data = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[0])
    assert len(data["runs"]) == 50 and len(data["cells"]) == 10
    for run in data["runs"]:
        rows = [json.loads(line) for line in (study / run["name"] / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if row["kind"] == "step"]
        drawn, losses = run["training"], [round(row["loss"], 4) for row in rows]
        assert all(drawn["loss"][i] == losses[step - 1] for i, step in enumerate(drawn["steps"]))
        assert {max(losses), min(losses)} <= set(drawn["loss"]) and {1, ROWS} <= set(drawn["steps"])
        assert 7001 + run["seed"] in drawn["steps"]
        break


@pytest.mark.parametrize("rows", [1, 2, 5, 400, 1000, 9999])
def test_every_extreme_of_a_long_curve_is_drawn(rows: int) -> None:
    """A spike of one update, or the peak of a schedule, would vanish from the picture."""
    generator = np.random.default_rng(rows)
    losses, lrs = generator.normal(3, 1, rows), np.minimum(np.arange(rows) / 37, 1.0) * (np.arange(rows) < 0.8 * rows)
    kept = drawn_rows(losses, lrs, 400)
    assert len(kept) <= 400 and np.all(np.diff(kept) > 0) and {0, rows - 1} <= set(kept.tolist())
    assert losses.argmax() in kept and losses.argmin() in kept
    assert np.abs(np.interp(np.arange(rows), kept, lrs[kept]) - lrs).max() < 1e-9
    for block in np.array_split(np.arange(rows), 40):  # blocks larger than those of the rule
        if len(block) > 3 * rows / 100:
            assert block[losses[block].argmax()] in kept and block[losses[block].argmin()] in kept
    losses[rows // 2] = np.nan
    assert rows // 2 in drawn_rows(losses, lrs, 400)


def test_a_curve_is_hidden_by_click_and_by_key(page_file: Path, visit: Visit) -> None:
    """Fifty curves over one another could not be read, or only with a mouse."""
    page = visit(page_file)
    curves = page.locator("#loss > g:not(.cross) .curve")
    expect(curves).to_have_count(50)
    button = page.get_by_role("button", name="cosine", exact=True)
    button.click()
    expect(curves).to_have_count(45)
    expect(button).to_have_attribute("aria-pressed", "false")
    expect(page.locator("#rate > g:not(.cross) .curve")).to_have_count(45)
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    expect(curves).to_have_count(40)
    button.focus()
    page.keyboard.press("Enter")
    expect(curves).to_have_count(45)
    for name in ("training", "tokens", "area", "second half", "validation", "all"):
        page.get_by_role("button", name=name, exact=True).click()
        expect(curves).to_have_count(45)
        assert "NaN" not in page.locator("#loss").inner_html()


def test_tip_says_what_the_log_says(page_file: Path, comparison: Comparison, visit: Visit) -> None:
    """The number read from the picture would be another than the run's."""
    page = visit(page_file)
    page.get_by_role("button", name="training", exact=True).click()
    chart, tip = page.locator("#loss"), page.locator("#tip")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.71, box["y"] + 60)
    expect(tip).to_be_visible()
    said = re.match(r"(\w+): (.+), peak [\d.]+, seed (\d)\nupdate ([\d,]+), ([\d,]+) tokens, area ([\d.]+)\n"
                    r"training loss ([\d.]+), learning rate ([\de.-]+)$", tip.inner_text())  # fmt: skip
    assert said is not None, tip.inner_text()
    (run,) = (run for run in comparison.runs if run.name == said[1])
    at = int(said[4].replace(",", "")) - 1
    assert (run.seed, int(run.tokens[at])) == (int(said[3]), int(said[5].replace(",", "")))
    assert float(said[7]) == round(float(run.losses[at]), 4) and float(said[8]) == pytest.approx(run.lrs[at], rel=1e-4)
    assert float(said[6]) == pytest.approx(run.areas[at], rel=1e-4)
    assert float(said[7]) > 5  # the pointer stood near the spikes at the top
    page.mouse.move(5, 5)
    expect(tip).to_be_hidden()
    page.get_by_role("button", name="validation", exact=True).click()
    chart.focus()
    page.keyboard.press("ArrowRight")
    expect(tip).to_contain_text("update 10,000")
    expect(tip).to_contain_text(", annealed")
    first = tip.inner_text()
    page.keyboard.press("ArrowLeft")
    expect(tip).to_contain_text("not annealed")
    page.keyboard.press("ArrowDown")
    assert tip.inner_text().split(":")[0] != first.split(":")[0]
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()


def test_words_and_numbers_of_the_report_are_on_the_page(page_file: Path, comparison: Comparison, visit: Visit) -> None:
    """A colleague would see pictures without an answer."""
    page = visit(page_file)
    text = page.locator("body").inner_text()
    for reading in comparison.readings:
        for _, sentence in sentences(comparison, reading):
            assert sentence in text
    for run in comparison.runs:
        assert f"{run.loss:.4f}" in text and run.name in text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_readable_by_day_and_night_and_on_a_phone(page_file: Path, visit: Visit, scheme: str) -> None:
    """Curves or words would vanish into the ground, or the page run out of a small screen."""
    page = visit(page_file, scheme, 390)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    ground, colours = page.evaluate(COLOURS)
    assert (ground < 0.1) == (scheme == "dark")
    for tag, ink, behind in colours:
        contrast = (max(ink, behind) + 0.05) / (min(ink, behind) + 0.05)
        assert contrast >= (3 if tag == "path" else 4.5), (tag, contrast)


def test_names_cannot_break_the_page(tmp_path: Path, visit: Visit) -> None:
    """A folder with an odd name would run as a script in a colleague's browser."""
    odd = "</script><img src=x onerror=alert(1)>"
    folder = write_run(tmp_path / "a", 4.6, losses=lambda k: np.where(k == 9, np.nan, 4.0 + 0 * k))
    runs = [folder.rename(tmp_path / odd.replace("/", "\u2044")), write_run(tmp_path / "b", 4.5)]
    write_html(compare(runs), tmp_path / "r.html")
    page = visit(tmp_path / "r.html")
    assert "onerror=alert" in page.locator("body").inner_text()
    assert page.locator("img").count() == 0
