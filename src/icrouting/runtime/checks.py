"""Checks: values held against the types their class declares, and what is wrong in one line."""

import difflib
import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

T = TypeVar("T")

# A number in quotes is no number, and a loss that is not finite would spoil all that follows it.
_STRICT = ConfigDict(strict=True, allow_inf_nan=False)
# Errors whose message names what came, or where nothing came.
_SELF_EXPLAINING = ("value_error", "missing", "json_invalid")


def check(values: object) -> None:
    """Checks a dataclass's fields against their types and bounds.

    Raises:
        ValueError: names the first field that does not fit, what is expected and what came.
    """
    try:
        _model_of(type(values)).model_validate(vars(values))
    except ValidationError as error:
        raise ValueError(in_words(error)) from error


def read(kind: type[T], values: object) -> T:
    """Returns a dataclass from a JSON object.

    Args:
        kind: the dataclass.
        values: what was parsed from JSON, with a key for each field and no other.

    Raises:
        ValueError: no object, keys that are missing or unknown, or a value that does not fit.
    """
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, got {values!r:.60}: another version wrote it")
    # A field with a default must be there too: another version may have had another default.
    unmatched = values.keys() ^ get_type_hints(kind).keys()
    if unmatched:
        raise ValueError(
            f"keys {sorted(unmatched)} are unknown or missing: another version wrote it"
        )
    # Strict types in JSON's sense: a list may stand for a tuple, which JSON does not have.
    text = json.dumps(values)
    try:
        model = _model_of(kind).model_validate_json(text)
    except ValidationError as error:
        raise ValueError(in_words(error)) from error
    return kind(**dict(model))


@cache
def _model_of(kind: type) -> type[BaseModel]:
    """Returns pydantic's model of a dataclass's fields, each of which has to be there.

    The dataclass itself is not handed to pydantic: it would be built anew, and checks itself then.
    """
    fields: dict[str, Any] = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        fields[name] = (hint, ...)
    return create_model(kind.__name__, __config__=_STRICT, **fields)


def differences(
    kept: Mapping[str, object], asked: Mapping[str, object], shown: Callable[[object], str] = repr
) -> list[str]:
    """Returns a phrase for each key of `asked` whose kept value is another: "rank was 8, is 4".

    A key that was not kept counts as None; `shown` says how values read.
    """
    phrases = []
    for name, value in asked.items():
        kept_value = kept.get(name)
        if kept_value != value:
            phrases.append(f"{name} was {shown(kept_value)}, is {shown(value)}")
    return phrases


def check_same(what: str, kept: str, now: str) -> None:
    """Checks that two lists of parts, in one text each, are the same.

    Raises:
        ValueError: names the parts that one list has and the other has not.
    """
    if kept == now:
        return
    kept_parts = set(kept.split(", "))
    parts_now = set(now.split(", "))
    gone = ", ".join(sorted(kept_parts - parts_now)) or "nothing"
    new = ", ".join(sorted(parts_now - kept_parts)) or "nothing"
    raise ValueError(
        f"{what} was learned with {gone}, now with {new}: put that back, or delete it and fit anew"
    )


def in_words(error: ValidationError) -> str:
    """Returns the first thing that pydantic refuses: the field, what is expected and what came."""
    first = error.errors(include_url=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] not in _SELF_EXPLAINING:
        message = f"{message}, got {first['input']!r}"
    field = ".".join(str(part) for part in first["loc"])
    # Where a line as a whole is wrong, there is no field to name.
    return f"{field}: {message}" if first["loc"] else message


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or its name where the message is empty."""
    message = str(error).strip() or type(error).__name__
    return message.splitlines()[0]


def known(kind: str, name: str, among: Mapping[str, T]) -> T:
    """Returns what a name stands for.

    Raises:
        ValueError: the name stands for nothing; near matches are named, or else all known names.
    """
    if name in among:
        return among[name]
    near = difflib.get_close_matches(name, among, n=3)
    advice = f"known are {', '.join(sorted(among))}"
    if near:
        advice = f"did you mean {' or '.join(near)}?"
    raise ValueError(f"unknown {kind} {name!r}: {advice}")
