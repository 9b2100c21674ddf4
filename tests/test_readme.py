"""The README's examples run and its table is the committed run's."""

import dataclasses
import json
import re
import sys
import textwrap
from pathlib import Path

import pytest

from icrouting.tasks import staicc
from pinned import fetch_or_skip

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def snippets(page):
    """The blocks of Python on a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.pinned
def test_the_ten_lines_print_what_the_readme_shows(monkeypatch, capsys):
    fetch_or_skip("smollm2-135m", "minilm")
    monkeypatch.chdir(ROOT)
    (code,) = snippets("README.md")
    (shown,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out == shown


@pytest.mark.pinned
def test_the_first_router_is_fitted_as_its_page_says(tmp_path, monkeypatch, pinned_tasks):
    fetch_or_skip("smollm2-135m", "minilm")
    # Other tests check that the sets read the same each time; to read three takes ten seconds.
    monkeypatch.setattr(staicc, "read_task", lambda spec: pinned_tasks[spec.name])
    monkeypatch.chdir(tmp_path)
    # The same lines, on fewer prompts and queries.
    code, n_changes = re.subn(
        r"n_prompts=40, n_queries=400",
        "n_prompts=4, n_queries=16, epochs=1",
        snippets("docs/first-router.md")[0],
    )
    assert n_changes == 1
    names: dict = {}
    exec(code, names)
    assert names["scores"].shape == (2, 2)
    assert names["tokens"].shape[0] == 2
    assert (tmp_path / "my-router" / "README.md").exists()
    names["tasks"] = [dataclasses.replace(task, train=task.train[:26]) for task in names["tasks"]]
    (gate,) = [code for code in snippets("docs/predict.md") if "icr-gated" in code]
    exec(gate, names)
    assert names["scores"].shape == (2, 2)


def test_a_task_spec_reads_as_the_page_of_tasks_says(tmp_path):
    from icrouting import load_task

    names: dict = {}
    (code,) = [code for code in snippets("docs/tasks.md") if "TaskSpec(" in code]
    exec(textwrap.dedent(code), names)
    (tmp_path / "tickets").mkdir()
    for split in ("train", "test"):
        rows = [
            (f"the screen of the {split} is dark", 1),
            (f"I lost the password of the {split}", 0),
        ]
        lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
        (tmp_path / "tickets" / f"{split}.jsonl").write_text("\n".join(lines))
    task = load_task(names["spec"], data=tmp_path)
    assert task.prompt(task.test[0]) == "Ticket: the screen of the test is dark\nTeam:"
    assert task.answer(task.test[0]) == "Hardware"


def test_tables_are_those_of_the_committed_runs():
    import sys

    sys.path.append(str(ROOT / "docs"))
    import results

    for file, text in results.pages().items():
        assert file.read_text() == text, "run python docs/results.py"
    in_folder = set((ROOT / "docs" / "results").glob("*.md"))
    assert in_folder == results.pages().keys() - {ROOT / "docs" / "results.md"}


def test_the_tables_of_readme_and_who_wins_are_those_of_the_committed_records():
    sys.path.append(str(ROOT / "docs"))
    import tables

    for page, by_name in tables.TABLES.items():
        text = (ROOT / page).read_text()
        assert tables.with_tables(text, by_name) == text, "run python docs/tables.py"


def test_the_sentences_of_readme_and_who_wins_name_the_leads_on_record():
    sys.path.append(str(ROOT / "docs"))
    import tables

    for page in tables.CITED:
        text = " ".join((ROOT / page).read_text().split())
        assert not [sentence for sentence in tables.cited(page) if sentence not in text]


def test_the_readme_has_at_most_130_lines_and_its_table_six_columns():
    lines = README.splitlines()
    assert len(lines) <= 130
    assert max(line.count("|") - 1 for line in lines if line.startswith("|")) <= 6


def test_who_wins_is_ten_sentences_of_at_most_25_words():
    items = re.findall(r"^\d+\. (.*)$", (ROOT / "docs" / "who-wins.md").read_text(), re.MULTILINE)
    assert len(items) == 10
    assert max(len(item.split()) for item in items) <= 25


def test_the_pictures_of_gains_are_drawn_from_the_committed_runs():
    sys.path.append(str(ROOT / "docs"))
    import gains

    assert set(gains.drawn()) == {gains.digest()}, "run python docs/gains.py"


def test_the_picture_of_who_wins_is_drawn_from_the_committed_runs():
    sys.path.append(str(ROOT / "docs"))
    import who_wins

    assert who_wins.drawn() == who_wins.digest(), "run python docs/who_wins.py"
    lines = who_wins.gains().set_index(["mark", "run", "name", "method"]).gain
    assert lines.index.is_unique
    assert {mark for mark, *_ in lines.index} == set(who_wins.KINDS)


def test_every_wing_and_every_room_of_its_own_is_in_the_file_map():
    package = ROOT / "src" / "icrouting"
    wings = {f"{file.parent.name}/" for file in package.glob("*/__init__.py")}
    rooms = {file.name for file in package.glob("*.py")} - {"__init__.py"}
    pages = README + (ROOT / "CONTRIBUTING.md").read_text()
    assert wings | rooms <= set(re.findall(r"`([\w.]+/?)`", pages))


def test_contributing_names_every_room_of_a_wing():
    """But for methods, of which each is a room of its name."""
    lines = (ROOT / "CONTRIBUTING.md").read_text().splitlines()
    for wing in (ROOT / "src" / "icrouting").glob("*/__init__.py"):
        if wing.parent.name == "methods":
            continue
        (line,) = [line for line in lines if line.startswith(f"| `{wing.parent.name}/`")]
        rooms = {file.stem for file in wing.parent.glob("*.py") if not file.stem.startswith("__")}
        assert rooms <= set(re.findall(r"\w+", line.split("|")[3])), wing.parent.name


def test_the_picture_of_the_ladder_is_drawn_from_the_committed_records():
    sys.path.append(str(ROOT / "docs"))
    import ladder

    assert ladder.drawn() == ladder.digest(), "run python docs/ladder.py"


def test_the_page_of_ablations_is_made_from_the_committed_sweeps():
    sys.path.append(str(ROOT / "docs"))
    import ablations

    page = (ROOT / "docs" / "ablations.md").read_text()
    assert page == ablations.page(), "run python docs/ablations.py"
    for model, by_preset in ablations.verdicts().items():
        for preset in by_preset:
            copied = ablations.PICTURES / ablations.picture_name(model, preset)
            original = ablations.SWEEPS / model / preset / "sweep.svg"
            assert copied.read_bytes() == original.read_bytes()
    assert ablations.verdicts()


def test_what_is_said_of_an_ablation_is_in_its_table():
    sys.path.append(str(ROOT / "docs"))
    import ablations

    for model, by_preset in ablations.verdicts().items():
        for preset, read in by_preset.items():
            table = "\n".join(ablations.table_of(ablations.SWEEPS / model / preset / "sweep.md"))
            said = re.findall(r"\(?[+\N{MINUS SIGN}]\d+\.\d\b", read["here"] + read["verdict"])
            assert said, preset
            assert not [number for number in said if number.strip("(") not in table], preset


def test_the_picture_of_unseen_tasks_is_drawn_from_the_committed_records():
    sys.path.append(str(ROOT / "docs"))
    import unseen

    assert unseen.drawn() == unseen.digest(), "run python docs/unseen.py"
