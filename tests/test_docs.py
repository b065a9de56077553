"""Pages of docs/ that say what the code has."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from saber.cli.main import build_parser
from saber.prompts.loaders import _READERS, COLUMNS
from saber.prompts.splits import ALIASES, NAMES

ROOT = Path(__file__).parents[1]


def test_the_page_of_settings_is_current():
    spec = importlib.util.spec_from_file_location(
        "settings_page", ROOT / "scripts" / "settings_page.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.page() == script.PAGE.read_text("utf-8"), "run python scripts/settings_page.py"


def test_the_page_of_prompts_names_all_there_is():
    page = (ROOT / "docs" / "prompts.md").read_text("utf-8")
    for name in (*COLUMNS, *NAMES, *ALIASES, "category", "split", "reference", "id"):
        assert f"`{name}`" in page, name
    for ending in _READERS:
        assert f"`mine{ending}`" in page


def test_both_are_linked_from_the_readme():
    page = (ROOT / "README.md").read_text("utf-8")
    assert "(docs/settings.md)" in page
    assert "(docs/prompts.md)" in page


def commands(page):
    """Yield the `saber` commands in the shell blocks of a page, with lines that go on joined."""
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "saber" in words[:2]:
                yield words[words.index("saber") + 1 :]


PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *ROOT.glob("examples/*/README.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_on_a_page_are_ones_that_there_are(page):
    for words in commands(page):
        assert build_parser().parse_args(words).command == words[0]


def test_there_are_such_commands():
    assert sum(len(list(commands(page))) for page in PAGES) > 50
