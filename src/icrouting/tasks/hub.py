"""The paper's tasks from the hub: pinned dataset ids, mapped to the rows that a folder would hold.

Read as Parquet or JSON, so that no loading script of a dataset runs.
"""

from collections.abc import Mapping
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
    """Returns a task with rows from the hub: at most 6,000 to train on (agnews 12,000) and 2,000 to test on.

    They are read from `mirror` instead, a folder that holds the datasets under their ids, if it is given.
    """
    if spec.name not in HUB:
        raise ValueError(
            f"task {spec.name!r} has no dataset id ({', '.join(HUB)} have): give a folder that holds "
            f"{spec.name}/train.jsonl and {spec.name}/test.jsonl"
        )
    rng = np.random.default_rng(_SEED)
    train = _sample(_read(spec, "train", mirror), MAX_TRAIN[spec.name], rng)
    test = _sample(_read(spec, "test", mirror), MAX_TEST, rng)
    held = [row for other in APART_FROM[spec.name] for row in _read(SPECS[other], "test", mirror)]
    return make_task(spec, train, test, held)


def _sample(rows: list[Example], n: int, rng: np.random.Generator) -> list[Example]:
    return [rows[i] for i in rng.permutation(len(rows))[:n]]


def _read(spec: TaskSpec, split: str, mirror: Path | None) -> list[Example]:
    import datasets

    source = HUB[spec.name]
    repo, files = source["repo"], source[split]
    revision = source.get("revision", _PARQUET).replace("/", "%2F")
    place = mirror / repo / files if mirror else f"hf://datasets/{repo}@{revision}/{files}"
    kind = files.rsplit(".", 1)[1]  # "parquet" or "json", as the loader is called
    try:
        found = datasets.load_dataset(kind, data_files=str(place), split="train").flatten()
    except Exception as error:  # the hub's errors have no common type
        raise ValueError(
            f"task {spec.name!r}: cannot read {files} of the dataset {repo!r}: {error}"
        ) from error
    try:
        return [parse_row(_mapped(row, source), spec) for row in found]  # pyright: ignore[reportArgumentType]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"task {spec.name!r}: the dataset {repo!r} has other columns: {error}"
        ) from error


def _mapped(row: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row under our names (catalogue.toml says how)."""
    mapped = dict(row)
    for name, column in source.get("columns", {}).items():
        mapped[name] = [row[part] for part in column] if isinstance(column, list) else row[column]
    if names := source.get("label_names"):
        mapped["label"] = (row[names] if isinstance(names, str) else names).index(mapped["label"])
    return mapped
