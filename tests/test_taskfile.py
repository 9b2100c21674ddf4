import json
import re
from pathlib import Path

import pytest

from icrouting.cli import main
from icrouting.tasks.load import load_task

PAGE = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text()


def block(language):
    return re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL).group(1)


@pytest.fixture
def stance(tmp_path):
    """The documented example, as a user would save it."""
    folder = tmp_path / "stance"
    folder.mkdir()
    (folder / "stance.toml").write_text(block("toml"))
    (folder / "train.csv").write_text(block("csv"))
    (folder / "test.jsonl").write_text(block("json"))
    return folder / "stance.toml"


def test_the_documented_task_file_reads(stance):
    task = load_task(str(stance), data="")
    assert (task.name, task.spec.group) == ("stance", "far")
    assert task.prompt(task.test[0]) == "Tweet: Finally a plan\nStance on a car-free town:"
    assert task.answer(task.test[0]) == "favour"
    assert [example.label for example in task.train] == [1, 0, 1]
    assert task.train[0].fields["text"] == "No more cars in the centre, please"


@pytest.mark.slow
def test_the_documented_command_runs_on_a_task_file(stance, tmp_path, capsys):
    import tiny

    tiny.save(tmp_path / "model")
    for file in stance.parent.iterdir():  # the tiny tokenizer knows few words
        text = file.read_text().replace("against", "negative").replace("favour", "positive")
        file.write_text(text.replace('"none"', '"joy"'))
    line = re.search(r"```\n(icr eval.*?)```", PAGE, re.DOTALL).group(1)
    replaced = {
        "pinned:smollm2-135m": tmp_path / "model",
        "stance/stance.toml": stance,
        "runs/stance": tmp_path / "run",
    }
    words = [str(replaced.get(word, word)) for word in line.split()[1:]]
    at = words.index("--tasks")
    words[at + 1 : at + 5] = [str(stance), "--sources", str(stance)]
    main.main([*words, "--demos-per-class", "1", "--n-test", "1"])
    assert "stance" in capsys.readouterr().out


def test_choices_come_from_a_csv_with_bars_between(tmp_path):
    (tmp_path / "quiz.toml").write_text(
        'template = "Q: {q}\\n{choices}\\nAnswer ({letters}):"\n'
        '[splits]\ntrain = "a.csv"\ntest = "a2.csv"\n'
        '[words.q]\nwhere = "Where is it?"\n'
    )
    (tmp_path / "a.csv").write_text("q,choices,label\nwhere,here | there,1\nwho,me | you,0\n")
    (tmp_path / "a2.csv").write_text("q,choices,label\nwhere,left | right | up,2\n")
    task = load_task(str(tmp_path / "quiz.toml"), data="")
    assert task.prompt(task.test[0]) == "Q: Where is it?\nA. left\nB. right\nC. up\nAnswer (A/B/C):"
    assert task.answer(task.test[0]) == "C"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "options =",
            "optoins =",
            "3: key 'optoins' is not known: a task file has name, group, template",
        ),
        (
            '["against", "favour", "none"]',
            '"against"',
            "3: key 'options' must be a list, got 'against'",
        ),
        (
            '["against", "favour", "none"]',
            '["against"]',
            "3: key 'options' must list two different texts or more",
        ),
        (
            '["against", "favour", "none"]',
            '["a", "a"]',
            "3: key 'options' must list two different texts or more",
        ),
        (
            '["against", "favour", "none"]',
            '["a", 2]',
            "3: key 'options' must list two different texts or more",
        ),
        ("{text}", "text", "must"),
        (
            "{target}:",
            "{target}: ",
            "2: key 'template' needs slots such as {text} and no space at its end",
        ),
        ("{text}", "{text", "2: key 'template' is malformed"),
        ("{text}", "{0}", "2: key 'template' needs slots"),
        ("template =", "# template =", "1: key 'template' is missing"),
        ('test = "test.jsonl"', "", "5: key 'splits' must be train ="),
        ('test = "test.jsonl"', "test = 3", "5: key 'splits' must be train ="),
        ("[splits]", "[splits", "not TOML"),
        (
            "{target}:",
            "{choices}:",
            "3: key 'options' must be left out where the template has {choices}",
        ),
        ("{target}", "{target:d}", "2: key 'template' needs slots"),
        ("{target}", "{text:{target}}", "2: key 'template' needs slots"),
        ("options =", 'group = "source"\noptions =', "3: key 'group' must be"),
        (
            "options =",
            'words.text = "bar"\noptions =',
            "key 'words' must give a text for every value",
        ),
        ("options =", '"op(" = 1\noptions =', "key 'op(' is not known"),
        ("test.jsonl", "tset.jsonl", "cannot read"),
    ],
)
def test_a_malformed_task_file_is_named_by_key_and_line(stance, old, new, said):
    if new == "text":
        new, said = "a tweet", "train.csv"  # a template may do without a field of the rows
        stance.write_text(stance.read_text().replace("{target}", "it").replace(old, new))
        said = "needs slots"
    else:
        stance.write_text(stance.read_text().replace(old, new, 1))
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_task(str(stance), data="")
    assert said in str(caught.value)
    assert "stance" in str(caught.value)


