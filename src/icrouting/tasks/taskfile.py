"""Task files: a task of one's own as one small TOML file next to its rows (docs/tasks.md)."""

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from icrouting.tasks.cut import SEED, SHARE, check_draw, cut_rows
from icrouting.tasks.rows import Labels, read_rows
from icrouting.tasks.splits import make_task
from icrouting.tasks.task import LabelScoring, NamedPrompt, Task, TaskSpec

_GROUPS = ("in-domain", "near", "far")
# Slots that show a row's own choices.
_CHOICE_SLOTS = {"choices", "letters"}


class _SpecKeys(BaseModel):
    """The keys that say how a task reads, in the order in which a refusal lists them."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str | None = None
    group: str = "far"
    template: str
    options: list[Any] = []
    label: str = "label"
    labels: Labels | None = None
    words: dict[str, Any] = {}
    label_scoring: LabelScoring = "first"
    chat: bool = False
    system: str = ""
    prompts: list[Any] = []


class _TaskFile(_SpecKeys):
    """All keys of a task file."""

    splits: dict[str, Any]


class _SpecFile(_SpecKeys):
    """The keys of a task file whose rows are elsewhere, or have no labels yet."""

    splits: dict[str, Any] | None = None


_Keys = TypeVar("_Keys", bound=_SpecKeys)
# How a refusal calls the kind of value that pydantic expected.
_KINDS = {"string_type": "str", "list_type": "list", "dict_type": "dict", "bool_type": "bool"}
# The keys of a prompt of the user's own, and their types; those without a default come first.
_PROMPT_KEYS = {"name": str, "template": str, "chat": bool, "system": str}


def read_task_file(path: Path) -> Task:
    """Returns the task that a TOML file describes, with the rows of the files that it names.

    It holds `template`, `options` (left out where each row brings its `choices`), `splits.train`
    and `splits.test` (JSONL, CSV, TSV or parquet, relative to the file) or else `splits.rows`, one
    file that is cut in two (`splits.split`, the share to test on, and `splits.seed`), and
    optionally `name` (default: the file's), `group` (default: "far"), `label` (the labels' column,
    default: "label"), `words` (replacements of field values), `labels` (whether labels that are
    numbers are an "index" or an option's "text"), `label_scoring` (see `TaskSpec`), `chat` (whether
    prompts are the user's turn of a chat), `system` (its system turn) and any number of
    `[[prompts]]`, prompts of the user's own, with `name`, `template` and, where they are not the
    task's, `chat` and `system`.

    Raises:
        ValueError: it is malformed (key and line are named), or a row does not fit.
    """
    file = _read(path, _TaskFile)
    spec = _spec_in(path, file)
    splits = file.splits
    if "rows" in splits:
        rows = read_rows(path.parent / splits["rows"], spec, file.labels, file.label)
        share = splits.get("split", SHARE)
        train, test = cut_rows(spec, rows, share, splits.get("seed", SEED))
    else:
        train = read_rows(path.parent / splits["train"], spec, file.labels, file.label)
        test = read_rows(path.parent / splits["test"], spec, file.labels, file.label)
    return make_task(spec, train, test)


def read_task_spec(path: Path) -> TaskSpec:
    """Returns how the task of a TOML file reads; its rows need not be there, nor `splits`.

    Raises:
        ValueError: it is malformed (key and line are named).
    """
    return _spec_in(path, _read(path, _SpecFile))


def _read(path: Path, kind: type[_Keys]) -> _Keys:
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = tomllib.loads(text)
    except OSError as error:
        raise ValueError(f"cannot read the task file {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not TOML: {error}") from error
    try:
        return _parsed(values, kind)
    except _Mistake as mistake:
        line = _line_of(mistake.key, text)
        raise ValueError(f"{path}:{line}: key {mistake.key!r} {mistake}") from mistake


def _spec_in(path: Path, file: _SpecKeys) -> TaskSpec:
    """Returns the spec of a task file, which may have its name."""
    name = path.stem if file.name is None else file.name
    return _spec_of(file, name, file.group)


def checked_spec(
    template: str,
    options: Sequence[str],
    *,
    name: str | None,
    group: str,
    words: Mapping[str, Mapping[str, str]],
    label: str,
    label_scoring: LabelScoring = "first",
    chat: bool = False,
    system: str = "",
    prompts: Mapping[str, str] | None = None,
) -> TaskSpec:
    """Returns the spec that these arguments make, checked like the keys of a task file.

    Raises:
        ValueError: an argument does not fit, or the template shows the label's column.
    """
    has_many = isinstance(options, Iterable)
    values = {
        "name": name,
        "group": group,
        "template": template,
        # A word alone would be listed letter by letter.
        "options": list(options) if has_many and not isinstance(options, str) else options,
        "label": label,
        "words": dict(words),
        "label_scoring": label_scoring,
        "chat": chat,
        "system": system,
        "prompts": [{"name": prompt, "template": text} for prompt, text in (prompts or {}).items()],
    }
    try:
        # A task file may do without a name, which it has itself.
        if name is None:
            raise _Mistake("name", "must be a str, got None")
        keys = _validated(_SpecKeys, values)
        _check_how_it_reads(keys)
        _check_label_is_hidden(keys)
    except _Mistake as mistake:
        raise ValueError(f"{mistake.key} {mistake}") from mistake
    return _spec_of(keys, name, group)


def _spec_of(keys: _SpecKeys, name: str, group: str) -> TaskSpec:
    return TaskSpec(
        name,
        group,
        keys.template,
        tuple(keys.options),
        keys.words,
        label_scoring=keys.label_scoring,
        chat=keys.chat,
        system=keys.system,
        prompts=tuple(NamedPrompt(**prompt) for prompt in keys.prompts),
    )


class _Mistake(Exception):
    """What is wrong with the value of a key."""

    def __init__(self, key: str, message: str):
        super().__init__(message)
        self.key = key


def _line_of(key: str, text: str) -> int:
    """Returns the number of the first line that begins with a key, or 1 where none does."""
    begins_with_key = re.compile(rf"\s*\[*{re.escape(key)}\b").match
    for number, line in enumerate(text.split("\n"), start=1):
        if begins_with_key(line):
            return number
    return 1


def _validated(kind: type[_Keys], values: dict[str, Any]) -> _Keys:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _mistake_among_keys(error, values) from error


def _parsed(values: dict[str, Any], kind: type[_Keys]) -> _Keys:
    file = _validated(kind, values)
    _check_how_it_reads(file)
    splits = getattr(file, "splits", None)
    if splits is not None:
        _check_splits(file, splits)
    return file


def _check_how_it_reads(keys: _SpecKeys) -> None:
    _check_options(keys)
    _check_template(keys)
    _check_group(keys)
    _check_words(keys)
    if keys.system and not keys.chat:
        raise _Mistake("system", "is a turn of a chat: write chat = true beside it")
    for prompt in keys.prompts:
        _check_prompt(prompt, keys)
    _check_names([prompt["name"] for prompt in keys.prompts])


def _mistake_among_keys(error: ValidationError, values: dict[str, Any]) -> _Mistake:
    """Returns the first of pydantic's errors in the words of a task file."""
    # In the order of the file; what is missing comes after what is there.
    order = [*values, *_TaskFile.model_fields]
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda each: order.index(str(each["loc"][0])))
    key = str(first["loc"][0])
    match first["type"]:
        case "extra_forbidden":
            known_keys = ", ".join(_TaskFile.model_fields)
            return _Mistake(key, f"is not known: a task file has {known_keys}")
        case "missing":
            return _Mistake(key, "is missing")
        case "literal_error":
            # pydantic puts the values in single quotes, a TOML file in double ones.
            expected = first.get("ctx", {})["expected"].replace("'", '"')
            return _Mistake(key, f"must be {expected}, got {first['input']!r}")
        case kind:
            return _Mistake(key, f"must be a {_KINDS[kind]}, got {first['input']!r}")


