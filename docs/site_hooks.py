"""What the site has beside the pages of docs/: its first page and the commands' help.

mkdocs calls these functions; see mkdocs.yml.
"""

import contextlib
import io
import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\(((?!https?:|#)[^)#\s]+)(#[^)]*)?\)")
# The width of the help, whatever terminal the site is built in.
WIDTH = "100"


def on_files(files, config):
    """Adds the README as the first page, and a page of the commands."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=from_docs(readme)))
    files.append(File.generated(config, "commands.md", content=commands()))
    return files


def on_page_markdown(markdown, page, **_):
    """Names the repository's files that a page links, which are not on the site."""

    def on_site(match):
        mark, text, target, _ = match.groups()
        place = os.path.normpath(Path(page.file.src_uri).parent / target)
        if mark or not (place.startswith("..") or place.endswith(".py")):
            return match.group()
        path = os.path.relpath(ROOT / "docs" / place, ROOT)
        return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"

    return LINK.sub(on_site, markdown)


def from_docs(text: str) -> str:
    """Returns a text of the repository's root with links as from docs/."""

    def moved(match):
        mark, label, target, anchor = match.groups()
        place = os.path.relpath(ROOT / target, ROOT / "docs")
        return f"{mark}[{label}]({place}{anchor or ''})"

    text = text.replace('="docs/', '="')
    return LINK.sub(moved, text)


def help_of(arguments: list[str]) -> str:
    """Returns what `icr ARGUMENTS --help` prints."""
    from icrouting.cli.main import main

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*arguments, "--help"])
    # without the colours of a terminal
    return re.sub(r"\x1b\[[\d;]*m", "", text.getvalue()).strip()


def commands() -> str:
    """Returns a page of all commands: what each prints under `--help`."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = WIDTH
    try:
        overview = help_of([])
        (listed,) = re.findall(r"\{([\w,-]+)\}", overview.splitlines()[0])
        names = listed.split(",")
        parts = ["# Commands", "What each command prints under `--help`."]
        for name in names:
            parts.append(f"## icr {name}\n\n```text\n{help_of([name])}\n```")
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    return "\n\n".join(parts) + "\n"
