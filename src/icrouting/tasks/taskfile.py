"""Task files: a task of one's own as one small TOML file next to its rows (docs/tasks.md)."""

import re
import tomllib
from pathlib import Path
from string import Formatter
from typing import Any, NoReturn

from icrouting.tasks.rows import read_rows
from icrouting.tasks.splits import make_task
from icrouting.tasks.task import Task, TaskSpec

_KINDS = {
    "name": str,
    "group": str,
    "template": str,
    "options": list,
    "words": dict,
    "splits": dict,
}


def read_task_file(path: Path) -> Task:
    """Returns the task that a TOML file describes, with the rows of the files that it names.

    It holds `template`, `options` (left out where each row brings its `choices`), `splits.train` and `splits.test`
    (JSONL or CSV, relative to the file), and optionally `name` (default: the file's), `group` (default: "far") and
    `words` (replacements of field values). ValueError if it is malformed (naming key and line) or a row does not fit.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = tomllib.loads(text)
    except OSError as error:
        raise ValueError(f"cannot read the task file {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not TOML: {error}") from error
    spec, splits = _spec(path, text, values), values["splits"]
    files = [path.parent / splits[split] for split in ("train", "test")]
    return make_task(spec, *(read_rows(file, spec) for file in files))


def _spec(path: Path, text: str, values: dict[str, Any]) -> TaskSpec:
    def refuse(key: str, said: str) -> NoReturn:
        is_there = re.compile(rf"\s*\[?{re.escape(key)}\b").match
        number = next(
            (number for number, line in enumerate(text.split("\n"), 1) if is_there(line)), 1
        )
        raise ValueError(f"{path}:{number}: key {key!r} {said}")

    for key, value in values.items():
        if key not in _KINDS:
            refuse(key, f"is not known: a task file has {', '.join(_KINDS)}")
        if not isinstance(value, _KINDS[key]):
            refuse(key, f"must be a {_KINDS[key].__name__}, got {value!r}")
    for key in ("template", "splits"):
        if key not in values:
            refuse(key, "is missing")
    options, splits = values.get("options", []), values["splits"]
    if options and (
        len({*map(str, options)}) < 2 or not all(isinstance(option, str) for option in options)
    ):
        refuse("options", f"must list two different texts or more, got {options!r}")
    if set(splits) != {"train", "test"} or not all(
        isinstance(file, str) for file in splits.values()
    ):
        refuse("splits", f'must be train = "file" and test = "file", got {splits!r}')
    try:
        parts = Formatter().parse(values["template"])
        slots = [
            (name, form or conversion) for _, name, form, conversion in parts if name is not None
        ]
    except ValueError as error:
        refuse("template", f"is malformed: {error}")
    is_plain = all(name.isidentifier() and not form for name, form in slots)
    if not slots or not is_plain or values["template"] != values["template"].rstrip():
        refuse(
            "template",
            f"needs slots such as {{text}} and no space at its end, got {values['template']!r}",
        )
    if options and {"choices", "letters"} & {slot[0] for slot in slots}:
        refuse("options", "must be left out where the template has {choices} or {letters}")
    name, group, words = (
        values.get("name", path.stem),
        values.get("group", "far"),
        values.get("words", {}),
    )
    if group not in ("in-domain", "near", "far"):
        refuse("group", f'must be "in-domain", "near" or "far", got {group!r}')
    if not all(
        isinstance(texts, dict) and all(isinstance(t, str) for t in texts.values())
        for texts in words.values()
    ):
        refuse("words", f"must give a text for every value of a field, got {words!r}")
    return TaskSpec(name, group, values["template"], tuple(options), words)
