"""Labels: the options of a table's rows, where nobody lists them."""

from collections.abc import Sequence
from pathlib import Path

from icrouting.tasks.rows import Line, file_lines
from icrouting.tasks.task import TaskSpec

# A column of more different values than this is taken for texts, or for numbers.
MOST = 100


def options_of(path: Path, template: str, label: str) -> list[str]:
    """Returns the different labels in a file's column, sorted.

    Args:
        path: a JSONL, CSV, TSV or parquet file.
        template: the prompt, whose columns have to be there too.
        label: the column.

    Raises:
        ValueError: the file cannot be read, a row has no label, or there are too few or too many.
    """
    # Two options stand in for those that are yet to be read.
    spec = TaskSpec(path.stem, "near", template, ("", " "))
    return _options(file_lines(path, spec, label), label, str(path))


def _options(lines: Sequence[Line], label: str, name: str) -> list[str]:
    labels = set()
    for place, row in lines:
        if not isinstance(row, dict) or label not in row:
            columns = list(row) if isinstance(row, dict) else row
            raise ValueError(
                f"{place}: no column {label!r} for the labels: name it with --label; this row has "
                f"{columns}"
            )
        text = str(row[label]).strip() if row[label] is not None else ""
        if not text:
            raise ValueError(f"{place}: the label in column {label!r} is empty: fill it in")
        # As it stands there: a label is held against an option character by character.
        labels.add(str(row[label]))
    if len(labels) < 2:
        raise ValueError(
            f"{name}: expected labels of two kinds or more in column {label!r}, got "
            f"{sorted(labels)}"
        )
    if len(labels) > MOST:
        raise ValueError(
            f"{name}: column {label!r} has {len(labels)} different values, which are no labels: "
            "name the labels' column with --label, or list the labels with --options"
        )
    return sorted(labels)
