"""What every command reads before it loads a model; light, so that a mistake is said at once."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten

from rich.console import Console

from icrouting.evaluation.config import EvalConfig
from icrouting.methods.settings import Entrant
from icrouting.runtime.files import load_json
from icrouting.runtime.launch import first_one_first, is_first
from icrouting.runtime.progress import spinner
from icrouting.tasks.labels import options_of
from icrouting.tasks.load import load_task
from icrouting.tasks.task import Example, LabelScoring, Task

console = Console()


@contextmanager
def stoppable(kept: Callable[[], str]) -> Iterator[None]:
    """Inside, ctrl-C says what is kept; asked for then, since nobody knows it before."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(kept()) from None


def read_first(names: Sequence[str], data: str, *, chat: bool = False) -> list[Task]:
    """Returns what `load_tasks` does; of several processes the first reads before the others."""
    console.quiet = not is_first()
    with first_one_first():  # which may have to download
        return load_tasks(names, data, chat=chat)


def check_out(folder: Path) -> None:
    """Checks that a command can write to a folder, before it computes anything for it.

    Raises:
        ValueError: it is a file, or lies where nothing can be written.
    """
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"cannot write to {folder}: {place} is a file, and no folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(
            f"cannot write to {folder}: you may not write in {place}: choose another folder"
        )


def check_asked(prompt: str | None, task: str | None, fields: Sequence[str]) -> str | None:
    r"""Returns a typed prompt, in which \n stood for a new line, or None where fields are given.

    Raises:
        ValueError: both are given, or neither.
    """
    if (prompt is None) == (not fields) or (prompt is not None and task is not None):
        raise ValueError(
            "expected --prompt, or --fields (with --task where the router has several): "
            "give one of the two"
        )
    return None if prompt is None else prompt.replace("\\n", "\n")


