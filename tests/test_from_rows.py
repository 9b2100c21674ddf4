"""Tasks made of rows as people have them."""

from collections import Counter

import datasets
import numpy as np
import pandas
import pytest

from icrouting import Task
from icrouting.tasks.load import load_task
from icrouting.tasks.task import rows_digest

TEMPLATE = "Ticket: {text}\nTeam:"
TEAMS = ("Access", "Hardware", "Network", "Billing")
NEW = [{"text": "a new ticket", "team": "Network"}]


def tickets(n=40, teams=TEAMS):
    return [{"text": f"ticket {i} here", "team": teams[i % len(teams)]} for i in range(n)]


def made(rows, template=TEMPLATE, options=TEAMS, label="team", **settings):
    return Task.from_rows(rows, template, options, label=label, **settings)


def everything(task):
    return [*task.train, *task.validation, *task.test]


def test_rows_are_cut_by_label_with_the_share_to_test_on():
    task = made(tickets())
    assert Counter(task.answer(row) for row in task.test) == dict.fromkeys(TEAMS, 3)
    assert len(everything(task)) == 40
    assert (task.name, task.spec.group, task.n_dropped) == ("my task", "far", 0)
    assert task.prompt(task.test[0]).startswith("Ticket: ticket ")


def test_each_row_keeps_its_label_and_is_on_one_side():
    task = made(tickets())
    pairs = {(row.fields["text"], task.answer(row)) for row in everything(task)}
    assert pairs == {(row["text"], row["team"]) for row in tickets()}


def test_the_cut_is_seeded():
    assert made(tickets()) == made(tickets())
    assert made(tickets()).test != made(tickets(), seed=1).test
    assert made(tickets(), seed=np.int64(1)) == made(tickets(), seed=1)


@pytest.mark.parametrize("split", [0.01, 0.3, 0.99])
def test_a_label_of_two_rows_is_on_both_sides_and_of_one_in_training(split):
    rows = [*tickets(20, TEAMS[:2]), {"text": "one cable", "team": "Network"}]
    rows += [{"text": f"bill {i}", "team": "Billing"} for i in range(2)]
    task = made(rows, split=split)
    learned = {task.answer(row) for row in (*task.train, *task.validation)}
    assert learned == set(TEAMS)
    assert {task.answer(row) for row in task.test} == {"Access", "Hardware", "Billing"}


def test_rows_of_the_training_side_that_repeat_a_test_row_are_left_out():
    again = [{**row, "team": "Access"} for row in tickets()]
    task = made([*tickets(), *again])
    assert task.n_dropped > 0
    learned = {row.fields["text"] for row in (*task.train, *task.validation)}
    assert not learned & {row.fields["text"] for row in task.test}


def test_rows_that_repeat_one_another_are_on_one_side_so_that_no_label_is_lost():
    again = [{**row, "text": row["text"].upper()} for row in tickets()]
    once = made(tickets())
    twice = made([*tickets(), *again])
    assert len(twice.test) == 2 * len(once.test)
    assert len(twice.train) + len(twice.validation) == len(once.train) + len(once.validation)
    bills = [{"text": f"bill {i}", "team": "Billing"} for i in range(2)]
    cable = {"text": "one cable", "team": "Network"}
    task = made([*tickets(20, TEAMS[:2]), *bills * 9, *[cable] * 9])
    assert {task.answer(row) for row in task.train} == set(TEAMS)


def test_rows_that_all_repeat_rows_to_test_on_are_said_to_be_left_out():
    with pytest.raises(
        ValueError, match=r"got 0 of label \[\] \(40 that repeat one another or a h"
    ):
        made(tickets(), test=tickets())


def test_rows_to_test_on_may_come_by_themselves():
    task = made(tickets(), test=pandas.DataFrame(NEW))
    assert [task.answer(row) for row in task.test] == ["Network"]
    assert len(task.train) + len(task.validation) == 40


