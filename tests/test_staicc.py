"""The pinned data sets: reading them safely, and splits that do not leak."""

import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from icrouting.runtime import wheels
from icrouting.tasks import catalogue, splits, staicc
from icrouting.tasks.task import Task, TaskSpec


class Evil:
    """Unpickled without care, it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def dump(folder: Path, name: str, rows: object) -> None:
    (folder / f"{catalogue.STAICC[name]}.dataset").write_bytes(pickle.dumps(rows))


def numbered_rows(n_rows: int, n_labels: int) -> list[tuple[list[str], int]]:
    return [([f" Item number {i} . "], i % n_labels) for i in range(n_rows)]


def keys_of(examples) -> list[str]:
    return [splits.text_key(example.fields["text"]) for example in examples]


def long_keys_of(task: Task) -> set[str]:
    texts = [example.fields["text"] for example in (*task.train, *task.test)]
    return {splits.text_key(text) for text in texts if splits.is_long(text)}


def count_inside(inner: set[str], outer: set[str]) -> int:
    """Number of inner keys within an outer one; slow and plain, unlike `inside`."""
    joined = "\n".join(sorted(outer))
    return sum(key in joined for key in inner)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that stands in for the wheel's."""
    monkeypatch.setattr(wheels, "fetch", lambda name: tmp_path)
    return tmp_path


