import json

import numpy as np
import pytest

from icrouting.evaluation.items import SPARE, within
from icrouting.tasks.catalogue import SPECS
from icrouting.tasks.splits import apart, is_long, make_task, text_key
from icrouting.tasks.task import Example, Task

SPEC = SPECS["sst2"]


def example(text, label=0):
    return Example({"text": text}, (), label)


TRAIN = [
    example(f"film number {i} is {'dull' if i % 2 else 'a joy'} and so long", i % 2)
    for i in range(60)
]
TEST = [example("a plain test sentence of seven words", 0)]


def texts(examples):
    return [e.fields["text"] for e in examples]


def test_validation_is_a_seeded_fifth_that_no_other_split_knows():
    task = make_task(SPEC, TRAIN, TEST)
    assert len(task.validation) == 12
    assert len(task.train) == 48
    assert not set(texts(task.train)) & set(texts(task.validation))
    assert task == make_task(SPEC, TRAIN, TEST)
    assert (
        len(
            make_task(
                SPEC, TRAIN * 1 + [example(f"x {i}", i % 2) for i in range(900)], TEST
            ).validation
        )
        == 100
    )


@pytest.mark.parametrize(
    ("n", "n_pieces", "n_kept", "n_held"), [(100, 75, 20, 5), (100, 80, 16, 4), (1000, 900, 80, 20)]
)
def test_a_fifth_of_what_is_left_is_for_validation(n, n_pieces, n_kept, n_held):
    rows = [example(f"row {i} is one of quite a few words", i % 2) for i in range(n)]
    task = make_task(
        SPEC, rows, [example(f"so then {row.fields['text']} it is") for row in rows[:n_pieces]]
    )
    assert (len(task.train), len(task.validation), task.n_dropped) == (n_kept, n_held, n_pieces)


def test_no_slice_holds_a_piece_of_a_test_row_or_of_another_task_s():
    tested = [example(f"so it is that {row.fields['text']} after all") for row in TRAIN[:20]]
    other = [example(row.fields["text"].upper(), 1) for row in TRAIN[20:40]]
    task = make_task(SPEC, TRAIN, [*TEST, *tested], other)
    assert {*texts(task.train), *texts(task.validation)} == set(texts(TRAIN[40:]))
    assert (len(task.validation), task.n_dropped) == (4, 40)


def test_the_validation_slice_of_a_sorted_file_has_both_labels():
    task = make_task(SPEC, sorted(TRAIN, key=lambda e: e.label), TEST)
    assert {e.label for e in task.validation} == {0, 1}


def test_training_rows_that_repeat_one_another_or_a_test_row_are_left_out_and_counted():
    again = [
        example("A PLAIN test sentence, of seven words!", 0),
        example("Film number 3 is dull -- and so long", 1),
    ]
    task = make_task(SPEC, [*TRAIN, *again], TEST)
    assert task.n_dropped == 2
    assert task.test == tuple(TEST)
    assert not set(texts(again)) & set(texts(task.train + task.validation))


def test_long_rows_around_or_inside_a_held_back_row_are_left_out_and_short_ones_kept():
    held = [example("the plot of this film makes no sense at all"), example("so good")]
    around = example("they say the plot of this film makes no sense at all , but so what")
    inside_of = example("plot of this film makes")
    short = example("no sense at all")
    holds_short = example("so good that everybody laughed")
    assert apart([around, inside_of, short, holds_short], held) == [short, holds_short]


def test_rows_of_several_fields_repeat_only_as_a_whole():
    spec = SPECS["mrpc"]
    rows = [
        Example(
            {"text1": f"one sentence with number {i}", "text2": f"other sentence {i}"}, (), i % 2
        )
        for i in range(20)
    ]
    swapped = Example({"text1": "other sentence 3", "text2": "one sentence with number 3"}, (), 1)
    task = make_task(spec, rows, [Example(rows[3].fields, (), 1)])
    assert task.n_dropped == 1
    assert apart([swapped], rows) == [swapped]
    assert rows[3] not in task.train


def test_a_task_of_one_class_is_refused():
    with pytest.raises(
        ValueError,
        match=r"'sst2': expected training rows of two classes or more, got 3 of label \[1\]",
    ):
        make_task(SPEC, [example(f"text {i}", 1) for i in range(3)], TEST)


def test_texts_without_a_latin_letter_are_told_apart():
    rows = [example(text, label) for label, text in enumerate(("好电影", "坏电影"))]
    assert len(make_task(SPEC, rows, TEST).train) == 2


@pytest.mark.parametrize(
    "text", ["фильм номер {} мне очень понравился", "我喜欢这个 iPhone 的电影 {}"]
)
def test_rows_in_other_scripts_are_told_apart(text):
    rows = [example(text.format(i), i % 2) for i in range(60)]
    task = make_task(SPEC, rows, TEST)
    assert (len(task.train), len(task.validation), task.n_dropped) == (48, 12, 0)


def test_the_last_row_of_a_rare_class_stays_in_training():
    for place in range(5):
        rows = [example(f"row {i}", int(i == place)) for i in range(5)]
        assert {e.label for e in make_task(SPEC, rows, TEST).train} == {0, 1}