FORMS = {
    "a generator": lambda rows: (row for row in rows),
    "a data frame": pandas.DataFrame,
    "a categorical frame": lambda rows: pandas.DataFrame(rows).astype({"team": "category"}),
    "a shuffled index": lambda rows: pandas.DataFrame(rows, index=[*range(40)][::-1]),
    "a dataset": datasets.Dataset.from_list,
    "numpy's texts": lambda rows: [{k: np.str_(v) for k, v in row.items()} for row in rows],
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_of_rows_make_the_same_task(form):
    assert rows_digest([made(FORMS[form](tickets()))]) == rows_digest([made(tickets())])


def test_indices_are_labels_in_every_form():
    rows = [{**row, "team": TEAMS.index(row["team"])} for row in tickets()]
    features = datasets.Features(
        {"text": datasets.Value("string"), "team": datasets.ClassLabel(names=list(TEAMS))}
    )
    of_numpy = [{**row, "team": np.int64(row["team"])} for row in rows]
    of_floats = pandas.DataFrame(rows).astype({"team": float})
    dataset = datasets.Dataset.from_list(rows, features=features)
    for form in (rows, of_numpy, of_floats, pandas.DataFrame(rows), dataset):
        assert made(form) == made(tickets())


@pytest.mark.parametrize("make", [list, pandas.DataFrame, datasets.Dataset.from_list])
def test_rows_may_bring_their_own_choices(make):
    rows = [{"q": f"question {i}", "choices": ["a", "b"], "label": i % 2} for i in range(8)]
    task = Task.from_rows(make(rows), "{q}\n{choices}\nAnswer ({letters}):")
    assert {row.choices for row in everything(task)} == {("a", "b")}


def test_numbers_as_labels_are_read_by_the_one_rule():
    stars = ("1", "2", "3")
    rows = [{"text": f"review {i}", "label": 1 + i % 2} for i in range(8)]
    with pytest.raises(ValueError, match=r"rows\[0\]: field 'label' is 1, which may be the index"):
        Task.from_rows(rows, "{text}:", stars)
    for labels, expected in (("text", {"1", "2"}), ("index", {"2", "3"})):
        task = Task.from_rows(rows, "{text}:", stars, labels=labels)
        assert {task.answer(row) for row in task.train} == expected
    rows[2]["label"] = 0
    rows[5]["label"] = 3
    with pytest.raises(ValueError, match=r"rows\[2\]: .* is 0, .* in rows\[5\] it is 3"):
        Task.from_rows(rows, "{text}:", stars)


def test_words_replace_values_of_a_column():
    task = made(tickets(), words={"text": {"a new ticket": "News"}}, test=NEW)
    assert task.prompt(task.test[0]) == "Ticket: News\nTeam:"


def changed(place, **values):
    rows = tickets()
    rows[place] = {**rows[place], **values}
    return rows


TWICE = pandas.DataFrame([["a", "b", "Access"]], columns=["text", "text", "team"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "'my task': rows must hold a row or more, got none"),
        (pandas.DataFrame(), "rows must hold a row or more, got none"),
        (pandas.DataFrame({"text": [], "team": []}), "rows must hold a row or more, got none"),
        (
            [{"body": "x", "team": "Access"}],
            r"rows\[0\]: .* needs the fields \['text', 'team'\], missing here: \['text'\]; "
            r"this row has \['body', 'team'\]",
        ),
        (changed(7, team="Sales"), r"rows\[7\]: field 'team' must be an .* Billing, got 'Sales'"),
        (changed(7, team=None), r"rows\[7\]: field 'team' is empty"),
        (pandas.DataFrame(changed(7, team=np.nan)), r"rows\[7\]: field 'team' is empty"),
        (pandas.DataFrame(changed(7, text=None)), r"rows\[7\]: field 'text' must be a text"),
        (changed(7, text=5), r"rows\[7\]: field 'text' must be a text .* got 5"),
        (tickets(9, ["Access"]), "two labels or more, but all 9 rows have the label 'Access'"),
        (tickets(3), "a row or more for each of the 4 options, got 3 rows in all: add rows"),
        (tickets(4), "each label has one row alone, repeats aside, so none is left to test on"),
        (
            TWICE,
            r"more than one column is called 'text', .* columns are \['text', 'text', 'team'\]",
        ),
        (datasets.DatasetDict(), r"rows must be a list of dicts, .*, got DatasetDict"),
        ({"train": tickets()}, r"got dict of \['train'\]"),
        (3, "rows must be a list of dicts, a data frame, a dataset or a file's path, got int"),
        (["ticket"], r"rows\[0\]: expected a dict of columns, got 'ticket'"),
    ],
)
def test_rows_that_do_not_fit_are_refused_in_one_sentence(rows, message):
    with pytest.raises(ValueError, match=message) as caught:
        made(rows)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": '{"a": {text}}'}, "template needs slots .* a brace that is none twice"),
        ({"template": "{text} } :"}, "template is malformed: .* written {{ or }}"),
        ({"template": "{{text}}:"}, "template needs slots .* a brace that is none twice"),
        ({"template": "{text} {team}:"}, r"template has a slot \{team\}, which is the column of"),
        ({"template": "{text}: {mood}:"}, r"missing here: \['mood'\]; this row has \['text'"),
        ({"options": "Access"}, "options must be a list, got 'Access'"),
        ({"options": ["Access"]}, "options must list two different texts or more"),
        ({"name": None}, "name must be a str, got None"),
        ({"group": "other"}, 'group must be "in-domain", "near" or "far", got \'other\''),
        ({"label": "label"}, r"missing here: \['label'\]; this row has \['text', 'team'\]"),
        ({"split": 0.0}, "split must be a share between 0 and 1, such as 0.3, got 0.0"),
        ({"split": 1.0}, "split must be a share between 0 and 1, such as 0.3, got 1.0"),
        ({"seed": -1}, "seed must be an integer of 0 or more, got -1"),
        ({"words": {"text": "x"}}, "words must give a text for every value of a field, got"),
        ({"test": []}, "test must hold a row or more, got none"),
        ({"test": [{"text": "a", "team": "B"}]}, r"test\[0\]: field 'team' must be .* got 'B'"),
        ({"test": NEW, "rows": tickets(3)}, "got 3 rows in all"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_one_sentence(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        made(**{"rows": tickets(), **settings})
    assert "\n" not in str(caught.value)


def test_braces_written_twice_are_braces_of_the_prompt():
    task = made(tickets(), template='{{"ticket": "{text}"}}:', test=NEW)
    assert task.prompt(task.test[0]) == '{"ticket": "a new ticket"}:'


SAVERS = {
    "t.csv": lambda frame, path: frame.to_csv(path, index=False),
    "semicolons.csv": lambda frame, path: frame.to_csv(path, index=False, sep=";"),
    "t.tsv": lambda frame, path: frame.to_csv(path, index=False, sep="\t"),
    "t.jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "t.parquet": lambda frame, path: frame.to_parquet(path),
}


@pytest.mark.parametrize("name", SAVERS)
def test_all_kinds_of_files_make_the_task_of_their_rows(tmp_path, name):
    SAVERS[name](pandas.DataFrame(tickets()), tmp_path / name)
    assert made(tmp_path / name) == made(str(tmp_path / name)) == made(tickets())
    SAVERS[name](pandas.DataFrame(NEW), tmp_path / name)
    assert made(tickets(), test=tmp_path / name) == made(tickets(), test=NEW)


@pytest.mark.parametrize("name", SAVERS)
def test_indices_in_files_are_labels(tmp_path, name):
    rows = [{**row, "team": TEAMS.index(row["team"])} for row in tickets()]
    SAVERS[name](pandas.DataFrame(rows), tmp_path / name)
    assert made(tmp_path / name) == made(tickets())


@pytest.mark.parametrize("name", SAVERS)
def test_a_file_s_row_that_does_not_fit_is_named_by_its_place(tmp_path, name):
    SAVERS[name](pandas.DataFrame(changed(7, team="Sales")), tmp_path / name)
    # A table's heading is its first line.
    line = 8 if name in ("t.jsonl", "t.parquet") else 9
    with pytest.raises(ValueError, match=rf"{name}:{line}: field 'team' must be .* got 'Sales'"):
        made(tmp_path / name)


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.parquet"])
def test_an_empty_file_of_rows_is_refused(tmp_path, name):
    SAVERS[name](pandas.DataFrame({"text": [], "team": []}), tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} holds no example"):
        made(tmp_path / name)


def test_two_columns_of_one_name_are_refused_where_they_are_read(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("text,team,text\na,Access,b\n")
    with pytest.raises(ValueError, match=r"t.csv: more than one column is called 'text', rename"):
        made(file)
    lines = [f"{row['text']},{row['team']},," for row in tickets()]
    file.write_text("\n".join(["text,team,,", *lines]))
    assert made(file) == made(tickets())


def test_a_parquet_file_that_cannot_be_read_says_why(tmp_path, monkeypatch):
    file = tmp_path / "t.parquet"
    with pytest.raises(ValueError, match=r"cannot read .*t.parquet: "):
        made(file)
    file.write_text("text,team\n" * 20)
    with pytest.raises(ValueError, match=r"t.parquet: not a parquet file: ") as caught:
        made(file)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("pandas.read_parquet", raise_import_error)
    with pytest.raises(ValueError, match="reading parquet needs pyarrow: pip install pyarrow"):
        made(file)


def raise_import_error(path):
    raise ImportError("no engine")


def task_file(folder, rows=None, old="", new=""):
    """A task file beside one table of tickets, with a change."""
    pandas.DataFrame(rows or tickets()).to_csv(folder / "tickets.csv", index=False)
    text = (
        'name = "my task"\ngroup = "far"\n'
        'template = "Ticket: {text}\\nTeam:"\n'
        'options = ["Access", "Hardware", "Network", "Billing"]\nlabel = "team"\n'
        '[splits]\nrows = "tickets.csv"\nsplit = 0.3\nseed = 0\n'
    )
    assert old in text
    file = folder / "tickets.toml"
    file.write_text(text.replace(old, new))
    return str(file)


def test_a_task_file_cuts_one_table_as_python_does(tmp_path):
    assert load_task(task_file(tmp_path), "") == made(tickets())
    other = load_task(task_file(tmp_path, None, "0.3\nseed = 0", "0.5\nseed = 3"), "")
    assert other == made(tickets(), split=0.5, seed=3)
    assert load_task(task_file(tmp_path, None, "split = 0.3\nseed = 0\n", ""), "") == made(
        tickets()
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("split = 0.3", "split = 30", "6: key 'splits' does not fit: split must be a share .* 30"),
        (
            "split = 0.3",
            'split = "a"',
            "6: key 'splits' does not fit: split must be a share .* 'a'",
        ),
        ("seed = 0", "seed = true", "6: key 'splits' does not fit: seed must be .* got True"),
        ("seed = 0", "sed = 0", "6: key 'splits' beside rows = .* got .*'sed': 0"),
        ("seed = 0", 'train = "a.csv"', "6: key 'splits' beside rows = .* and nothing else, got"),
        ('rows = "tickets.csv"', "rows = 3", "6: key 'splits' beside rows = "),
        ('rows = "tickets.csv"', "", "6: key 'splits' must be .* or rows = \"file\""),
        ("{text}", "{team}", r"3: key 'template' has a slot \{team\}"),
        ('label = "team"', "label = 3", "5: key 'label' must be a str, got 3"),
        (
            'label = "team"',
            "",
            r"tickets.csv:2: .* missing here: \['label'\]; .* \['text', 'team'\]",
        ),
        ('"tickets.csv"', '"ticket.csv"', "cannot read .*ticket.csv"),
    ],
)
def test_a_task_file_that_cuts_wrongly_is_refused_by_key_and_line(tmp_path, old, new, message):
    with pytest.raises(ValueError, match=message):
        load_task(task_file(tmp_path, None, old, new), "")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (tickets(3), "'my task': expected a row or more for each of the 4 options, got 3 rows"),
        (tickets(9, ["Access"]), "all 9 rows have the label 'Access'"),
        (tickets(4), "each label has one row alone"),
    ],
)
def test_a_table_that_cannot_be_cut_is_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        load_task(task_file(tmp_path, rows), "")
