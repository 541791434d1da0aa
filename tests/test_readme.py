"""The README tells the truth: its commands exist and run, its files are there."""

import re
import shlex
from pathlib import Path

import pytest

from llmtrain.cli import app, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = [shlex.split(line, comments=True) for line in LINES]


def test_commands_name_what_exists() -> None:
    """A newcomer's first command would fail."""
    known = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    for words in COMMANDS:
        for word in words:
            if word.startswith(("configs/", "launch/")):
                assert (ROOT / word).is_file(), word
        if words[0] == "llmtrain":
            assert words[1] in known | {group.name for group in app.registered_groups}, words
        if words[0] == "make":
            assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[:2] == ["llmtrain", "schedule"]], ids=" ".join)
def test_previews_run(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command that was copied from the README would end in an error."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([str(ROOT / word) if word.startswith("configs/") else word for word in words[1:]])
    assert ended.value.code == 0
    assert capsys.readouterr().out


def test_the_tree_is_the_tree() -> None:
    """A newcomer would look for a room that is not there."""
    tree = README.split("## The tree")[1].split("```")[1]
    paths = [line.split()[0] for line in tree.splitlines() if line.strip()]
    assert len(paths) > 10
    for path in paths:
        assert list(ROOT.glob(path)), path


def test_links_lead_somewhere() -> None:
    """A reader would click into nothing."""
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