def test_a_bad_row_of_a_csv_is_named_by_file_and_line(stance):
    train = stance.parent / "train.csv"
    train.write_text(train.read_text().replace(",against\n", ",agianst\n"))
    with pytest.raises(
        ValueError,
        match=r"train.csv:3: field 'label' must be an integer in 0..2 or one of against, fav",
    ):
        load_task(str(stance), data="")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (",against\n", ",a,gainst\n", "train.csv:3: more cells than the heading has"),
        ("They will", '"They "will', "not CSV after line 2"),
        ("a car-free town,1\n", 'a car-free town,"1\n', "not CSV after line 3"),
    ],
)
def test_a_line_that_is_no_csv_is_named(stance, old, new, said):
    train = stance.parent / "train.csv"
    train.write_text(train.read_text().replace(old, new, 1))
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_task(str(stance), data="")
    assert said in str(caught.value)


def test_labels_may_be_letters_and_digits_that_are_options(tmp_path):
    (tmp_path / "a.toml").write_text(
        'template = "{q}:"\noptions = ["1", "2"]\nsplits = {train = "t.csv", test = "t2.csv"}'
    )
    (tmp_path / "t.csv").write_text("q,label\nfive,2\nsix,1\n")
    (tmp_path / "t2.csv").write_text("q,label\nseven,2\neight,1\n")
    assert [example.label for example in load_task(str(tmp_path / "a.toml"), "").test] == [1, 0]
    (tmp_path / "b.toml").write_text(
        'template = "{q} {choices}:"\nsplits = {train = "l.csv", test = "l2.csv"}'
    )
    (tmp_path / "l2.csv").write_text("q,choices,label\nseven,a|b,B\neight,a|b,A\n")
    (tmp_path / "l.csv").write_bytes(
        "\ufeffq,choices,label\r\nfive,a|b,B\r\nsix,a|b,A\r\n".encode()
    )
    assert [example.label for example in load_task(str(tmp_path / "b.toml"), "").test] == [1, 0]


def test_a_missing_task_file_is_said(tmp_path):
    with pytest.raises(ValueError, match="cannot read the task file"):
        load_task(str(tmp_path / "no.toml"), data="")


STARS = ("1", "2", "3", "4", "5")


def stars_task(folder, labels, name="train.jsonl", options=STARS, key=""):
    """The task of a file whose options are numbers, with one training row for each label."""
    quoted = ", ".join(f'"{option}"' for option in options)
    (folder / "stars.toml").write_text(
        f'template = "{{text}}:"\noptions = [{quoted}]\n{key}\n'
        f'splits = {{train = "{name}", test = "test.jsonl"}}'
    )
    rows = [(f"row {place} of many", label) for place, label in enumerate(labels)]
    if name.endswith(".jsonl"):
        lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    else:
        lines = ["text,label", *(f"{text},{label}" for text, label in rows)]
    (folder / name).write_text("\n".join(lines))
    (folder / "test.jsonl").write_text(json.dumps({"text": "a test", "label": options[0]}))
    return load_task(str(folder / "stars.toml"), data="")


def answers(task):
    rows = sorted((*task.train, *task.validation), key=lambda row: row.fields["text"])
    return [task.answer(row) for row in rows]


