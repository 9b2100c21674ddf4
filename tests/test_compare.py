"""`icr compare`: a table of one's own, to a table of methods and a recommendation."""

import csv
import json

import pytest

import tiny
from icrouting.cli import main
from icrouting.tasks.labels import options_of

TEMPLATE = "Review: {text}\\nSentiment:"
QUICK = "--methods probe-hidden --demos-per-class 2 --train-epochs 1 --encoder hidden"


@pytest.fixture
def table(tmp_path):
    """A CSV of 40 rows, whose labels are words in a column of another name."""
    task = tiny.task()
    rows = [{"text": row.fields["text"], "mood": task.answer(row)} for row in task.train]
    return written(tmp_path / "rows.csv", rows)


def written(file, rows):
    with open(file, "w", newline="") as opened:
        table = csv.DictWriter(opened, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.save(folder)
    return folder


def compare(model, out, *more):
    main.main(["compare", "--model", str(model), "--out", str(out), *QUICK.split(), *more])


def of_table(table, *more):
    return ["--data", str(table), "--template", TEMPLATE, "--label", "mood", *more]


def failure(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main.main(["compare", "--out", "never", *arguments])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.slow
def test_a_table_becomes_a_recommendation_and_a_winner(model, table, tmp_path, capsys):
    out = tmp_path / "run"
    compare(model, out, *of_table(table))
    shown = capsys.readouterr().out
    assert "rows: 23 training, 5 validation and 12 held-back rows" in shown
    assert "methods in order of cost" in shown
    assert "in short" in shown
    content = json.loads((out / "compare.json").read_text())
    assert " ".join(content["answer"].split()[:3]) in shown
    assert (out / "winner" / "winner.json").exists()
    config = json.loads((out / "config.json").read_text())
    assert config["tasks"][0]["options"] == ["negative", "positive"]
    # Killed here, the command goes on; and so it says when stopped.
    compare(model, out, *of_table(table))
    assert json.loads((out / "compare.json").read_text())["lines"] == content["lines"]
    main.main(["report", str(out)])
    assert "report.html" in capsys.readouterr().out


@pytest.mark.slow
def test_a_task_file_says_all_of_it(model, table, tmp_path):
    task = tmp_path / "mood.toml"
    task.write_text(
        f'template = "{TEMPLATE}"\noptions = ["negative", "positive"]\nlabel = "mood"\n'
        f'[splits]\nrows = "{table.name}"\nsplit = 0.5\n'
    )
    compare(model, tmp_path / "run", "--task", str(task))
    content = json.loads((tmp_path / "run" / "compare.json").read_text())
    assert (content["task"], content["recommendation"]["n_rows"]) == ("mood", 20)


def test_options_are_the_columns_labels_in_their_order(tmp_path):
    rows = [{"text": f"a {n}", "grade": n} for n in (3, 1, 2, 3)]
    assert options_of(written(tmp_path / "a.csv", rows), "{text}", "grade") == ["1", "2", "3"]


def test_numbers_that_are_labels_are_read_as_they_stand(tmp_path):
    from icrouting.cli.reading import read_own_task

    rows = [{"text": f"{word} {n}", "grade": n % 3 + 1} for n in range(12) for word in ("a", "b")]
    file = written(tmp_path / "a.csv", rows)
    task = read_own_task(
        file,
        "{text}",
        (),
        label="grade",
        test=None,
        split=0.3,
        seed=0,
        file=None,
        label_scoring="first",
        chat=False,
    )
    assert task.spec.options == ("1", "2", "3")
    for row in task.train:
        number = int(row.fields["text"].split()[1])
        assert task.answer(row) == str(number % 3 + 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": "x"}], "no column 'mood' for the labels"),
        ([{"text": "a", "mood": "x"}, {"text": "b", "mood": "x"}], "labels of two kinds or more"),
        ([{"text": "a", "mood": "x"}, {"text": "b", "mood": " "}], "is empty: fill it in"),
        ([{"text": f"a {n}", "mood": f"{n}"} for n in range(101)], "101 different values"),
        ([{"txt": "a", "mood": "x"}, {"txt": "b", "mood": "y"}], "missing here: ['text']"),
    ],
)
def test_a_table_that_does_not_fit_is_told_in_one_line(tmp_path, capsys, rows, message):
    file = written(tmp_path / "rows.csv", rows)
    assert message in failure(capsys, *of_table(file))


def test_arguments_that_do_not_go_together_are_told_in_one_line(table, capsys):
    assert "give a table with --data" in failure(capsys)
    assert "give a table with --data" in failure(capsys, "--data", str(table))
    assert "leave out --data" in failure(capsys, "--task", "a.toml", *of_table(table))
    assert "cannot read" in failure(capsys, *of_table(table.with_name("none.csv")))
    assert "above 0" in failure(capsys, *of_table(table), "--minutes", "0")
    assert "did you mean" in failure(capsys, *of_table(table), "--methods", "icrr").lower()
    assert "leave router out" in failure(capsys, *of_table(table), "--router", "x")
