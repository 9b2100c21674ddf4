from rich.console import Console

from fake_run import ICR_LOSES_ON_MR, TASKS, fake_config
from icrouting.summary import summarise
from icrouting.table import NONE, collapse, marks, terminal_table


def test_the_terminal_table_holds_brackets_of_notes_as_they_are():
    summary = summarise(ICR_LOSES_ON_MR, fake_config(notes=["cut [bold]short[/bold]"]))
    console = Console(width=160)
    with console.capture() as capture:
        console.print(terminal_table(summary))
    assert "cut [bold]short[/bold]" in capture.get()
    assert all(task["name"] in capture.get() for task in TASKS)


def test_tasks_stand_by_section_with_a_mean_after_each():
    titles = [row.title for row in summarise(ICR_LOSES_ON_MR, fake_config()).rows]
    assert titles == ["agnews", "mean source", "mr", "mean near", "cb", "mean far", "mean unseen", "mean all"]


def test_marks_and_collapse_name_the_loss():
    summary = summarise(ICR_LOSES_ON_MR, fake_config())
    assert marks(summary.line("task", "mr", "icr")) == "▼≈"
    assert marks(summary.line("task", "agnews", "icr")) == "▲"
    methods = {method.name: method for method in summary.methods}
    icr = methods["icr"]
    assert (icr.n_compared, icr.n_collapsed, icr.n_collapsed_significantly) == (3, 1, 1)
    assert collapse(icr) == "1 (1 sig.)"
    assert collapse(methods["zero-shot"]) == NONE
    assert "≈" not in marks(summary.line("task", "mr", "few-shot"))
