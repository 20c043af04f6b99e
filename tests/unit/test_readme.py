"""The commands that README and docs/ show are commands that the scripts take; what they link to is there."""

import re
import shlex
import sys
from importlib import util
from pathlib import Path
from unittest.mock import MagicMock

import pytest


ROOT = Path(__file__).parents[2]
PAGES = {
    path: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}


def shown_commands() -> list[tuple[str, list[str]]]:
    """Return the script and the arguments of each command in fenced blocks that names a script of ours."""
    commands, text = [], "\n".join(PAGES.values())
    for block in re.findall(r"^```(?:bash|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if "scripts/" in line else []
            scripts = [word for word in words if re.fullmatch(r"scripts/\w+\.py", word)]
            if scripts:
                arguments = words[words.index(scripts[0]) + 1 :]
                # Behind the name `...` stands for the flags that every command of the script has; else for a value.
                commands.append((Path(scripts[0]).stem, arguments[arguments[:1] == ["..."] :]))
    return commands


COMMANDS = shown_commands()


def test_a_command_of_every_script_is_shown():
    assert {script for script, _ in COMMANDS} == {path.stem for path in (ROOT / "scripts").glob("*.py")}


@pytest.mark.parametrize(("script", "arguments"), COMMANDS, ids=[f"{s} {shlex.join(a)[-50:]}" for s, a in COMMANDS])
def test_the_script_takes_the_command(script, arguments, load, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    load(script).parse_args(arguments)


def test_what_a_sentence_says_to_run_is_part_of_a_command_that_is_shown_and_so_run():
    spans = re.findall(r"`(?:python )?(?:scripts/)?(\w+)\.py\s+(--[^`]+)`", "\n".join(PAGES.values()))
    assert len(spans) >= 2
    for script, text in spans:
        words = shlex.split(text)
        if words == ["--help"]:
            continue
        shown = [arguments for name, arguments in COMMANDS if name == script]
        starts = ((command, start) for command in shown for start in range(len(command)))
        assert any(command[start : start + len(words)] == words for command, start in starts), (script, words)


def test_every_module_of_the_library_stands_once_in_its_table_and_each_row_begins_with_its_entry():
    rows = re.findall(r"^\| `rasengan/`, [^|]+ \| (.*) \|$", PAGES[ROOT / "README.md"], re.MULTILINE)
    modules = sorted(path.stem for path in (ROOT / "rasengan").glob("[!_]*.py"))
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == modules
    for row in rows:
        assert re.findall(r"\*\*`\w+`\*\*", row) == re.findall(r"^\*\*`\w+`\*\*", row) != []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_what_is_there(page):
    for target in re.findall(r"\]\((?!https://)([^)]+)\)", PAGES[page]):
        path, _, heading = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not heading or heading in headings(PAGES[found]), target


def headings(text: str) -> set[str]:
    """Return the headings' anchors, as GitHub makes them."""
    lines = (line.lstrip("# ").lower() for line in text.splitlines() if line.startswith("#"))
    return {re.sub(r"[^\w -]", "", line).replace(" ", "-") for line in lines}


@pytest.fixture(scope="module")
def load():
    """Function that loads a script, each once."""
    scripts = {}

    def load_once(name: str):
        if name not in scripts:
            spec = util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
            scripts[name] = util.module_from_spec(spec)
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(sys.modules, "gradio", MagicMock())  # which app.py needs, but not to parse
                spec.loader.exec_module(scripts[name])
        return scripts[name]

    return load_once
