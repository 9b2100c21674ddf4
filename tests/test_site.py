"""The site is built strictly, and nothing of it is read from another host."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

mkdocs = pytest.importorskip("mkdocs", reason="the extra docs is not installed")
ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.processes
def test_the_site_has_a_page_of_every_page_and_of_the_commands(site):
    pages = {page.stem for page in site.glob("*.html")}
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} | {"index", "commands"} <= pages
    assert "icr compare" in (site / "commands.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.processes
def test_the_site_reads_nothing_from_another_host(site):
    for page in site.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|link|img|iframe)[^>]*?(?:src|href)="(https?:[^"]+)', text)
        assert not loaded, page.name


def test_a_page_that_no_menu_names_is_told():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= set(
        re.findall(r": ([\w-]+\.md)$", menu, re.MULTILINE)
    )


def test_the_repositorys_files_are_named_where_the_site_lacks_them():
    import site_hooks

    class Page:
        class file:
            src_uri = "page.md"

    text = "[rows](../benchmarks/x.json), [`docs/who_wins.py`](who_wins.py), [here](method.md#a)"
    assert site_hooks.on_page_markdown(text, Page) == (
        "rows (`benchmarks/x.json`), `docs/who_wins.py`, [here](method.md#a)"
    )


def test_the_readmes_links_are_those_of_the_sites_first_page():
    import site_hooks

    text = '[a](docs/method.md) [b](benchmarks/LOG.md) <img src="docs/gains.svg">'
    assert site_hooks.from_docs(text) == (
        '[a](method.md) [b](../benchmarks/LOG.md) <img src="gains.svg">'
    )
