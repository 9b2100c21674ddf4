"""Tables whose rows are read one after the other, whatever stands in them."""

import json
from types import SimpleNamespace

import numpy as np
import pandas
import pytest

from icrouting.cli.predict import _answered
from icrouting.tasks import rows as room
from icrouting.tasks.load import _examples
from icrouting.tasks.streams import Table, rows_of
from icrouting.tasks.task import TaskSpec


def table(folder, lines):
    file = folder / "rows.csv"
    file.write_text("\n".join(["id,text", *lines]) + "\n")
    return Table(file, ("text",))


def ids(rows):
    return [row.cells.get("id", row.place) for row in rows]


def test_a_quote_that_nothing_closes_takes_no_other_row_with_it(tmp_path):
    lines = [f"{n},row {n}" for n in range(300)]
    lines[3] = '3,"row 3'
    rows = table(tmp_path, lines)
    seen = list(rows.rows())
    assert ids(seen) == ["0", "1", "2", "rows.csv:5", *map(str, range(4, 300))]
    assert [row.place for row in seen if row.problem] == ["rows.csv:5"]
    assert seen[-1].place == "rows.csv:301"
    assert rows.survey()[0] == 300


def test_a_quote_that_a_later_row_closes_wrongly_costs_its_own_row_alone(tmp_path):
    rows = list(table(tmp_path, ['0,"open', "1,a", '2,"b"', '3,"c\nd"', "4,e"]).rows())
    assert ids(rows) == ["rows.csv:2", "1", "2", "3", "4"]
    assert rows[3].cells["text"] == "c\nd"
    assert [row.place for row in rows] == [f"rows.csv:{n}" for n in (2, 3, 4, 6, 7)]


def test_a_heading_that_is_no_csv_is_refused(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text('text,"id\nx,1\n')
    with pytest.raises(ValueError, match=r"rows\.csv: its heading is not CSV"):
        Table(file, ("text",)).survey()


CODES = TaskSpec("codes", "far", "Code: {code}\nIs:", ("a", "b"))
# What pandas, JSON and parquet make of a column of numbers.
COLUMNS = {"whole": [4, 5], "of floats": [4.0, 5.0], "with fractions": [4.0, 5.5]}


def learned(rows):
    """The texts that a fit reads in a column of numbers."""
    return [row.fields["code"] for row in _examples(rows, CODES, None, "label", "rows")]


def asked(rows):
    """The texts that are asked of the same rows without labels."""
    return [room.unlabelled(row, CODES).fields["code"] for row in rows_of(rows, CODES)]


def asked_by_the_command(file):
    """The same texts, as `icr predict` has them, and what its rows held."""
    table = Table(file, ("code",))
    window = list(table.rows())
    seen = []
    attached = SimpleNamespace(predict=lambda rows, spec: seen.extend(rows) or rows)
    _answered(attached, CODES, table, window)
    texts = [room.unlabelled(row, CODES).fields["code"] for row in rows_of(seen, CODES)]
    return texts, [row.cells["code"] for row in window]


@pytest.mark.parametrize("values", COLUMNS.values(), ids=COLUMNS)
@pytest.mark.parametrize("kind", ["frame", "list", "jsonl", "parquet"])
def test_a_column_of_numbers_is_asked_by_the_texts_that_it_was_learned_by(kind, values, tmp_path):
    frame = pandas.DataFrame({"code": values, "label": ["a", "b"]})
    rows = frame
    if kind == "list":
        rows = [{"code": np.float64(value), "label": "a"} for value in values]
        rows[1]["label"] = "b"
    if kind == "jsonl":
        rows = tmp_path / "rows.jsonl"
        lines = [json.dumps(row) for row in frame.to_dict("records")]
        rows.write_text("\n".join(lines))
    if kind == "parquet":
        pytest.importorskip("pyarrow")
        rows = tmp_path / "rows.parquet"
        frame.to_parquet(rows)
    assert asked(rows) == learned(rows)
    if kind in ("jsonl", "parquet"):
        assert asked_by_the_command(rows) == (learned(rows), values)


def test_what_is_no_finite_number_is_no_text(tmp_path):
    for value in (True, float("nan"), None, [1]):
        with pytest.raises(ValueError, match="must be a text that is not empty"):
            asked([{"code": value}])
