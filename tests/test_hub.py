"""The hub's datasets, read from a local stand-in: files of the same names and columns."""

import json

import datasets
import pytest

from icrouting.tasks import hub
from icrouting.tasks.catalogue import HUB, PAPER_TASKS, SPECS
from icrouting.tasks.load import load_task


def rows_of(name, split, n=12):
    """Rows with the columns that the hub's set has, and what must come of the first one.

    That is (prompt's part, answer).
    """
    words = [f"{name} {split} row {i} with words of its own {i * 7}" for i in range(n)]
    labels = [i % 2 for i in range(n)]
    pair = {"choices": {"label": ["A", "B", "C", "D", "E"], "text": ["u", "v", "x", "y", "z"]}}
    columns = {
        "sst2": lambda i: {"idx": i, "sentence": words[i], "label": labels[i]},
        "trec": lambda i: {"text": words[i], "coarse_label": labels[i], "fine_label": 40},
        "csqa": lambda i: {
            "id": "x",
            "question": words[i],
            "question_concept": "c",
            **pair,
            "answerKey": "AB"[labels[i]],
        },
        "piqa": lambda i: {"goal": words[i], "sol1": "one", "sol2": "two", "label": labels[i]},
        "sst5": lambda i: {"text": words[i], "label": labels[i], "label_text": "bad"},
        "mrpc": lambda i: {
            "sentence1": words[i],
            "sentence2": "other",
            "label": labels[i],
            "idx": i,
        },
        "cb": lambda i: {"premise": words[i], "hypothesis": "so", "idx": i, "label": labels[i]},
        "copa": lambda i: {
            **{"premise": words[i], "choice1": "one", "choice2": "two", "idx": i},
            **{"question": ("cause", "effect")[i % 2], "label": labels[i]},
        },
        "creak": lambda i: {
            "ex_id": "x",
            "sentence": words[i],
            "explanation": "e",
            "label": ("false", "true")[labels[i]],
        },
    }
    return [
        columns.get(name, lambda i: {"text": words[i], "label": labels[i]})(i) for i in range(n)
    ]


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    datasets.disable_progress_bars()
    for name, source in HUB.items():
        for split, files in (("train", source["train"]), ("test", source["test"])):
            file = folder / source["repo"] / files.replace("*", "0000")
            file.parent.mkdir(parents=True, exist_ok=True)
            rows = rows_of(name, split)
            if file.suffix == ".parquet":
                datasets.Dataset.from_list(rows).to_parquet(str(file))
            else:
                file.write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", HUB)
def test_every_set_of_the_hub_maps_to_our_rows(mirror, name):
    task = load_task(name, f"hub:{mirror}")
    assert len(task.train) + len(task.validation) == len(task.test) == 12
    assert {example.label for example in task.test} == {0, 1}
    for example in task.test:
        prompt = task.prompt(example)
        number = int(prompt.split(" row ")[1].split()[0])
        assert f"{name} test row {number} with words" in prompt
        assert example.label == number % 2
        if name == "csqa":
            assert example.choices == ("u", "v", "x", "y", "z")
        if name == "copa":
            assert ("What was the cause of this?" in prompt) == (number % 2 == 0)
        if name in ("copa", "piqa"):
            assert example.choices == ("one", "two")


def test_all_tasks_of_the_paper_but_one_have_a_set():
    assert set(PAPER_TASKS) - set(HUB) == {"ai2scie"}
    with pytest.raises(ValueError, match="task 'ai2scie' has no dataset id"):
        load_task("ai2scie", "hub")


def test_phrases_of_mr_and_sst5_tests_are_left_out_of_sst2(mirror, monkeypatch):
    taken, whole = hub._read(SPECS["mr"], "test", mirror)[3], hub._read

    def read(spec, split, place):
        found = whole(spec, split, place)
        return (
            [*found, type(taken)(taken.fields, (), 1)]
            if (spec.name, split) == ("sst2", "train")
            else found
        )

    monkeypatch.setattr(hub, "_read", read)
    task = load_task("sst2", f"hub:{mirror}")
    assert taken.fields["text"] not in {e.fields["text"] for e in (*task.train, *task.validation)}
    assert len(task.train) + len(task.validation) == 12


def test_other_columns_and_a_missing_set_are_named(mirror, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"task 'sst2': cannot read default/train.* of the dataset 'stanfordnlp/sst2'",
    ):
        load_task("sst2", f"hub:{tmp_path}")
    source = HUB["mr"]
    for files in (source["train"], source["test"]):
        file = tmp_path / source["repo"] / files.replace("*", "0000")
        file.parent.mkdir(parents=True)
        datasets.Dataset.from_list([{"review": "x", "label": 1}]).to_parquet(str(file))
    with pytest.raises(
        ValueError, match=r"rotten_tomatoes' has other columns: task 'mr' needs .* missing here"
    ):
        load_task("mr", f"hub:{tmp_path}")


def test_the_hub_is_asked_for_the_pinned_revision(monkeypatch):
    asked = []

    def load_dataset(kind, data_files, split):
        asked.append((kind, data_files, split))
        raise ConnectionError("no network here")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("creak", "agnews"):
        with pytest.raises(ValueError, match="no network here"):
            load_task(name, "hub")
    assert asked == [
        (
            "json",
            "hf://datasets/amydeng2000/CREAK@3600013a4e003d07bfd692e1d156bcc3a6333421/train.json",
            "train",
        ),
        (
            "parquet",
            "hf://datasets/fancyzhx/ag_news@refs%2Fconvert%2Fparquet/default/train/*.parquet",
            "train",
        ),
    ]
