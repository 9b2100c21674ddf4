"""The paper's tasks from the hub: pinned dataset ids, mapped to the rows that a folder would hold.

Read as Parquet or JSON, so that no loading script of a dataset runs.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from icrouting.tasks.catalogue import APART_FROM, HUB, MAX_TEST, MAX_TRAIN, SPECS
from icrouting.tasks.rows import parse_row
from icrouting.tasks.splits import make_task
from icrouting.tasks.task import Example, Task, TaskSpec

_PARQUET = "refs/convert/parquet"
_SEED = 0


def read_task(spec: TaskSpec, mirror: Path | None = None) -> Task:
    """Returns a task with rows from the hub.

    At most 6,000 of them are to train on (agnews 12,000) and 2,000 to test on.

    Args:
        spec: a task of the catalogue.
        mirror: a folder that holds the datasets under their ids, to read from instead of the hub.

    Raises:
        ValueError: the task has no dataset, or it cannot be read or has other columns.
    """
    if spec.name not in HUB:
        raise ValueError(
            f"task {spec.name!r} has no dataset id ({', '.join(HUB)} have): "
            f"give a folder that holds {spec.name}/train.jsonl and {spec.name}/test.jsonl"
        )
    rng = np.random.default_rng(_SEED)
    train = _sample(_read(spec, "train", mirror), MAX_TRAIN[spec.name], rng)
    test = _sample(_read(spec, "test", mirror), MAX_TEST, rng)
    # All test rows of the others, not only those that a sample of them would hold.
    others: list[Example] = []
    for other in APART_FROM[spec.name]:
        others += _read(SPECS[other], "test", mirror)
    return make_task(spec, train, test, others)


def _sample(rows: list[Example], n: int, rng: np.random.Generator) -> list[Example]:
    return [rows[i] for i in rng.permutation(len(rows))[:n]]


def _read(spec: TaskSpec, split: str, mirror: Path | None) -> list[Example]:
    """Returns all rows of one split of a task's dataset."""
    source = HUB[spec.name]
    table = _table(spec, source[split], mirror)
    try:
        return [parse_row(_mapped(row, source), spec) for row in table]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"task {spec.name!r}: the dataset {source['repo']!r} has other columns: {error}"
        ) from error


def _table(spec: TaskSpec, files: str, mirror: Path | None) -> Iterable[Any]:
    """Returns the rows of files of a dataset as they are, but flat: "a.b" is b inside a."""
    # Slow to import, and needed here alone.
    import datasets

    source = HUB[spec.name]
    repo = source["repo"]
    if mirror:
        place = str(mirror / repo / files)
    else:
        # A slash would end the revision in this kind of address.
        revision = source.get("revision", _PARQUET).replace("/", "%2F")
        place = f"hf://datasets/{repo}@{revision}/{files}"
    # The files' endings are what the loaders are called.
    loader = files.rsplit(".", 1)[1]
    try:
        return datasets.load_dataset(loader, data_files=place, split="train").flatten()
    # The hub's errors have no common type.
    except Exception as error:
        raise ValueError(
            f"task {spec.name!r}: cannot read {files} of the dataset {repo!r}: {error}"
        ) from error


def _mapped(row: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row under our names (catalogue.toml says how)."""
    mapped = dict(row)
    for name, column in source.get("columns", {}).items():
        if isinstance(column, list):
            mapped[name] = [row[part] for part in column]
        else:
            mapped[name] = row[column]
    label_names = source.get("label_names")
    if label_names:
        # The names stand here, or in a column of the row.
        names = row[label_names] if isinstance(label_names, str) else label_names
        mapped["label"] = names.index(mapped["label"])
    return mapped
