"""Does `llmtrain schedule` show the learning rates that a run will use, in every form it offers?"""

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.cli import main
from llmtrain.config import ScheduleConfig
from llmtrain.config_file import load_config, parse_yaml
from llmtrain.schedules import Schedule, catalog, plan, registry
from llmtrain.study.schedule_shown import drawn_updates, look_at

REPO = Path(__file__).parent.parent
CONFIG = REPO / "configs" / "demo_cosine.yaml"
DOCS = (REPO / "docs" / "schedules.md").read_text()
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FOUR = ["cosine", "linear", "step", "wsd", "--floor", "0.1", "--peak", "3e-4"]

Show = Callable[..., str]


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Show:
    """Run `llmtrain schedule show` in this process; its stdout."""

    def run(*words: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["schedule", "show", *words])
        out, err = capsys.readouterr()
        assert ended.value.code == code, err
        assert "Traceback" not in err
        return out if code == 0 else err

    return run


def planned(name: str, **keys: Any) -> Schedule:
    config = {"peak": 3e-4, "warmup": "20 steps", "horizon": "400 steps", "floor": 0.1, **keys}
    return plan(ScheduleConfig.model_validate({"name": name, **config}), tokens_per_update=1)


def test_json_has_the_rates_of_the_library(show: Show) -> None:
    """A script would plan with rates that the run does not use."""
    words = ["--peak", "3e-4", "--warmup", "20 steps", "--horizon", "400 steps", "--floor", "0.1", "--json"]
    found = json.loads(show("cosine", *words))
    schedule = planned("cosine")
    assert found["lr"] == [schedule.lr(k) for k in range(1, 401)]
    assert (found["spec"], found["hash"]) == (schedule.spec, schedule.hash)
    assert found["summary"]["first_lrs"] == found["lr"][:3] and found["summary"]["last_lrs"] == found["lr"][-3:]
    assert len(found["ema_coefficients"]) == 400 and found["summary"]["peak_update"] == 20


def test_config_is_shown_as_it_will_run(show: Show) -> None:
    """The preview of a config would differ from its run, and flags beside it would be ignored."""
    loaded = load_config(CONFIG)
    schedule = plan(loaded.schedule, loaded.batch.tokens, loaded.optim.betas[1])
    updates = range(1, loaded.total_updates + 1)
    assert json.loads(show("--config", str(CONFIG), "--json"))["lr"] == [schedule.lr(k) for k in updates]
    words = ["--config", str(CONFIG), "--json", "--peak", "0.001", "--set", "run.stop_at=50%"]
    words += ["--warmup", "20 steps", "--horizon", "200 steps"]
    both = json.loads(show("wsd", *words, "--set", "decay=10%"))["schedules"]
    assert [one["name"] for one in both] == ["demo_cosine", "wsd"]
    assert all(one["summary"]["updates"] == 100 and len(one["lr"]) == 200 for one in both)
    assert both[1]["lr"][179:181] == [0.001, 0.001 * planned("wsd", horizon="200 steps", decay="10%")(181)]