@pytest.mark.parametrize("name", ["train.jsonl", "train.csv"])
@pytest.mark.parametrize(
    ("labels", "options", "read"),
    [
        ((1, 2, 4, 5), STARS, "1245"),
        ((0, 1, 3, 4), STARS, "1245"),
        ((1, 0, 0), ("0", "1"), "100"),
        ((-1, 0, 1), ("-1", "0", "1"), None),
        ((1, 2), ("1.0", "2.0"), None),
        ((7, 9, 7), ("7", "8", "9"), "797"),
        ((0, 2, 0), ("7", "8", "9"), "797"),
    ],
)
def test_numbers_of_a_file_are_all_indices_or_all_options(tmp_path, name, labels, options, read):
    expected = list(read) if read else [option for option in options]
    assert answers(stars_task(tmp_path, labels, name, options)) == expected


@pytest.mark.parametrize("name", ["train.jsonl", "train.csv"])
@pytest.mark.parametrize(
    ("options", "first", "second"),
    [
        (STARS, "2", "1"),
        (("0", "2", "1"), "2", "1"),
        (("01", "02"), "02", "01"),
        (("1.0", "2.0"), "2.0", "1.0"),
    ],
)
def test_numbers_that_may_be_either_are_refused_with_both_readings(
    tmp_path, name, options, first, second
):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        stars_task(tmp_path, (1, 1), name, options)
    line = 1 if name == "train.jsonl" else 2
    assert f"{name}:{line}: field 'label' is 1, which may be the index of the option" in str(
        caught.value
    )
    assert f"the index of the option {first!r} or the option {second!r} itself" in str(caught.value)
    assert 'labels = "index" or labels = "text"' in str(caught.value)


@pytest.mark.parametrize("name", ["train.jsonl", "train.csv"])
def test_the_task_file_says_which_reading_is_meant(tmp_path, name):
    assert answers(stars_task(tmp_path, (1, 2, 3), name, key='labels = "text"')) == ["1", "2", "3"]
    assert answers(stars_task(tmp_path, (1, 2, 3), name, key='labels = "index"')) == ["2", "3", "4"]
    with pytest.raises(ValueError, match="'label' must be one of 1, 2, 3, 4, 5, got 0"):
        stars_task(tmp_path, (1, 0), name, key='labels = "text"')
    with pytest.raises(ValueError, match=r"'label' must be an integer in 0..4 or one of .* got 5"):
        stars_task(tmp_path, (1, 5), name, key='labels = "index"')


def test_labels_of_both_readings_in_one_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r":2: field 'label' is 0, .* in .*:4 it is 5"):
        stars_task(tmp_path, (1, 0, 2, 5))


def test_an_option_in_quotes_is_no_index(tmp_path):
    assert answers(stars_task(tmp_path, ("1", "2", "1"))) == ["1", "2", "1"]


def test_another_word_for_labels_is_refused_by_key_and_line(tmp_path):
    with pytest.raises(
        ValueError, match=r"3: key 'labels' must be \"index\" or \"text\", got 'number'"
    ):
        stars_task(tmp_path, (1, 2), key='labels = "number"')


@pytest.mark.parametrize(
    ("name", "between"),
    [("t.csv", ","), ("t.csv", ";"), ("t.csv", "\t"), ("t.tsv", "\t"), ("t.TSV", "\t")],
)
def test_tables_are_read_whatever_stands_between_their_cells(stance, name, between):
    lines = ["text|target|label", '"one; two,\tthree"|towns|none', "four|towns|2", "five|towns|0"]
    (stance.parent / name).write_text("\n".join(line.replace("|", between) for line in lines))
    stance.write_text(stance.read_text().replace("train.csv", name))
    task = load_task(str(stance), data="")
    assert task.train[0].fields["text"] == "one; two,\tthree"
    assert [row.label for row in task.train] == [2, 2, 0]


def test_a_cell_too_many_is_named_with_what_stands_between_cells(stance):
    (stance.parent / "train.csv").write_text("text;target;label\none;two;towns;none\n")
    with pytest.raises(ValueError, match=r"train.csv:2: .* put a text with semicolons in quotes"):
        load_task(str(stance), data="")


def test_a_table_under_another_name_is_told_how_to_be_called(stance):
    (stance.parent / "train.csv").rename(stance.parent / "train.txt")
    stance.write_text(stance.read_text().replace("train.csv", "train.txt"))
    with pytest.raises(ValueError, match=r"train.txt:1: not a JSON object: .* called .csv or .tsv"):
        load_task(str(stance), data="")
