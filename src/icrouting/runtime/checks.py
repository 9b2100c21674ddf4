"""Checks: values held against the types and bounds that their class declares, and what is wrong in one line."""

import difflib
import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

T = TypeVar("T")


def check(values: object) -> None:
    """Checks a dataclass's fields; ValueError names the first that does not fit, what is expected and what came."""
    try:
        _model_of(type(values)).model_validate(vars(values))
    except ValidationError as error:
        raise ValueError(in_words(error)) from error


def read(kind: type[T], values: object) -> T:
    """Returns a dataclass from a JSON object; ValueError unless each of its fields is there and fits, and no other."""
    names = get_type_hints(kind).keys()
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, got {values!r:.60}: another version wrote it")
    if odd := sorted(values.keys() ^ names):
        raise ValueError(f"keys {odd} are unknown or missing: another version wrote it")
    try:
        model = _model_of(kind).model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise ValueError(in_words(error)) from error
    return kind(**{name: getattr(model, name) for name in names})


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
    """ValueError unless two lists of parts are the same; it names those that differ."""
    if kept != now:
        sides = [set(side.split(", ")) for side in (kept, now)]
        was, is_now = (
            ", ".join(sorted(one - other)) or "nothing" for one, other in (sides, sides[::-1])
        )
        raise ValueError(
            f"{what} was learned with {was}, now with {is_now}: put that back, or delete it and fit anew"
        )


def in_words(error: ValidationError) -> str:
    """Returns the first thing that pydantic found wrong: the field, what is expected and what came."""
    first = error.errors(include_url=False)[0]
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] not in ("value_error", "missing", "json_invalid"):  # those say it already
        said = f"{said}, got {first['input']!r}"
    return ": ".join([*([".".join(map(str, first["loc"]))] if first["loc"] else []), said])


def first_line(error: Exception) -> str:
    """Returns the first line of what an error says, or its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@cache
def _model_of(kind: type) -> type[BaseModel]:
    fields: dict[str, Any] = {
        name: (hint, ...) for name, hint in get_type_hints(kind, include_extras=True).items()
    }
    return create_model(
        kind.__name__, __config__=ConfigDict(strict=True, allow_inf_nan=False), **fields
    )


def known(kind: str, name: str, among: Mapping[str, T]) -> T:
    """Returns what a name stands for; ValueError with near matches, or all that is known, if it stands for nothing."""
    if name in among:
        return among[name]
    near = difflib.get_close_matches(name, among, n=3)
    said = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(sorted(among))}"
    raise ValueError(f"unknown {kind} {name!r}: {said}")
