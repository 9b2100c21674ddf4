"""What `mkdocs` is told beside its pages: the README as first page, and two pages of reference."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Rooms of the public names, one heading each.
PUBLIC = (
    *("icr.InContextRouter", "config.FitConfig", "config.PAPER"),
    *(
        "decoder.loading.load_model",
        "decoder.scoring.score_options",
        "comparing.comparison.compare",
    ),
    *("tasks.load.load_task", "tasks.task.Task", "tasks.task.TaskSpec", "tasks.task.Example"),
    *("several.attach", "several.Several", "routing.routed.Routed"),
)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made."""
    pages = {
        "index.md": first_page(),
        "reference/commands.md": commands(),
        "reference/python.md": python(),
    }
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Returns a page whose links into the repository are names: the site has no such pages."""
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)+[^)]*\)", r"\1", markdown)


def first_page() -> str:
    """Returns the README, as a page among the others."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = text.replace("](docs/", "](").replace('"docs/', '"')

    def kept(link: re.Match[str]) -> str:
        # What is not a page of the site is a name.
        is_page = (
            link[2].startswith("http") or (ROOT / "docs" / link[2].partition("#")[0]).is_file()
        )
        return link[0] if is_page else link[1]

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)]*)\)", kept, text)


def commands() -> str:
    """Returns every command's help, as its parser prints it."""
    from icrouting.cli import main

    parts = ["# Commands", "", "What `--help` prints.", ""]
    (listed,) = re.findall(r"\{([a-z,]+)\}", _help_of(main, []).partition("\n\n")[0])
    for name in listed.split(","):
        parts += [f"## icr {name}", "", "```text", _help_of(main, [name]).rstrip(), "```", ""]
    return "\n".join(parts)


def _help_of(main: Any, arguments: list[str]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main.main([*arguments, "--help"])
    return re.sub(r"\x1b\[[0-9;]*m", "", printed.getvalue())


def python() -> str:
    """Returns the page of public names, which mkdocstrings fills from their docstrings."""
    parts = [
        "# Python",
        "",
        "Public names; `icrouting.X` is where to import the first ten from.",
        "",
    ]
    for name in PUBLIC:
        parts += [f"::: icrouting.{name}", ""]
    return "\n".join(parts)
