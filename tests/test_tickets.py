"""The example of the support tickets: its rows, its task file and its notebook."""

import csv
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

import tiny
from icrouting import load_task

FOLDER = Path(__file__).parents[1] / "examples" / "tickets"


def test_there_are_thirty_different_tickets_for_each_team():
    with open(FOLDER / "tickets.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert Counter(row["team"] for row in rows) == dict.fromkeys(
        ("Access", "Billing", "Hardware", "Network"), 30
    )
    assert len({row["text"] for row in rows}) == 120


def test_the_task_file_holds_back_three_tickets_in_ten_of_every_team():
    task = load_task(str(FOLDER / "tickets.toml"), data="")
    assert Counter(task.answer(row) for row in task.test) == dict.fromkeys(task.spec.options, 9)
    assert len(task.train) + len(task.validation) == 84
    # None repeats another, so all are learned from.
    assert task.n_dropped == 0


def tokenizer_of_teams():
    """A tokenizer for the tiny models to which the teams' names are no bare spaces."""
    teams = ("Access", "Billing", "Hardware", "Network")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [f"Team: {team}\n" for team in teams] * 9,
        vocab_size=tiny.VOCAB,
        show_progress=False,
        special_tokens=["<eos>", "<pad>"],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


@pytest.mark.slow
def test_the_notebook_runs_on_a_tiny_model(tmp_path, monkeypatch):
    tiny.model("llama").save_pretrained(tmp_path / "model")
    tokenizer_of_teams().save_pretrained(tmp_path / "model")
    (tmp_path / "tickets.csv").write_bytes((FOLDER / "tickets.csv").read_bytes())
    monkeypatch.chdir(tmp_path)
    code = (FOLDER / "notebook.py").read_text()
    # The same cells, on another model and two methods.
    for old, new in {
        "pinned:smollm2-135m": "model",
        "pinned:minilm": "hidden",
        "minutes=10": 'minutes=10, methods=["probe-hidden"]',
    }.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    names: dict = {}
    exec(code, names)
    assert "36 held-back rows" in names["found"].answer
    assert set(names["predictions"].label) <= {"Access", "Billing", "Hardware", "Network"}
    assert (tmp_path / "runs" / "notebook" / "compare.md").exists()


def test_the_readmes_commands_name_what_is_there():
    text = (FOLDER / "README.md").read_text()
    commands = [line for line in text.splitlines() if line.startswith("icr ")]
    assert [line.split()[1] for line in commands] == [
        "compare",
        "compare",
        "fit",
        "eval",
        "predict",
        "predict",
    ]
    for line in commands:
        for word in line.split():
            if word.startswith("examples/"):
                assert (FOLDER.parents[1] / word).exists()
