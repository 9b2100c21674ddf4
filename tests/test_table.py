import dataclasses
import math

import pytest
from rich.console import Console

from fake_run import ICR_LOSES_ON_MR, TASKS, fake_run, many_methods
from icrouting.report.summary import summarise
from icrouting.report.table import NONE, WIDE, collapse, grid, grids, marks, ranked, terminal_table


def test_the_terminal_table_holds_brackets_of_notes_as_they_are():
    summary = summarise(ICR_LOSES_ON_MR, fake_run(notes=["cut [bold]short[/bold]"]))
    console = Console(width=160)
    with console.capture() as capture:
        console.print(terminal_table(summary, console.width))
    assert "cut [bold]short[/bold]" in capture.get()
    assert all(task["name"] in capture.get() for task in TASKS)


@pytest.mark.parametrize("width", [60, 80, 120, 300])
@pytest.mark.parametrize("n_methods", [5, WIDE + 2])
@pytest.mark.slow
def test_no_word_of_the_printed_table_breaks_and_no_figure_is_lost(width, n_methods):
    summary = summarise(*many_methods(n_methods))
    console = Console(width=width)
    with console.capture() as capture:
        console.print(terminal_table(summary, console.width))
    printed = capture.get()
    assert max(map(len, printed.splitlines())) <= width
    for part in grids(summary):
        for line in part:
            assert all(text in printed for text in line)


def test_tasks_stand_by_section_with_a_mean_after_each():
    titles = [row.title for row in summarise(ICR_LOSES_ON_MR, fake_run()).rows]
    assert titles == [
        "agnews",
        "mean source",
        "mr",
        "mean near",
        "cb",
        "mean far",
        "mean unseen",
        "mean all",
    ]


def test_marks_and_collapse_name_the_loss():
    summary = summarise(ICR_LOSES_ON_MR, fake_run())
    assert marks(summary.line("task", "mr", "icr")) == "▼≈"
    assert marks(summary.line("task", "agnews", "icr")) == "▲"
    methods = {method.name: method for method in summary.methods}
    icr = methods["icr"]
    assert (icr.n_compared, icr.n_collapsed, icr.n_collapsed_significantly) == (3, 1, 1)
    assert collapse(icr) == "1 (1 sig.)"
    assert collapse(methods["zero-shot"]) == NONE
    assert "≈" not in marks(summary.line("task", "mr", "few-shot"))


def test_few_methods_are_columns():
    summary = summarise(ICR_LOSES_ON_MR, fake_run())
    assert grids(summary) == [grid(summary, summary.methods)]


@pytest.mark.slow
def test_many_methods_are_lines_best_first_and_no_figure_is_lost():
    summary = summarise(*many_methods(WIDE + 1))
    means, tasks = grids(summary)
    names = [line[0] for line in means]
    assert names == ["method", *(method.name for method in ranked(summary)), "chance", "majority"]
    assert [line[0] for line in tasks] == names
    assert tasks[0][1:] == [task["name"] for task in TASKS]
    shown = {cell for part in (means, tasks) for line in part for cell in line}
    whole = {cell for line in grid(summary, summary.methods) for cell in line}
    assert whole - shown == {"task"}
    averages = [float(line[means[0].index("mean all")].split()[0]) for line in means[1:-2]]
    assert averages == sorted(averages, reverse=True)


@pytest.mark.slow
def test_a_method_that_lacks_tasks_is_ranked_last():
    records, config = many_methods(WIDE + 1)
    best = ranked(summarise(records, config))[0].name
    lacking = [record for record in records if (record.method, record.task) != (best, "cb")]
    assert ranked(summarise(lacking, config))[-1].name == best


def test_a_time_that_was_not_measured_is_no_number():
    untimed = {"icr": {"seconds": math.nan}}
    found = [
        dataclasses.replace(record, **untimed.get(record.method, {})) for record in ICR_LOSES_ON_MR
    ]
    summary = summarise(found, fake_run())
    (times,) = (line for line in grid(summary, summary.methods) if line[0] == "ms per example")
    assert [text == NONE for text in times[1:-2]] == [
        method.name == "icr" for method in summary.methods
    ]
