"""What every command loads: the console, models and tasks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from textwrap import shorten

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from icrouting.decoder.backbone import Backbone
from icrouting.decoder.loading import load_model
from icrouting.icr import InContextRouter
from icrouting.runtime.progress import spinner
from icrouting.tasks.load import load_task
from icrouting.tasks.task import Example, Task

console = Console()


@contextmanager
def stoppable(kept: Callable[[], str]) -> Iterator[None]:
    """Inside, ctrl-C says what is kept; asked for then, since nobody knows it before."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(kept()) from None


def load(model: Backbone) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns a model and its tokenizer, without the loaders' bars."""
    disable_progress_bar()  # they would fill the terminal between ours
    return load_model(model.name, device_map=model.device_map)


def base_of_router(model: Backbone, icr: InContextRouter) -> Backbone:
    """Returns the model that was asked for, or else the one that a router was fitted on.

    Raises:
        ValueError: none was asked for, and the router does not say which it was.
    """
    return model if model.model else model.or_else(icr.base_model)


def load_tasks(names: Sequence[str], data: str, *, chat: bool = False) -> list[Task]:
    """Returns tasks by name, in their order and each once; says which rows were left out.

    With `chat` all of them are asked by the model's chat template.
    """
    with spinner("reading tasks"):
        tasks = [load_task(name, data) for name in dict.fromkeys(names)]
    if chat:
        tasks = [task.in_chat() for task in tasks]
    # Records know a task by its name alone.
    if len({task.name for task in tasks}) < len(tasks):
        raise ValueError(
            f"two of the tasks {', '.join(names)} have one name: set `name` in a task file"
        )
    dropped = [f"{task.name} {task.n_dropped}" for task in tasks if task.n_dropped]
    if dropped:
        heading = "training rows left out, as they repeat each other or held-back rows"
        console.print(f"{heading}: {', '.join(dropped)}", markup=False)
        console.print(_example_of_dropped(tasks), markup=False)
    return tasks


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