def _check_options(file: _SpecKeys) -> None:
    options = file.options
    # Each row brings its choices then.
    if not options:
        return
    n_different = len({str(option) for option in options})
    if n_different < 2 or not _are_texts(options):
        raise _Mistake("options", f"must list two different texts or more, got {options!r}")


def _check_splits(file: _SpecKeys, splits: dict[str, Any]) -> None:
    if "rows" in splits:
        _check_cut(splits)
        _check_label_is_hidden(file)
    elif set(splits) != {"train", "test"} or not _are_texts(splits.values()):
        raise _Mistake(
            "splits",
            'must be train = "file" and test = "file", or rows = "file" that is cut in two, '
            f"got {splits!r}",
        )


def _check_cut(splits: dict[str, Any]) -> None:
    unknown = set(splits) - {"rows", "split", "seed"}
    if unknown or not isinstance(splits["rows"], str):
        raise _Mistake(
            "splits",
            'beside rows = "file" may have split = 0.3 and seed = 0 and nothing else, '
            f"got {splits!r}",
        )
    try:
        check_draw(splits.get("split", SHARE), splits.get("seed", SEED))
    except ValueError as error:
        raise _Mistake("splits", f"does not fit: {error}") from error


def _check_template(file: _SpecKeys) -> None:
    template = file.template
    slots = set()
    are_bare = True
    try:
        for _, name, form, conversion in Formatter().parse(template):
            # The text after the last slot has none behind it.
            if name is not None:
                slots.add(name)
                are_bare = are_bare and not (form or conversion)
    except ValueError as error:
        raise _Mistake(
            "template", f"is malformed: {error}: a brace that is no slot's is written {{{{ or }}}}"
        ) from error
    # A slot is a field's name alone: no number, no attribute, no format and no conversion.
    are_names = all(name.isidentifier() for name in slots)
    ends_in_space = template != template.rstrip()
    if not slots or not are_names or not are_bare or ends_in_space:
        raise _Mistake(
            "template",
            "needs slots such as {text} and no space at its end, and a brace that is none twice "
            f"({{{{ and }}}}), got {template!r}",
        )
    if file.options and _CHOICE_SLOTS & slots:
        raise _Mistake("options", "must be left out where the template has {choices} or {letters}")