def test_module_of_a_config_is_shown(show: Show, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone who wrote a schedule of their own could not look at it before the run."""
    monkeypatch.setattr(registry, "_SHAPES", dict(registry._SHAPES))
    own = tmp_path / "own.py"
    own.write_text(re.findall(r"```python\n(# my_schedules.*?)```", DOCS, re.DOTALL)[0])
    config = tmp_path / "own.yaml"
    config.write_text(CONFIG.read_text().replace("name: cosine", f"name: late_drop, module: {own}, power: 2"))
    words = ["--config", str(config), "--peak", "3e-3", "--warmup", "20 steps", "--horizon", "200 steps", "--json"]
    found = json.loads(show("late_drop:power=1", "linear", *words))["schedules"]
    x = np.arange(181) / 180
    assert np.allclose(found[0]["lr"][19:], 3e-3 * (0.1 + 0.9 * (1 - x**2)), rtol=1e-12, atol=0)
    assert found[1]["lr"] == found[2]["lr"] != found[0]["lr"]


def test_several_share_their_numbers_and_keep_their_own_parameters(show: Show) -> None:
    """An overlay would compare schedules of different peaks, or give one a parameter meant for another."""
    words = ["--warmup", "20 steps", "--horizon", "400 steps", "--floor", "0.1", "--json"]
    found = json.loads(show("cosine", "wsd", "wsd:decay=10%", "--set", "cooldown=1-sqrt", *words))["schedules"]
    assert [one["name"] for one in found] == ["cosine", "wsd", "wsd decay=10%"]
    assert found[0]["lr"] == [planned("cosine").lr(k) for k in range(1, 401)]
    for one, decay in ((found[1], "20%"), (found[2], "10%")):
        assert one["lr"] == [planned("wsd", decay=decay, cooldown="1-sqrt").lr(k) for k in range(1, 401)]


def test_convention_counts_as_that_framework_does(show: Show) -> None:
    """Someone who migrates a run would be shown another curve than the one they had."""
    words = ["--peak", "1", "--warmup", "4 steps", "--horizon", "10 steps", "--floor", "0.1", "--json"]
    assert json.loads(show("cosine", "--convention", "hf", *words))["lr"][:2] == [0.0, 0.25]
    rows = re.findall(r"\| ([a-z, 0-9]+) \| ([\d. ]+) \| ([\d. ]+) \| (?:at update|never)", DOCS)
    assert len(rows) == 9
    for name, first, last in rows:
        convention = name.replace(", accumulation 4", ":accumulation=4")
        lrs = json.loads(show(f"cosine:convention={convention}", *words))["lr"]
        assert " ".join(f"{lr:.3f}" for lr in lrs[:3]) == first and " ".join(f"{lr:.3f}" for lr in lrs[-3:]) == last


def test_terminal_view_fits_80_columns(show: Show) -> None:
    """The view would wrap into noise on a login node, or leave out a number that was promised."""
    for words in (FOUR, ["one_cycle"], ["constant", "--horizon", "1 steps", "--weight-decay", "0"]):
        text = show(*words)
        assert max(map(len, text.splitlines())) <= 80
        for title in ("LR of update 1", "last LR", "peak at update", "area in the decay", "EMA", "suggested peak"):
            assert title in text
    assert "D wsd" in show(*FOUR) and "warning: step: the final value is reached" in show(*FOUR)


def test_csv_has_every_digit_of_every_update(show: Show, tmp_path: Path) -> None:
    """A spreadsheet or a replay would hold rounded rates, or tokens of another batch."""
    path = tmp_path / "out" / "lr.csv"
    words = ["--horizon", "100K tokens", "--tokens-per-update", "1K", "--warmup", "0", "--csv", str(path)]
    found = json.loads(show("cosine", "linear", *words, "--json"))["schedules"]
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert list(rows[0]) == ["schedule", "update", "tokens", "lr", "multiplier", "ema_coefficient"]
    for one in found:
        own = [row for row in rows if row["schedule"] == one["name"]]
        assert [float(row["lr"]) for row in own] == one["lr"]
        assert [int(row["tokens"]) for row in own] == [1024 * k for k in range(1, 99)]
    show("cosine", "--csv", str(path), "--floor", "0.1", "--warmup", "0")
    replayed = json.loads(show(f"piecewise:knots={path}", "--json", "--warmup", "0"))["lr"]
    assert np.allclose(
        replayed, [float(row["lr"]) for row in csv.DictReader(path.read_text().splitlines())], rtol=1e-12
    )


def test_png_is_a_picture_of_each_schedule(show: Show, tmp_path: Path) -> None:
    """A talk would get an empty figure, or one where a schedule is missing."""
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    from llmtrain.study.schedule_figure import PALETTE

    show(*FOUR, "--horizon", "100B tokens", "--png", str(tmp_path / "lr.png"))
    picture = imread(tmp_path / "lr.png")
    assert picture.shape[:2] == (1080, 1920)
    for colour in PALETTE[:4]:
        assert np.sum(np.all(np.abs(picture[..., :3] - to_rgb(colour)) < 0.01, axis=-1)) > 1000
    words = [shape.name for shape in catalog() if not any(p.required for p in shape.parameters.values())]
    show(*words, "--floor", "0.1", "--weight-decay", "0", "--png", str(tmp_path / "all.png"))
    assert (tmp_path / "all.png").stat().st_size > 50_000


def test_long_curves_keep_their_kinks() -> None:
    """A drop or a peak of a long run would be drawn where it is not."""
    shown = look_at(["multistep", "wsd:decay=10%", "sgdr"], [], ["horizon=1000000 steps", "warmup=2000 steps"])
    kept = drawn_updates(shown)
    assert len(kept) < 4000
    kinks = [1, 2, 3, 1999, 2000, 2001, 800_000, 800_001, 900_000, 900_001, 999_998, 999_999, 1_000_000]
    assert set(kinks) <= set(kept.tolist())
    for one in shown:
        every = np.arange(1, 1_000_001)
        drawn = np.interp(every, kept, one.lrs()[kept - 1])
        assert np.abs(drawn - one.lrs()).max() < 1e-4 * one.schedule.peak


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cosin"], 'did you mean "cosine"'),
        ([], "llmtrain schedule list"),
        (["wsd", "--set", "dcay=10%"], 'did you mean "decay"'),
        (["cosine", "--convention", "hff"], 'did you mean "hf"'),
        (["cosine", "--set", "optim.clip=1"], "--config"),
        (["cosine", "--horizon", "100"], "100 steps"),
        (["cosine", "--tokens-per-update", "x"], "--tokens-per-update"),
        (["one_cycle", "--warmup", "10 steps"], "its own warm-up"),
        (["cosine", "--png", "/dev/null/x.png"], "cannot write"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes_are_named(show: Show, words: list[str], message: str) -> None:
    """A typing error would end in a traceback, or in the picture of something else."""
    assert message in show(*words, code=2)


def test_page_without_plotly_says_what_to_install(show: Show, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without the extra would not learn what is missing."""
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert "pip install 'llmtrain[plots]'" in show("cosine", "--html", str(tmp_path / "x.html"), code=2)


def test_list_names_every_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    """A schedule nobody can find might as well not be there."""
    for words in ([], ["--json"]):
        with pytest.raises(SystemExit):
            main(["schedule", "list", *words])
    text, _, line = capsys.readouterr().out.rstrip().rpartition("\n")
    found = {entry["name"]: entry for entry in json.loads(line)["schedules"]}
    assert set(found) == {shape.name for shape in catalog()}
    assert all(name in text for name in found)
    assert found["wsd"]["parameters"]["decay"] == {"type": "length", "required": False, "default": "20%"}


def test_preview_of_a_config_loads_no_torch() -> None:
    """A look at a schedule on a login node would take as long as starting to train."""
    code = (
        "import sys; from llmtrain.cli import main\ntry: main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, "schedule", "show", "--config", str(REPO / "configs" / "7b_cosine.yaml")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    driver = shutil.which("chromedriver")
    if CHROMIUM is None or driver is None:
        pytest.skip("no chromium and chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for flag in [*flags.split(), "disable-component-update", "disable-sync", "window-size=1360,1000"]:
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


def test_page_shows_the_rate_under_the_pointer(browser: Any, show: Show, tmp_path: Path) -> None:
    """The page of a talk would be blank, wrong, in need of a network, or dead when a name or a switch is clicked."""
    pytest.importorskip("plotly", reason="plotly is not installed")
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    path = tmp_path / "lr.html"
    found = json.loads(show(*FOUR, "--horizon", "100B tokens", "--html", str(path), "--json"))["schedules"]
    assert path.stat().st_size < 6_000_000
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=.https?:", path.read_text())
    browser.get(path.as_uri())
    wait = WebDriverWait(browser, 20)
    plot = wait.until(lambda page: page.find_element(By.CSS_SELECTOR, "#plot .draglayer .xy .nsewdrag"))

    read = "return document.getElementById('plot')"
    for index, one in enumerate(found):
        updates = browser.execute_script(f"{read}.data[{index}].x")
        lrs = browser.execute_script(f"{read}.data[{index}].y")
        assert lrs == [one["lr"][k - 1] for k in updates] and {1, 2, 3, 239, len(one["lr"])} <= set(updates)

    ActionChains(browser).move_to_element_with_offset(plot, 60, 0).perform()
    texts = wait.until(lambda page: [text.text for text in page.find_elements(By.CSS_SELECTOR, ".hoverlayer text")])
    update = int(re.sub(r"\D", "", texts[0]))
    for one, text in zip(found, texts[1:], strict=True):
        assert text.split()[0] == one["name"]
        assert float(text.split()[1]) == pytest.approx(one["lr"][update - 1], rel=1e-5)

    for wanted in ("log", "tokens", "area"):
        browser.find_element(By.CSS_SELECTOR, f"[data-to={wanted}]").click()
    wait.until(lambda page: page.execute_script(f"{read}._fullLayout.yaxis.type") == "log")
    assert browser.execute_script(f"{read}.data[0].x.at(-1)") == len(found[0]["lr"]) * 4 * 2**20
    assert browser.execute_script(f"{read}.data[4].y.at(-1)") == pytest.approx(sum(found[0]["lr"]) / 3e-4, rel=1e-5)
    browser.find_element(By.CSS_SELECTOR, ".legend .traces .legendtoggle").click()
    wait.until(lambda page: page.execute_script(f"{read}.data[0].visible") == "legendonly")
    assert browser.get_log("browser") == []


def test_what_the_page_of_the_docs_says_works(show: Show, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader would copy a command or a program that fails, or miss a schedule in the table."""
    pytest.importorskip("plotly", reason="plotly is not installed")
    monkeypatch.setattr(registry, "_SHAPES", dict(registry._SHAPES))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(REPO / "configs")
    blocks = re.findall(r"```(\w+)\n(.*?)```", DOCS, re.DOTALL)
    names: dict[str, Any] = {"__name__": "docs"}
    for language, text in blocks:
        if text.startswith("# my_schedules.py"):
            Path("my_schedules.py").write_text(text)
        elif language == "python":
            exec(compile(text, "docs/schedules.md", "exec"), names)
        elif language == "yaml":
            own = ScheduleConfig.model_validate(parse_yaml(text, "docs/schedules.md")["schedule"])
            assert plan(own, 4 * 2**20).name == "late_drop"
        else:
            for line in text.splitlines():
                words = shlex.split(line)
                if words[2] == "show":
                    show(*words[3:])
    assert {shape.name for shape in catalog()} - {"late_drop"} == set(re.findall(r"^\| `(\w+)` \|", DOCS, re.MULTILINE))