@pytest.mark.parametrize(("longest", "less"), [(2, 0), (2, 1), (20, 0), (20, 1), (42, 0)])
def test_rows_longer_than_the_context_are_left_out_whatever_their_length_in_bytes(
    longest, less, tokenizer
):
    rows = [example("a " * n, n % 2) for n in range(1, 300, 7)]
    task = Task(SPEC, tuple(rows), tuple(rows[1:]), tuple(rows[:2]))
    lengths = [len(tokenizer(task.prompt(row)).input_ids) for row in rows]
    kept, said = within(task, tokenizer, lengths[longest] - less + SPARE)
    n_kept = longest + 1 - less
    assert (kept.train, kept.test) == (tuple(rows[:n_kept]), tuple(rows[1:n_kept]))
    assert (said == "") == (n_kept == len(rows))
    assert within(task, tokenizer, None) == (task, "")
    assert within(task, tokenizer, SPARE + 2) == (task, ""), "nothing would be left"
    assert within(task, tokenizer, lengths[0] + SPARE) == (task, ""), "one label would be left"


def test_apart_equals_comparing_all_pairs():
    rng = np.random.default_rng(3)
    words = ["aa", "bb", "cc", "dd"]
    rows = [example(" ".join(rng.choice(words, rng.integers(2, 9)))) for _ in range(120)]
    held = [example(" ".join(rng.choice(words, rng.integers(2, 9)))) for _ in range(40)]

    def clash(row, other):
        a, b = row.fields["text"], other.fields["text"]
        return (
            a == b
            or (is_long(b) and text_key(b) in text_key(a))
            or (is_long(a) and is_long(b) and text_key(a) in text_key(b))
        )

    assert apart(rows, held) == [
        row for row in rows if not any(clash(row, other) for other in held)
    ]


def test_the_count_is_printed_when_tasks_are_read(tmp_path, capsys):
    from icrouting.cli import loading

    folder = tmp_path / "sst2"
    folder.mkdir()
    for split, rows in (("train", [*TRAIN, TEST[0]]), ("test", TEST)):
        lines = [json.dumps({"text": row.fields["text"], "label": row.label}) for row in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    loading.load_tasks(["sst2"], str(tmp_path))
    assert "sst2 1" in capsys.readouterr().out


def comparisons(numbers=range(1, 12)):
    """Every comparison of two different numbers, and whether it holds."""
    rows = []
    for left in numbers:
        for right in numbers:
            if left != right:
                rows.append(example(f"{left} < {right}", int(left < right)))
                rows.append(example(f"{left} > {right}", int(left > right)))
    return rows


@pytest.mark.parametrize("form", ["{}", "the claim that {} is right or wrong"])
def test_rows_of_different_labels_that_differ_in_a_sign_are_no_repeats(form):
    rows = [example(form.format(row.fields["text"]), row.label) for row in comparisons()]
    held = [example(form.format("20 < 30"), 1)]
    task = make_task(SPEC, rows, held)
    assert task.n_dropped == 0
    assert len(task.train) + len(task.validation) == len(rows) == 220
    assert {row.label for row in task.validation} == {0, 1}


def test_a_training_row_of_another_label_than_the_test_row_it_resembles_stays():
    held = [example("3 < 5", 1), example("a row that says so , or not", 1)]
    other_texts = [example("3 > 5", 0), example("A row that says so, or not?", 0)]
    task = make_task(SPEC, [*other_texts, *TRAIN], held)
    assert {"3 > 5", "A row that says so, or not?"} <= set(texts(task.train + task.validation))
    assert task.n_dropped == 0


@pytest.mark.parametrize("label", [0, 1])
def test_the_same_text_is_left_out_whatever_its_label(label):
    held = [example("3 < 5", 1), example("this row has more than five words", 1)]
    known = ["3  <  5", "this row has more than five words", "has more than five words"]
    around = [f"and {known[1]} too"]
    task = make_task(SPEC, [*(example(text, label) for text in known + around), *TRAIN], held)
    assert task.n_dropped == 4
    assert not {*known, *around} & set(texts(task.train + task.validation))


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("polish", "Polish"),
        ("x = y", "x == y"),
        ("x+y", "x-y"),
        ("well.", "well?"),
        ("Is it true that 3 < 5", "Is it true that 3 < 51"),
        ("cafe", "cafe\N{COMBINING ACUTE ACCENT}"),
    ],
)
def test_what_tells_two_labels_apart_is_kept(text, other):
    held = [example(text, 0)]
    task = make_task(SPEC, [example(other, 1), *TRAIN], held)
    assert other in texts(task.train + task.validation)
    task = make_task(SPEC, [example(text, 0), example(other, 1), *TRAIN], TEST)
    assert {text, other} <= set(texts(task.train + task.validation))


def test_a_repeat_of_another_task_s_row_is_left_out_whatever_its_label():
    task = make_task(SPEC, [example("3 > 5", 0), *TRAIN], TEST, [example("3 < 5", 1)])
    assert task.n_dropped == 1


def test_what_is_left_out_comes_with_an_example(tmp_path, capsys):
    from icrouting.cli import loading

    again = example("Film number 3, is dull -- and so long!", 1)
    task = make_task(SPEC, [*TRAIN, TRAIN[5], again], TEST)
    assert task.dropped_example == (again, TRAIN[3])
    folder = tmp_path / "sst2"
    folder.mkdir()
    for split, rows in (("train", [*TRAIN, again]), ("test", TEST)):
        lines = [json.dumps({"text": row.fields["text"], "label": row.label}) for row in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    loading.load_tasks(["sst2"], str(tmp_path))
    shown = " ".join(capsys.readouterr().out.split())
    assert "'Film number 3, is dull -- and so long!' for 'film number 3 is dull and so" in shown
    assert "case, spacing and punctuation" in shown
