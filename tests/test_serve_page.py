"""The page of the service shows the library's numbers, in a real browser, with no network but the service.

`LLMTRAIN_SCREENSHOTS=docs/images pytest tests/test_serve_page.py -k pictures` takes the pictures of the manual anew.
"""

import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain.config import ScheduleConfig
from llmtrain.schedules import catalog, plan
from llmtrain.schedules.summary import summarize
from tests.service import Service, running

pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import Browser, ConsoleMessage, Page, Route, expect, sync_playwright

REPO = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

BATCH = 4 * 2**20
DESKTOP, TALL, PHONE = {"width": 1360, "height": 900}, {"width": 1360, "height": 1080}, {"width": 360, "height": 740}
IDLE = "!document.querySelector('[aria-busy]')"
CURVES = "document.getElementById('rates').curves"
Open = Callable[..., Page]
expect.set_options(timeout=20_000)


def row(kind: str, step: int, loss: float) -> str:
    """A line of metrics.jsonl."""
    own = {"lr": step * 1e-5, "tokens_per_s": 7800.0} if kind == "step" else {"perplexity": 2.0**loss}
    return json.dumps({"kind": kind, "step": step, "tokens": step * 4096, "loss": loss, **own}) + "\n"


def write_run(folder: Path, updates: int, factor: float = 1.0) -> None:
    """A run folder after so many updates."""
    folder.mkdir(exist_ok=True)
    lines = [row("step", k, factor * (2 + 5 / k)) for k in range(1, updates + 1)]
    lines += [row("validation", k, factor * (2 + 5 / k)) for k in range(20, updates + 1, 20)]
    new = folder / "new"  # as a resume does: written beside, then renamed
    new.write_text("".join(lines))
    new.rename(folder / "metrics.jsonl")
    (folder / "config.yaml").write_text((REPO / "configs" / "demo_cosine.yaml").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "cosine", 60)
    write_run(root / "linear", 10_200, 1.02)
    return root