def check_extra(extra: str, *modules: str) -> None:
    """Checks that what an extra of this package installs is there.

    Raises:
        ValueError: a module is missing.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ValueError(
            f"this command needs {', '.join(missing)}: pip install 'icrouting[{extra}]'"
        )


def check_router(name: str) -> None:
    """Checks that a folder holds a router, as far as its config.json says so at once.

    Of what may be a hub id nothing is asked here.

    Raises:
        ValueError: the folder is missing, or holds no router.
    """
    folder = Path(name)
    if folder.is_dir():
        file = folder / "config.json"
        if not file.is_file():
            raise ValueError(f"{folder} is no router: {file.name} is missing")
        if load_json(file).get("method") != "icr":
            raise ValueError(
                f'{file}: this does not describe an icrouting artifact: expected "method": "icr"'
            )
        return
    may_be_id = name.count("/") <= 1 and not name.startswith((".", "/", "~"))
    if folder.exists() or not may_be_id:
        raise ValueError(f"no router at {name!r}: expected a folder or a hub id")


def with_routers(config: EvalConfig, routers: Sequence[str]) -> EvalConfig:
    """Returns what to evaluate, with the routers that `--router` names: FOLDER, or NAME=FOLDER.

    Raises:
        ValueError: two have no name or one name, or a folder is missing or holds no router.
    """
    unnamed = [router for router in (config.settings.router,) if router is not None]
    entrants = list(config.entrants)
    for text in routers:
        name, folder = _named_folder(text)
        check_router(folder)
        if name is None:
            unnamed.append(folder)
        else:
            entrants.append(Entrant(name, folder))
    if len(unnamed) > 1:
        raise ValueError(
            f"several routers without a name ({', '.join(unnamed)}): give each a name of its own, "
            "as in --router one=FOLDER other=FOLDER"
        )
    names = [entrant.name for entrant in entrants]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two routers are called {name!r}: give each a name of its own")
    settings = replace(config.settings, router=unnamed[0] if unnamed else None)
    return replace(config, settings=settings, entrants=tuple(entrants))


def _named_folder(text: str) -> tuple[str | None, str]:
    """Returns the name and the folder of NAME=FOLDER; None for a bare folder or hub id.

    Both may hold the sign: where a part behind one is a folder, the first such sign divides them.
    """
    if Path(text).exists() or "=" not in text:
        return None, text
    places = [place for place, letter in enumerate(text) if letter == "="]
    for place in places:
        if Path(text[place + 1 :]).is_dir():
            return text[:place], text[place + 1 :]
    return text[: places[0]], text[places[0] + 1 :]


def check_analysed(name: str) -> None:
    """Checks that what is to be analysed is a router, as far as it can be seen at once.

    Raises:
        ValueError: it is a run, which measured a router or none, or what `check_router` says.
    """
    folder = Path(name)
    file = folder / "config.json"
    if (folder / "records.jsonl").is_file() and file.is_file():
        digest = load_json(file).get("router")
        if digest is None:
            raise ValueError(
                f"{folder} is a run without routing: it measured no router that could be analysed; "
                "name the folder of a router"
            )
        raise ValueError(
            f"{folder} is a run and keeps no router: name the folder of the one that it measured "
            f"({digest}), which its --router was"
        )
    check_router(name)


def check_start(router: str | None, keep: int) -> None:
    """Checks what `--from` and `--keep` name, as far as it can be seen at once.

    Raises:
        ValueError: rows of known tasks are to be kept and no router says which, or none is there.
    """
    if router is not None:
        check_router(router)
    elif keep:
        raise ValueError(f"--keep {keep} is of the tasks of a router: name it with --from")


def read_own_task(
    data: Path | None,
    template: str | None,
    options: Sequence[str],
    *,
    label: str,
    test: Path | None,
    split: float,
    seed: int,
    file: str | None,
    label_scoring: LabelScoring,
    chat: bool,
) -> Task:
    """Returns the task that arguments describe: a table's, or a task file's.

    Raises:
        ValueError: neither or both are given, or the rows do not fit.
    """
    if file is not None:
        if data is not None or template is not None or options or test is not None:
            raise ValueError(
                "--task names a task file, which says all of it: leave out --data, --template, "
                "--options and --test"
            )
        if label_scoring != "first":
            raise ValueError("--task names a task file: write label_scoring into it")
        (task,) = load_tasks([file], "", chat=chat)
        return task
    if data is None or template is None:
        raise ValueError(
            "give a table with --data and --template, or a task file with --task, as in: "
            "icr compare --data tickets.csv --template 'Ticket: {text}\\nTeam:' --label team"
        )
    template = template.replace("\\n", "\n")
    # Where rows bring their choices, the options are letters.
    is_listed = bool(options) or "{choices}" in template
    if not is_listed:
        options = options_of(data, template, label)
    task = Task.from_rows(
        data,
        template,
        options,
        label=label,
        name=data.stem,
        test=test,
        split=split,
        seed=seed,
        # What is read off the column is the labels' text.
        labels=None if is_listed else "text",
        label_scoring=label_scoring,
        chat=chat,
    )
    _say_dropped([task])
    return task


def load_tasks(names: Sequence[str], data: str, *, chat: bool = False) -> list[Task]:
    """Returns tasks by name, in their order and each once; says which rows were left out.

    With `chat` all of them are asked by the model's chat template.
    """
    with spinner("reading tasks"):
        tasks = [load_task(name, data) for name in dict.fromkeys(names)]
    if chat:
        tasks = [task.in_chat() for task in tasks]
    check_names(tasks, names)
    _say_dropped(tasks)
    return tasks


def _say_dropped(tasks: Sequence[Task]) -> None:
    """Prints how many rows were left out, and what counts as a repeat."""
    dropped = [f"{task.name} {task.n_dropped}" for task in tasks if task.n_dropped]
    if dropped:
        heading = "training rows left out, as they repeat each other or held-back rows"
        console.print(f"{heading}: {', '.join(dropped)}", markup=False)
        console.print(_example_of_dropped(tasks), markup=False)


def check_names(tasks: Sequence[Task], asked: Sequence[str]) -> None:
    """ValueError where two tasks have one name: records know a task by its name alone."""
    if len({task.name for task in tasks}) < len(tasks):
        raise ValueError(
            f"two of the tasks {', '.join(asked)} have one name: set `name` in a task file"
        )


def _example_of_dropped(tasks: Sequence[Task]) -> str:
    """Says what counts as a repeat, with the first one."""
    for task in tasks:
        if task.dropped_example is not None:
            row, other = (_start(each) for each in task.dropped_example)
            return (
                f"such as {row} for {other} of {task.name}: case, spacing and punctuation make no "
                "difference, but between rows of different labels only spacing makes none"
            )
    return ""


def _start(row: Example) -> str:
    """The beginning of a row's texts, in quotes."""
    return repr(shorten(" / ".join(row.fields.values()), 70, placeholder=" ..."))
