"""The benchmark's other formats of a task ask the same of the same rows."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import formats

from icrouting.tasks.catalogue import SPECS
from icrouting.tasks.task import Example, Task

SOURCES = ("agnews", "sst2", "trec", "csqa", "piqa")


def task_of(name: str) -> Task:
    spec = SPECS[name]
    n_options = len(spec.options) or (2 if name == "piqa" else 5)
    choices = () if spec.options else tuple(f"choice {i}" for i in range(n_options))
    fields = {slot: f"the {slot}" for slot in spec.slots}
    rows = tuple(Example(fields, choices, i % n_options) for i in range(40))
    return Task(spec, rows, rows[:10], rows[:5])


def meant(task: Task, example: Example) -> str:
    """The right answer in words."""
    return example.choices[example.label] if example.choices else task.answer(example)


@pytest.mark.parametrize("name", SOURCES)
def test_every_format_asks_the_same_in_another_way(name):
    task = task_of(name)
    as_it_is, other, letters = forms = formats.formats_of(task)
    assert as_it_is is task
    assert len({form.name for form in forms}) == 3
    assert len({form.prompt(form.train[0]).rsplit("\n", 1)[-1] for form in forms}) == 3, "the prompts end differently"
    for form in forms:
        assert [len(rows) for rows in (form.train, form.test, form.validation)] == [40, 10, 5]
        assert all(text in form.prompt(row) for row in form.train for text in row.fields.values())
    shown = letters.train
    assert [meant(letters, row) for row in shown] == [meant(task, row) for row in task.train]
    assert len({row.choices for row in shown}) > 1, "the order is drawn for every row"
    if name in formats.OTHER_WORDS:
        assert [row.label for row in other.train] == [row.label for row in task.train]
        assert not set(other.spec.options) & set(task.spec.options)
    else:
        assert [meant(other, row) for row in other.train] == [meant(task, row) for row in task.train]
