"""The site builds strictly: every page, link, command and public name is there."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
mkdocs = pytest.importorskip("mkdocs", reason="mkdocs is not installed: make docs installs it")


@pytest.fixture(scope="module")
def hooks():
    sys.path.append(str(ROOT / "docs"))
    import hooks

    return hooks


@pytest.mark.slow
def test_every_command_has_its_help(hooks):
    page = hooks.commands()
    for name in ("fit", "eval", "sweep", "compare", "predict", "serve", "analyse", "demo"):
        assert f"## icr {name}" in page
        assert f"usage: icr {name}" in page


def test_the_first_page_leads_to_pages_alone(hooks):
    for place in re.findall(r"\]\(([^)]*)\)", hooks.first_page()):
        assert place.startswith("http") or (ROOT / "docs" / place).is_file(), place


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    missing = [page.name for page in (ROOT / "docs").glob("*.md") if page.name not in navigation]
    assert missing == []
