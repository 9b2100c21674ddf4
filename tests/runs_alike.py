"""When two run folders say the same: their records, and their tables without times."""

import numpy as np

from icrouting.evaluation import records


def n_lines(run):
    """Lines of a run's records so far."""
    file = run / "records.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def cut_short(file):
    """Appends the beginning of a record, as a kill amid a line leaves it."""
    with open(file, "ab") as records_file:
        records_file.write(b'{"method": "zero-shot", "task"')


def table(run):
    """The Markdown report without what time and command line have a say in."""
    scores, _, costs = (run / "report.md").read_text().partition("\n\nTime per example")
    assert "| method | times zero-shot |" in costs
    lines = [
        line.split(" | ")
        for line in scores.splitlines()
        if not line.startswith(("| ms per", "- Model"))
    ]
    # Where methods are many they are lines, and their times a column.
    headings = [line for line in lines if "ms per example" in line]
    if headings:
        timed = headings[0].index("ms per example")
        lines = [line[:timed] + line[timed + 1 :] for line in lines]
    fits = costs.partition("What a fit costs")[2].splitlines()
    return [*lines, *(line.rpartition(" | ")[0] for line in fits)]  # whose last column is seconds


def assert_same_records(run, expected):
    """Checks that two runs made the same predictions, with the same scores up to rounding."""
    by_key = lambda record: record.key  # noqa: E731
    got, wanted = (
        sorted(records.read(folder / "records.jsonl"), key=by_key) for folder in (run, expected)
    )
    assert [(record.key, record.prediction, record.n_tokens) for record in got] == [
        (record.key, record.prediction, record.n_tokens) for record in wanted
    ]
    for mine, theirs in zip(got, wanted, strict=True):
        assert np.allclose(mine.option_logits, theirs.option_logits, atol=1e-4)


def assert_same_table(run, expected):
    """Checks that two runs say the same, and that the first has left no part behind."""
    assert_same_records(run, expected)
    assert table(run) == table(expected)
    assert not list(run.glob("records.*.jsonl"))