@pytest.fixture
def reviews(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fifty sentences.

    They are whole in SST-5, rewritten in MR, and with two phrases and a short one in SST-2.
    """
    monkeypatch.setattr(staicc, "_N_TEST_SENTENCES", 10)
    monkeypatch.setattr(staicc, "_N_TRAIN_SENTENCES", 15)
    rng = np.random.default_rng(3)
    sentences = [[f"w{word}" for word in rng.integers(100, 1000, 13)] for _ in range(50)]
    whole = [" ".join(sentence) for sentence in sentences]
    dump(folder, "sst5", [([f"{text} ."], i % 5) for i, text in enumerate(whole)])
    dump(folder, "mr", [([f"{text.title()}!"], i % 2) for i, text in enumerate(whole)])
    cuts = [slice(0, 13), slice(0, 7), slice(6, 13), slice(2, 4)]
    phrases = [([" ".join(words[cut])], i % 2) for i, words in enumerate(sentences) for cut in cuts]
    dump(folder, "sst2", phrases)
    return folder


def test_pickle_with_code_is_refused_without_running_it(folder):
    dump(folder, "trec", [(["What is it ?"], Evil(folder / "made"))])
    with pytest.raises(ValueError, match=r"it asks for the code \w+\.mkdir"):
        staicc.read_task(catalogue.SPECS["trec"])
    assert not (folder / "made").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        pickle.dumps(numbered_rows(9, 2))[:-40],
        pickle.dumps(7),
        pickle.dumps([("abc", 0)]),
        pickle.dumps([(["a"], 0, 0)]),
        pickle.dumps([(["a"], "0")]),
        pickle.dumps([(["a"], True)]),
    ],
)
def test_damaged_file_is_named_in_a_one_line_error(folder, content):
    (folder / "trec.dataset").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"delete .* to fetch them anew; got trec\.dataset"
    ) as error:
        staicc.read_task(catalogue.SPECS["trec"])
    assert "\n" not in str(error.value)


def test_task_that_the_wheel_lacks_is_answered_with_those_it_holds():
    with pytest.raises(
        ValueError, match=r"holds agnews, .*emotion, got task 'csqa'.*csqa/train\.jsonl"
    ):
        staicc.read_task(catalogue.SPECS["csqa"])


def test_spec_with_another_field_is_refused(folder):
    dump(folder, "trec", numbered_rows(10, 2))
    with pytest.raises(ValueError, match="needs the fields"):
        staicc.read_task(TaskSpec("trec", "far", "{sentence}", ("a", "b")))


def test_fifth_of_the_rows_is_for_testing_and_texts_are_stripped(folder):
    dump(folder, "trec", numbered_rows(35, 6))
    task = staicc.read_task(catalogue.SPECS["trec"])
    assert (len(task.train), len(task.validation), len(task.test)) == (23, 5, 7)
    texts = {example.fields["text"] for example in task.train + task.validation + task.test}
    assert texts == {f"Item number {i} ." for i in range(35)}


@pytest.mark.slow
def test_splits_are_capped_for_agnews_higher(folder):
    dump(folder, "agnews", numbered_rows(14500, 4))
    dump(folder, "subj", numbered_rows(14500, 2))
    agnews, subj = (staicc.read_task(catalogue.SPECS[name]) for name in ("agnews", "subj"))
    assert (len(agnews.train), len(agnews.validation), len(agnews.test)) == (11900, 100, 2000)
    assert (len(subj.train), len(subj.validation), len(subj.test)) == (5900, 100, 2000)


def test_repeated_texts_are_kept_once_and_not_at_all_where_labels_differ(folder):
    repeated = [
        (["One, two"], 1),
        (["one TWO!"], 1),
        (["three"], 0),
        (["Three."], 1),
        ([" . "], 0),
        ([""], 0),
    ]
    dump(folder, "subj", [*repeated, *numbered_rows(9, 2)])
    task = staicc.read_task(catalogue.SPECS["subj"])
    texts = {example.fields["text"] for example in task.train + task.validation + task.test}
    assert {text for text in texts if "number" not in text} == {"One, two"}


def test_keys_ignore_brackets_of_the_treebank_and_encodings():
    assert (
        splits.text_key("A -LRB- fine -RRB- cliché .")
        == splits.text_key("a (fine) clich\u00c3\u00a9")
        == "afineclich"
    )


@pytest.mark.parametrize("seed", range(5))
def test_containment_agrees_with_comparing_all_pairs(seed):
    rng = np.random.default_rng(seed)
    inner, outer = (
        ["".join(rng.choice(list("ab"), rng.integers(shortest, 13))) for _ in range(n_keys)]
        for shortest, n_keys in ((1 + seed, 31), (1, 23))
    )
    assert splits.inside(inner, outer) == [
        {i for i, key in enumerate(inner) if key in text} for text in outer
    ]


def test_nothing_lies_inside_when_there_is_nothing_to_look_for():
    assert splits.inside([], ["text"]) == [set()]


def test_sentences_of_sst2_are_tested_whole_and_trained_on_with_their_phrases(reviews):
    task = staicc.read_task(catalogue.SPECS["sst2"])
    assert {len(example.fields["text"].split()) for example in task.test} == {13}
    assert task.n_dropped > 0, "phrases of the sentences that validation took"
    lengths = Counter(
        len(example.fields["text"].split()) for example in task.train + task.validation
    )
    assert lengths.keys() == {13, 7}
    assert lengths.total() + task.n_dropped == 45
    assert len(task.test) == 10


def test_review_sets_share_no_long_text_with_sst2(reviews):
    tasks = {name: staicc.read_task(catalogue.SPECS[name]) for name in ("sst2", "mr", "sst5")}
    assert all(_n_rows(tasks[name]) == 25 for name in ("mr", "sst5"))
    sst2 = long_keys_of(tasks["sst2"])
    for name in ("mr", "sst5"):
        assert not count_inside(sst2, long_keys_of(tasks[name]))
        assert not count_inside(long_keys_of(tasks[name]), sst2)
    test, train = set(keys_of(tasks["sst2"].test)), set(keys_of(tasks["sst2"].train))
    assert not count_inside(train, test)
    assert not count_inside(test, train)


def _n_rows(task):
    return len(task.train) + len(task.validation) + len(task.test) + task.n_dropped


def test_row_inside_a_row_of_sst2_is_dropped_only_if_long(reviews):
    dealt = staicc.read_task(catalogue.SPECS["sst2"]).test[0].fields["text"].split()
    dump(
        reviews,
        "mr",
        [([" ".join(dealt[3:9])], 0), ([" ".join(dealt[3:6])], 1), *numbered_rows(9, 2)],
    )
    task = staicc.read_task(catalogue.SPECS["mr"])
    texts = {example.fields["text"] for example in task.train + task.validation + task.test}
    assert {text for text in texts if "number" not in text} == {" ".join(dealt[3:6])}


@pytest.mark.pinned
def test_every_label_of_the_pinned_sets_is_in_both_splits(pinned_tasks):
    for name, task in pinned_tasks.items():
        for rows in (task.train, task.test):
            assert set(Counter(row.label for row in rows)) == set(range(len(task.spec.options))), (
                name
            )


@pytest.mark.pinned
def test_splits_of_the_pinned_sets_share_no_text(pinned_tasks):
    for name, task in pinned_tasks.items():
        keys = keys_of(task.train) + keys_of(task.test)
        assert len(set(keys)) == len(keys), name


@pytest.mark.pinned
@pytest.mark.parametrize("name", ["mr", "sst5"])
def test_pinned_sst2_shares_no_long_text_with_the_other_reviews(pinned_tasks, name):
    sst2, other = long_keys_of(pinned_tasks["sst2"]), long_keys_of(pinned_tasks[name])
    assert not count_inside(sst2, other)
    assert not count_inside(other, sst2)


@pytest.mark.pinned
def test_no_row_of_pinned_sst2_lies_inside_a_row_of_its_other_split(pinned_tasks):
    train, test = (
        set(keys_of(rows)) for rows in (pinned_tasks["sst2"].train, pinned_tasks["sst2"].test)
    )
    assert not count_inside(train, test)
    assert not count_inside(test, train)


@pytest.mark.pinned
@pytest.mark.parametrize("name", ["sst2", "trec"])
def test_pinned_sets_read_the_same_twice(pinned_tasks, name):
    assert staicc.read_task(catalogue.SPECS[name]) == pinned_tasks[name]


@pytest.mark.pinned
@pytest.mark.parametrize(
    ("name", "start", "label"),
    [
        ("agnews", "Hamm sets sights on golden finale", "Sports"),
        ("trec", "What river is Pocahontas buried along", "Location"),
        ("sst5", "the title , alone , should scare any sane person away", "terrible"),
        ("subj", "although she came back to the house", "objective"),
        ("emotion", "@user happy birthday :) have a blessed day", "joy"),
    ],
)
def test_labels_of_the_pinned_sets_are_in_the_order_of_the_catalogue(
    pinned_rows, name, start, label
):
    starting = [row for row in pinned_rows[name] if row.fields["text"].startswith(start)]
    assert [catalogue.SPECS[name].options[row.label] for row in starting] == [label]
