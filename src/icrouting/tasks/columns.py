"""Columns: what is seen in a column as a whole, and in no row by itself."""

import difflib
import math
from collections import Counter
from collections.abc import Mapping, Sequence

# Options, or labels, that a message lists before it counts the others.
N_LISTED = 12

# A row as it was read, after its place: "train.csv:3" or "rows[3]".
Line = tuple[str, object]


def with_texts(lines: Sequence[Line], names: Sequence[str]) -> list[Line]:
    """Returns rows in which a column of numbers alone is one of texts, as a CSV of them has it.

    Product codes and years are read as numbers by pandas. A number among texts stays one, which is
    likelier a slip.

    Args:
        lines: the rows.
        names: the columns that are to hold texts.
    """
    rows = [row for _, row in lines if isinstance(row, Mapping)]
    of_numbers = []
    for name in names:
        if rows and all(_is_number(row.get(name)) for row in rows):
            of_numbers.append(name)
    if not of_numbers or len(rows) < len(lines):
        return list(lines)
    changed: list[Line] = []
    for (place, _), row in zip(lines, rows, strict=True):
        changed.append((place, {**row, **{name: str(row[name]) for name in of_numbers}}))
    return changed


def number_as_text(value: object) -> object:
    """Returns a finite number as a text, and all else as it is."""
    return str(value) if _is_number(value) else value


def _is_number(value: object) -> bool:
    """Whether a value is a finite number; in Python true and false are integers too."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)


def is_empty(label: object) -> bool:
    """Returns whether a cell holds no label: nothing, blanks, or pandas' sign of a missing one."""
    if isinstance(label, str):
        return not label.strip()
    return label is None or (isinstance(label, float) and math.isnan(label))


def listed(names: Sequence[str]) -> str:
    """Returns names in a row; of many the first, and how many there are."""
    if len(names) <= N_LISTED:
        return ", ".join(names)
    return f"{', '.join(names[:N_LISTED])}, ... ({len(names)} in all)"


def nearest(label: object, options: Sequence[str]) -> str | None:
    """Returns the option that a label was likely meant to be, None where none is near."""
    option_by_key = {option.strip().casefold(): option for option in options}
    near = difflib.get_close_matches(str(label).strip().casefold(), option_by_key, n=1)
    return option_by_key[near[0]] if near else None


def unknown_labels(labels: Sequence[object], options: Sequence[str], n_rows: int) -> str:
    """Returns which labels are no options, in how many rows, and what each was likely meant to be.

    Args:
        labels: those of the rows whose label is no option.
        options: the task's.
        n_rows: rows in all.
    """
    counts = Counter("" if is_empty(label) else repr(label) for label in labels)
    label_of = {"" if is_empty(label) else repr(label): label for label in labels}
    phrases = []
    for shown, count in counts.most_common(N_LISTED):
        option = nearest(label_of[shown], options) if shown else None
        meant = f", did you mean {option!r}?" if option is not None else ""
        phrases.append(f"{shown or 'no label'} ({count}{meant})")
    if len(counts) > N_LISTED:
        phrases.append(f"... ({len(counts)} in all)")
    return f"{len(labels)} of {n_rows} rows have such labels: {', '.join(phrases)}"
