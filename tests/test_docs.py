"""Pages of docs/ that say what the code has."""

import importlib.util
from pathlib import Path

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
