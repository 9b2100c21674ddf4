"""Files: texts and JSON that are always whole, old or new, and say when they are damaged."""

import json
from pathlib import Path
from typing import Any


def save_text(file: Path, text: str) -> None:
    """Writes a text."""
    # A rename happens at once, so that a kill leaves the old file or the new one.
    scratch = file.with_name(file.name + ".part")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(file)


def save_json(file: Path, content: object) -> None:
    """Writes JSON."""
    save_text(file, json.dumps(content, indent=1))


def load_json(file: Path) -> dict[str, Any]:
    """Returns a JSON object.

    Raises:
        ValueError: names the file, if it holds anything else.
    """
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_unique)
    # A RecursionError comes of brackets nested deeper than the parser goes.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: it is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: expected a JSON object, got {type(content).__name__}")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object of JSON, which the parser itself lets say the same thing twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key stands twice")
    return content