@pytest.fixture(scope="module")
def service(runs: Path) -> Iterator[Service]:
    with running("--runs", str(runs)) as started:
        yield started


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture
def visit(browser: Browser, service: Service) -> Iterator[Open]:
    """Open the page; at the end nothing may stand in its console, and nothing else may have been asked for."""
    contexts, faults, foreign = [], [], []

    def hear(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and "status of 422" not in message.text:
            faults.append(message.text)

    def admit(route: Route) -> None:
        if route.request.url.startswith(base):
            return route.continue_()
        foreign.append(route.request.url)
        return route.abort()

    base = f"http://127.0.0.1:{service.port}/"

    def opened(fragment: str = "", viewport: Any = DESKTOP, scheme: Any = "light") -> Page:
        context = browser.new_context(viewport=viewport, color_scheme=scheme)
        contexts.append(context)
        context.set_default_timeout(20_000)
        context.grant_permissions(["clipboard-read", "clipboard-write"], origin=base.rstrip("/"))
        context.route("**/*", admit)
        page = context.new_page()
        page.on("console", hear)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(base + fragment)
        until(page, f"location.hash.includes('view=runs') || {CURVES}?.length")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert faults == []
    assert foreign == []


def until(page: Page, condition: str, given: Any = None) -> None:
    """Wait until a JavaScript expression over `given` is true; Playwright's own wait needs eval, which is forbidden."""
    deadline = time.monotonic() + 20
    while not page.evaluate(f"given => Boolean({condition})", given):
        assert time.monotonic() < deadline, (condition, given, page.evaluate("document.body.innerText"))
        page.wait_for_timeout(40)


def card(page: Page, index: int) -> Any:
    return page.locator(f"[data-schedule='{index}']")


def slider(page: Page, index: int, key: str) -> Any:
    return card(page, index).locator(f"[data-key={key}] input[type=range]")


def exact(page: Page, index: int, key: str) -> Any:
    return card(page, index).locator(f"[data-key={key}] :is(input:not([type=range]), select, textarea)")


def settled(page: Page, configs: list[dict[str, Any]], conventions: tuple[str, ...] = ()) -> None:
    """Wait for the library's areas of `configs`, then compare every point that is drawn."""
    wanted = [
        {k: v for k, v in {**c, "convention": other}.items() if v} for c in configs for other in ("", *conventions)
    ]
    planned = [plan(ScheduleConfig.model_validate(config), BATCH) for config in wanted]
    own = planned[:: 1 + len(conventions)]
    areas = [summarize(schedule).area for schedule in own]
    shown = "[...document.querySelectorAll('.card [data-number=area]')].map(shown => Number(shown.value))"
    until(page, f"JSON.stringify({shown}) === JSON.stringify(given) && {IDLE}", areas)
    curves = page.evaluate(CURVES)
    assert len(curves) == len(planned)
    for curve, schedule in zip(curves, planned, strict=True):
        assert curve["y"] == (schedule.peak * schedule.multipliers(curve["x"])).tolist()
        assert {1, 2, 3, schedule.total_updates} <= set(curve["x"])


USUAL = {"peak": 3e-4, "warmup": "500 steps", "horizon": "20000 steps", "floor": 0.1}
THREE = [{"name": name, **USUAL} for name in ("cosine", "linear", "wsd")]


def test_a_slider_moves_the_curve_and_its_numbers(visit: Open) -> None:
    """A user would choose a peak by a curve or an area that training does not have."""
    page = visit()
    settled(page, THREE)
    slider(page, 0, "peak").focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    peak = float(exact(page, 0, "peak").input_value())
    assert peak == float(f"{1e-6 * 10 ** (5 * 253 / 500):.3g}")
    settled(page, [{**one, "peak": peak} for one in THREE])

    page.get_by_label("Shared peak").uncheck()
    slider(page, 0, "theta").focus()
    page.keyboard.press("End")
    exact(page, 0, "peak").fill("1.25e-3")
    settled(page, [{**THREE[0], "peak": 1.25e-3, "theta": 4}, *({**one, "peak": peak} for one in THREE[1:])])


@pytest.mark.parametrize("half", [0, 1])
def test_every_registered_schedule_can_be_chosen(visit: Open, half: int) -> None:
    """A schedule of the registry would be missing on the page, or drawn from other parameters than its fields show."""
    page = visit()
    names = card(page, 0).get_by_label("Shape of A").locator("option").all_text_contents()
    assert names == [shape.name for shape in catalog()]
    for name in names[half::2]:
        with page.expect_request(lambda request, name=name: f'"name":"{name}"' in (request.post_data or "")) as asked:
            card(page, 1).locator("select").first.select_option(name)
        configs = asked.value.post_data_json["configs"]
        settled(page, configs)
        fields = card(page, 1).locator("[data-key]").evaluate_all("found => found.map(field => field.dataset.key)")
        parameters = next(shape for shape in catalog() if shape.name == name).parameters
        assert set(fields) > {"peak", "warmup", "horizon", "floor", *parameters}


def test_a_schedule_is_added_and_removed(visit: Open) -> None:
    """Someone with four candidates could not lay them over one another."""
    page = visit()
    page.get_by_role("button", name="Duplicate C wsd").press("Enter")
    exact(page, 3, "decay").fill("40%")
    settled(page, [*THREE, {**THREE[2], "decay": "40%"}])
    card(page, 3).get_by_label("Shape of D").select_option("polynomial")
    slider(page, 3, "power").press("ArrowRight")
    settled(page, [*THREE, {"name": "polynomial", **USUAL, "power": 2.08}])
    page.get_by_role("button", name="Remove A cosine").click()
    settled(page, [*THREE[1:], {"name": "polynomial", **USUAL, "power": 2.08}])
    page.get_by_role("button", name="Add a schedule").click()
    expect(page.locator(".card")).to_have_count(4)


def test_a_refusal_stands_beside_its_field(visit: Open) -> None:
    """A user would not learn which of thirty fields is wrong, and lose sight of the curves that are right."""
    page = visit()
    card(page, 2).locator("summary").first.click()
    exact(page, 2, "decay").fill("140%")
    field = card(page, 2).locator("[data-key=decay]")
    expect(field.locator(".error")).to_contain_text("outside 0% to 100%")
    expect(exact(page, 2, "decay")).to_have_attribute("aria-invalid", "true")
    assert exact(page, 2, "decay").get_attribute("aria-describedby") == field.locator(".error").get_attribute("id")
    page.get_by_label("Shared peak").uncheck()
    exact(page, 0, "floor").fill("0.2")
    floor = plan(ScheduleConfig.model_validate({**THREE[0], "floor": 0.2}), 1)
    until(page, f"{CURVES}[0].y.at(-1) === given", floor.lr(20000))
    exact(page, 2, "decay").fill("14%")
    settled(page, [{**THREE[0], "floor": 0.2}, THREE[1], {**THREE[2], "decay": "14%"}])
    expect(field.locator(".error")).to_be_empty()
    page.get_by_label("Tokens per update").fill("many")
    expect(page.get_by_label("Tokens per update")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#setting-error")).not_to_be_empty()


def test_what_other_frameworks_make_of_it(visit: Open) -> None:
    """Someone who migrates a run would see another rate than their framework uses."""
    page = visit("#as=hf&as=torchtitan&x=log&y=log&s=" + json.dumps(THREE[0]))
    settled(page, THREE[:1], ("hf", "torchtitan"))
    assert len([k for k in page.evaluate(f"{CURVES}[0].x") if k < 100]) > 20
    page.get_by_label("nanogpt").check()
    settled(page, THREE[:1], ("hf", "nanogpt", "torchtitan"))
    card(page, 0).locator("select").first.select_option("wsd")
    expect(page.get_by_role("row", name="in nanogpt")).to_contain_text("has no schedule wsd")


def test_the_rate_of_one_update(visit: Open) -> None:
    """The rate under the pointer, or of the update asked for, would be a neighbour's."""
    page = visit()
    chart = page.locator("#rates")
    chart.focus()
    for key in ("ArrowLeft", "ArrowLeft"):
        chart.press(key)
    expect(chart.locator(".tip")).to_contain_text("update 19,999")
    cosine = plan(ScheduleConfig.model_validate(THREE[0]), 1)
    shown = chart.locator(".tip").inner_text().partition("A cosine ")[2].split()[0]
    assert float(shown) == float(f"{cosine.lr(19999):.6g}")
    chart.press("Enter")
    expect(page.get_by_label("Rate at update")).to_have_value("19999")
    page.get_by_label("Rate at update").fill("1234")
    rates = "[...document.querySelectorAll('#numbers [data-number=at]')].map(shown => Number(shown.value))"
    wanted = [plan(ScheduleConfig.model_validate(one), 1).lr(1234) for one in THREE]
    until(page, f"JSON.stringify({rates}) === JSON.stringify(given)", wanted)


def test_copied_yaml_is_a_schedule_section(visit: Open, tmp_path: Path) -> None:
    """The schedule found on the page could not be trained, or would train another curve."""
    pieces = [{"name": "constant", "length": "40%"}, {"name": "linear", "end": 0.1}]
    found = [
        {"name": "wsd", "decay": "15%", "cooldown": "1-sqrt", "warmup_shape": "cosine", "peak": 7.5e-7},
        {"name": "multistep", "drops": ["50%", "12000 steps"], "levels": [0.5, 0.25]},
        {"name": "chain", "pieces": pieces},
        {"name": "cosine", "horizon": "0.1B tokens", "warmup": "auto", "convention": "olmo"},
    ]
    configs = [{**USUAL, **own} for own in found]
    page = visit("#batch=4K&" + "&".join(f"s={json.dumps(config)}" for config in configs))
    command = [sys.executable, "-c", "import sys; from llmtrain.cli import main; main(sys.argv[1:])"]
    command += ["schedule", "show", "--json"]
    demo = (REPO / "configs/demo_cosine.yaml").read_text()
    for index, config in enumerate(configs):
        card(page, index).get_by_role("button", name="as YAML").click()
        expect(page.locator("#notice")).to_contain_text(f"{'ABCD'[index]} {config['name']} is copied")
        text = page.evaluate("navigator.clipboard.readText()")
        assert yaml.safe_load(text)["schedule"].keys() == config.keys()
        path = tmp_path / f"{index}.yaml"
        path.write_text(re.sub(r"^schedule:.*$", lambda _, text=text: text, demo, flags=re.MULTILINE))
        command += ["--config", str(path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    shown = json.loads(answer.stdout)["schedules"]
    areas = page.locator("#numbers [data-number=area]").evaluate_all("found => found.map(one => Number(one.value))")
    assert areas == [one["summary"]["area"] for one in shown]
    for curve, one in zip(page.evaluate(CURVES), shown, strict=True):
        assert curve["y"] == [one["lr"][k - 1] for k in curve["x"]]


def test_a_shared_link_shows_the_same(visit: Open) -> None:
    """A colleague would open the link and discuss another picture."""
    page = visit()
    page.get_by_role("group", name="Rate").get_by_label("log").check(force=True)
    page.get_by_label("megatron").check()
    page.get_by_label("Weight decay").fill("0.05")
    page.get_by_label("Rate at update").fill("77")
    slider(page, 0, "floor").press("ArrowRight")
    page.get_by_role("button", name="Remove B linear").click()
    page.get_by_role("button", name="Duplicate A cosine").click()
    exact(page, 1, "exponent").fill("1.5")
    until(page, f"{CURVES}.length === 6 && {IDLE}")
    page.get_by_role("button", name="Copy link").click()
    expect(page.locator("#notice")).to_contain_text("copied")
    link = page.evaluate("navigator.clipboard.readText()")

    def seen(shown: Page) -> Any:
        until(shown, f"{CURVES}.length === 6 && {IDLE}")
        fields = "[...document.querySelectorAll('input, select')].map(made => [made.checked, made.value])"
        return shown.evaluate(f"[{CURVES}, {fields}, document.getElementById('numbers').innerText]")

    before = seen(page)
    assert seen(visit(link[link.index("#") :])) == before
    until(page, "location.href === given", link)
    page.reload()
    until(page, f"{CURVES}?.length")
    assert seen(page) == before


def test_a_broken_link_says_so(visit: Open) -> None:
    """A link cut by a mail program would show a blank page."""
    page = visit("#s=%7B%22name%22%3A%22cos")
    expect(page.locator("#notice")).to_contain_text("cannot be read")
    settled(page, THREE)


def test_a_late_answer_does_not_win(visit: Open) -> None:
    """After a quick change on a slow line, the curve of the value before would stay."""
    page = visit()
    settled(page, THREE)
    held: list[Route] = []

    def hold_the_first(route: Route) -> None:
        if held:
            route.fallback()
        else:
            held.append(route)

    page.route("**/compare", hold_the_first)
    with page.expect_request("**/compare"):
        exact(page, 0, "peak").fill("1e-3")
    exact(page, 0, "peak").fill("2e-3")
    page.get_by_role("button", name="Remove C wsd").click()
    expect(page.locator(".card")).to_have_count(2)
    held[0].fallback()
    settled(page, [{**one, "peak": 2e-3} for one in THREE[:2]])


def test_runs_are_followed(visit: Open, runs: Path) -> None:
    """Someone who watches a run would look at an old loss, or make the service read the whole file again and again."""
    page = visit("#view=runs")
    losses = "document.getElementById('losses').curves"
    until(page, f"{losses}?.length === 4 && {losses}[0].x.length === 60 && {losses}[2].x.length === 10200")
    assert page.evaluate(f"{losses}[2].y") == [1.02 * (2 + 5 / k) for k in range(1, 10_201)]
    assert page.evaluate(f"{losses}[0].y") == [2 + 5 / k for k in range(1, 61)]
    assert page.evaluate(f"{losses}[1].x") == [20, 40, 60]
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    with (runs / "cosine" / "metrics.jsonl").open("a") as file:
        file.write(row("step", 61, 1.75) + row("validation", 61, 1.875) + row("step", 62, 1.5)[:20])
        file.flush()
        until(page, f"{losses}[0].x.at(-1) === 61 && {losses}[0].y.at(-1) === 1.75")
        file.write(row("step", 62, 1.5)[20:])
    until(page, f"{losses}[0].x.at(-1) === 62 && {losses}[0].x.length === 62")
    assert page.evaluate(f"{losses}[1].y.at(-1)") == 1.875
    assert page.evaluate("document.getElementById('run-rates').curves[0].y.at(-1)") == 62e-5
    assert float(page.locator("#run-numbers [data-number=loss]").first.get_attribute("value")) == 1.5
    assert not [url for url in asked if "after=0" in url]

    write_run(runs / "cosine", 30)
    until(page, f"{losses}[0].x.length === 30")
    page.get_by_role("checkbox", name="linear").uncheck()
    until(page, f"{losses}.length === 2")
    page.get_by_role("button", name="Open the schedule of cosine").click()
    expect(page.locator(".card")).to_have_count(4)
    demo = yaml.safe_load((REPO / "configs/demo_cosine.yaml").read_text())["schedule"]
    settled(page, [*THREE, {**demo, "peak": float(demo["peak"])}])


@pytest.fixture(scope="module")
def axe() -> str:
    pytest.importorskip("axe_playwright_python", reason="axe is not installed")
    return (files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nobody_is_shut_out(visit: Open, axe: str, scheme: str) -> None:
    """Someone with a screen reader, low vision or a small phone could not use the page."""
    page = visit(f"#as=hf&at=5&s={json.dumps(THREE[0])}", PHONE if scheme == "dark" else DESKTOP, scheme)
    page.get_by_role("button", name="Duplicate").click()
    card(page, 1).get_by_label("Shape of B").select_option("wsd")
    exact(page, 1, "decay").fill("140%")
    until(page, "document.querySelector('[aria-invalid]')")
    page.evaluate("for (const made of document.querySelectorAll('details')) made.open = true")
    page.evaluate(axe)
    for view in ("schedules", "runs"):
        page.locator(f"#views [data-view={view}]").click()
        if view == "runs":
            until(page, "document.getElementById('losses').curves?.length")
        found = page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
        grave = [one for one in found if one["impact"] in ("serious", "critical")]
        bad = [(one["id"], [node["html"] for node in one["nodes"]]) for one in grave]
        assert bad == []
        for viewport in (DESKTOP, PHONE):
            page.set_viewport_size(viewport)
            assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def test_keys_reach_everything(visit: Open) -> None:
    """Someone without a mouse would be stuck, or not see where they are."""
    page = visit()
    described = """() => {
        const here = document.activeElement, shown = here.matches('.switch input') ? here.nextElementSibling : here;
        const outline = getComputedStyle(shown).outlineStyle !== 'none' && shown.getBoundingClientRect().width > 0;
        return [here.id || here.name || here.getAttribute('aria-label') || here.textContent, outline];
    }"""
    reached: dict[str, bool] = {}
    for _ in range(60):
        page.keyboard.press("Tab")
        name, outlined = page.evaluate(described)
        reached.setdefault(name, outlined)
    wanted = {
        "rates",
        "x",
        "y",
        "numbers",
        "at",
        "batch",
        "convention",
        "linked",
        "add",
        "share",
        "theme",
        "Shape of A",
    }
    wanted |= {
        "peak of A cosine, slider",
        "theta of A cosine, slider",
        "Parameters of B linear",
        "Remove C wsd",
        "Runs",
    }
    assert wanted <= reached.keys()
    assert [name for name in wanted if not reached[name]] == []


def test_the_theme_is_the_viewers(visit: Open) -> None:
    """Who reads in the dark would be blinded at every visit."""
    page = visit()
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    for name in ("light", "dark"):
        page.get_by_role("button", name="Theme").press("Enter")
        expect(page.get_by_role("button", name=f"Theme: {name}")).to_be_visible()
    assert page.evaluate(background) != light
    page.reload()
    expect(page.get_by_role("button", name="Theme: dark")).to_be_visible()
    assert page.evaluate(background) != light


def test_a_token_is_asked_for(browser: Browser, tmp_path: Path) -> None:
    """The page of a closed service would stay empty, and one without runs would offer them."""
    token = tmp_path / "token"
    token.write_text("0123456789abcdef-token")
    with running("--token-file", str(token)) as closed:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{closed.port}/")
        page.get_by_label("Token", exact=True).fill("not this one at all")
        page.get_by_role("button", name="Go on").click()
        expect(page.locator("#token-error")).to_contain_text("not accepted")
        page.get_by_label("Token", exact=True).fill(token.read_text())
        page.keyboard.press("Enter")
        settled(page, THREE)
        expect(page.locator("#views [data-view=runs]")).to_be_hidden()
        page.close()


def write_likely_run(folder: Path, shape: str, gain: float) -> None:
    """Rows as a run might have written them, for a picture."""
    schedule = plan(
        ScheduleConfig.model_validate({"name": shape, **USUAL, "warmup": "60 steps", "horizon": "3000 steps"}), 1
    )
    noise = random.Random(shape)
    lines = []
    for k in range(1, 3001 if shape == "linear" else 2401):
        loss = 2.5 + gain * k / 3000 + 6.5 / (1 + k / 40) ** 0.75
        row = {
            "kind": "step",
            "step": k,
            "tokens": k * BATCH,
            "loss": loss + noise.gauss(0, 0.04),
            "lr": schedule.lr(k),
        }
        lines.append(json.dumps({**row, "tokens_per_s": 78_000 + noise.gauss(0, 200)}))
        if k % 200 == 0:
            lines.append(json.dumps({**row, "kind": "validation", "loss": loss, "perplexity": math.exp(loss)}))
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.skipif("LLMTRAIN_SCREENSHOTS" not in os.environ, reason="LLMTRAIN_SCREENSHOTS names no folder")
def test_pictures(visit: Open, runs: Path) -> None:
    """The manual would show a page that is no longer so."""
    from PIL import Image

    write_likely_run(runs / "7b_cosine", "cosine", 0.02)
    write_likely_run(runs / "7b_linear", "linear", -0.03)
    folder = Path(os.environ["LLMTRAIN_SCREENSHOTS"])
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, tuple[str, Any, str]] = {
        "page": ("", DESKTOP, "light"),
        "page-dark": ("#as=hf&as=deepspeed&x=log&y=log&at=1000", DESKTOP, "dark"),
        "page-phone": ("", PHONE, "light"),
        "runs": ("#view=runs&run=7b_cosine&run=7b_linear&loss=log&runs_x=log", TALL, "light"),
    }
    for name, (fragment, viewport, scheme) in pictures.items():
        page = visit(fragment, viewport, scheme)
        until(page, f"{IDLE} && document.querySelector('section:not([hidden]) .curve')")
        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(96, dither=Image.Dither.NONE)
        picture.save(folder / f"{name}.png", optimize=True)
        assert (folder / f"{name}.png").stat().st_size < 200_000
