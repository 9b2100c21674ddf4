"""Tables whose rows are read one after the other, whatever stands in them."""

import pytest

from icrouting.tasks.streams import Table


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
