"""The example in the docstring of every public name runs, and says what it says."""

import doctest

import pytest

import icrouting

# A value has no docstring; its class shows it.
SHOWN_BY = {"PAPER": "FitConfig"}
# Its example makes a report, with pictures.
SLOW = {"compare"}
NAMES = [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
    for name in icrouting.__all__
]


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_has_an_example_that_runs(name, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_example(getattr(icrouting, SHOWN_BY.get(name, name)), name)


def test_a_task_of_rows_has_an_example_that_runs():
    run_example(icrouting.Task.from_rows, "from_rows")


def run_example(shown, name):
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(shown, name, globs={})
    assert name in example.docstring
    assert example.examples, f"{name} has no example"
    report = []
    result = doctest.DocTestRunner(verbose=False).run(example, out=report.append)
    assert result.failed == 0, "".join(report)
