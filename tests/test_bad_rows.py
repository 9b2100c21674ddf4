"""Rows that do not fit: what is said of them, and what is read all the same."""

import csv

import pandas
import pytest

from icrouting import Task, load_task

TEMPLATE = "Ticket: {text}\nTeam:"
TEAMS = ("Access", "Hardware")
ROWS = [{"text": f"ticket {i}", "team": TEAMS[i % 2]} for i in range(20)]
CSV = "text,team\n" + "\n".join(f"ticket {i},{TEAMS[i % 2]}" for i in range(20))


def made(rows, template=TEMPLATE, options=TEAMS):
    return Task.from_rows(rows, template, options, label="team")


def refusal(rows, template=TEMPLATE, options=TEAMS):
    """What is said of rows that are refused, in one line."""
    with pytest.raises(ValueError) as error:  # noqa: PT011
        made(rows, template, options)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.fixture
def file(tmp_path):
    def written(text, encoding="utf-8"):
        path = tmp_path / "rows.csv"
        path.write_text(text, encoding=encoding)
        return path

    return written


def test_labels_that_are_no_options_are_all_named_with_their_rows_and_the_nearest_option():
    odd = [{"text": "x", "team": "Axcess"}] * 3 + [{"text": "y", "team": "Quux"}]
    said = refusal([*ROWS, *odd])
    assert said.startswith("rows[20]: field 'team' must be an integer in 0..1 or one of Access")
    assert "4 of 24 rows have such labels: 'Axcess' (3, did you mean 'Access'?), 'Quux' (1)" in said


@pytest.mark.parametrize("label", ["access", " Access", "ACCESS "])
def test_case_and_blanks_around_a_label_are_no_reason_to_miss_the_option_that_was_meant(label):
    assert "did you mean 'Access'?" in refusal([*ROWS, {"text": "x", "team": label}])


@pytest.mark.parametrize("label", [None, float("nan"), "", "  ", pandas.NA, pandas.NaT])
def test_a_missing_label_is_called_empty(label):
    said = refusal([*ROWS, {"text": "x", "team": label}])
    assert "rows[20]: field 'team' is empty: give the row a label, or leave the row out" in said
    assert "1 of 21 rows have such labels: no label (1)" in said


def test_many_options_and_many_odd_labels_are_listed_in_part():
    options = [f"option {i}" for i in range(77)]
    rows = [{"text": f"a {i}", "team": option} for i, option in enumerate(options)]
    said = refusal([*rows, *({"text": "b", "team": f"zz{i}"} for i in range(50))], options=options)
    assert "option 11, ... (77 in all), got 'zz0'" in said
    assert "'zz11' (1), ... (50 in all)" in said
    assert len(said) < 700


@pytest.mark.parametrize("heading", ["text,tm", "text;tm", "text\ttm"])
def test_columns_that_are_there_are_named_where_one_is_missing(heading, file):
    text = CSV.replace("text,team", "text,tm").replace(",", heading[4])
    said = refusal(file(text))
    assert "missing here: ['team']; this row has ['text', 'tm']" in said


@pytest.mark.parametrize("rows", [ROWS, pandas.DataFrame(ROWS)])
def test_columns_of_rows_in_memory_are_named_where_one_is_missing(rows):
    assert "missing here: ['body']; this row has ['text', 'team']" in refusal(rows, "{body}:")


def test_a_cell_may_have_any_length_and_the_readers_limit_stays_as_it_was(file):
    limit = csv.field_size_limit()
    task = made(file(f"{CSV}\n{'word ' * 40_000},Access"))
    everything = [*task.train, *task.validation, *task.test]
    assert max(len(row.fields["text"]) for row in everything) == 200_000
    assert csv.field_size_limit() == limit


def test_rows_of_one_class_are_refused_with_its_name(file):
    assert "all 10 rows have the label 'Access'" in refusal(ROWS[::2])


def test_fewer_rows_than_options_are_refused():
    options = ["Access", "Hardware", "Network", "Billing"]
    assert "a row or more for each of the 4 options, got 3" in refusal(ROWS[:3], options=options)


def test_two_columns_of_one_name_are_refused(file):
    assert "more than one column is called 'text'" in refusal(file("text,team,text\na,Access,b"))


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_file_of_another_encoding_is_said_to_be_none_of_utf_8(encoding, file):
    said = refusal(file(CSV + "\n\N{LATIN SMALL LETTER E WITH ACUTE},Access", encoding))
    assert "rows.csv is not UTF-8 text" in said
    assert "save it as UTF-8" in said


@pytest.mark.parametrize("text", ["", "text,team\n"])
def test_an_empty_file_holds_no_example(text, file):
    assert "rows.csv holds no example" in refusal(file(text))


@pytest.mark.parametrize(
    "change", [("text", "\ufefftext"), (",", ";"), (",", "\t"), ("\n", "\r\n")]
)
def test_a_byte_order_mark_and_the_signs_of_spreadsheets_make_no_difference(change, file):
    assert made(file(CSV.replace(*change))) == made(file(CSV))


@pytest.mark.parametrize("template", ['{"t": {text}}\nTeam:', "{text} {\nTeam:", "{text} }\nTeam:"])
def test_a_brace_that_is_no_slots_is_said_to_be_written_twice(template):
    said = refusal(ROWS, template)
    assert "{{" in said
    assert "}}" in said


def test_braces_that_are_written_twice_stand_in_the_prompt():
    task = made(ROWS, '{{"t": {text}}}\nTeam:')
    assert task.prompt(task.test[0]).startswith('{"t": ticket ')


CODES = {
    "a frame": pandas.DataFrame([{**row, "text": 100 + i} for i, row in enumerate(ROWS)]),
    "a list": [{**row, "text": 100 + i} for i, row in enumerate(ROWS)],
    "floats": pandas.DataFrame([{**row, "text": 100.0 + i} for i, row in enumerate(ROWS)]),
}


@pytest.mark.parametrize("form", CODES)
def test_a_column_of_numbers_alone_is_read_as_text_as_a_csv_has_it(form, file):
    lines = [f"{100 + i},{TEAMS[i % 2]}" for i in range(20)]
    assert made(CODES[form]) == made(file("\n".join(["text,team", *lines])))


@pytest.mark.parametrize("text", [5, 0.5, True, None, float("nan")])
def test_what_is_no_text_among_texts_is_refused_with_its_place(text):
    said = refusal([*ROWS, {"text": text, "team": "Access"}])
    assert said == f"rows[20]: field 'text' must be a text that is not empty, got {text!r}"


def test_a_task_in_python_and_in_a_file_stand_in_the_same_group(tmp_path, file):
    file(CSV)
    (tmp_path / "t.toml").write_text(
        'name = "my task"\ntemplate = "Ticket: {text}\\nTeam:"\n'
        'options = ["Access", "Hardware"]\nlabel = "team"\n[splits]\nrows = "rows.csv"\n'
    )
    assert load_task(str(tmp_path / "t.toml"), "") == made(ROWS)