def _check_prompt(prompt: Any, keys: _SpecKeys) -> None:
    """Checks a prompt of the user's own; its slots are among those of the task's template."""
    is_known = isinstance(prompt, dict) and {"name", "template"} <= set(prompt) <= set(_PROMPT_KEYS)
    if not is_known or any(type(prompt[key]) is not _PROMPT_KEYS[key] for key in prompt):
        raise _Mistake(
            "prompts",
            'must have name = "a word" and template = "a text", and may have chat = true and '
            f'system = "a text", got {prompt!r}',
        )
    name = prompt["name"]
    if not re.fullmatch(r"[\w.-]+", name):
        raise _Mistake("prompts", f"needs names of letters, digits, '-', '.' or '_', got {name!r}")
    if prompt.get("system") and not prompt.get("chat", keys.chat):
        raise _Mistake("prompts", f"{name!r}: system is a turn of a chat: write chat = true")
    try:
        _check_template(keys.model_copy(update={"template": prompt["template"]}))
    except _Mistake as mistake:
        raise _Mistake("prompts", f"{name!r}: {mistake.key} {mistake}") from mistake
    # Rows are read by the task's own template.
    unknown = _slots(prompt["template"]) - _slots(keys.template) - _CHOICE_SLOTS
    if unknown:
        raise _Mistake(
            "prompts",
            f"{name!r} has slots that the task's template lacks: {', '.join(sorted(unknown))}; "
            f"it has {', '.join(sorted(_slots(keys.template)))}",
        )


def _check_names(names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise _Mistake("prompts", f"needs a name of its own for each, got {', '.join(names)}")


def _slots(template: str) -> set[str]:
    return {slot for _, slot, _, _ in Formatter().parse(template) if slot is not None}


def _check_label_is_hidden(keys: _SpecKeys) -> None:
    if keys.label in _slots(keys.template):
        raise _Mistake(
            "template",
            f"has a slot {{{keys.label}}}, which is the column of the labels: leave the answer out",
        )


def _check_group(file: _SpecKeys) -> None:
    if file.group not in _GROUPS:
        raise _Mistake("group", f'must be "in-domain", "near" or "far", got {file.group!r}')


def _check_words(file: _SpecKeys) -> None:
    for texts in file.words.values():
        if not isinstance(texts, dict) or not _are_texts(texts.values()):
            raise _Mistake(
                "words", f"must give a text for every value of a field, got {file.words!r}"
            )


def _are_texts(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) for value in values)
