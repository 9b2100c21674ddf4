import pytest

from fake_run import fake_config, fake_records
from icrouting.cli import main
from icrouting.evaluation import records
from icrouting.evaluation.runs import command
from icrouting.report import leads
from icrouting.runtime.storage import load_json, save_json

GROUPS = (
    "source tasks",
    "unseen tasks",
    "all tasks",
    "unseen tasks but mr",
    "all tasks but mr",
)


@pytest.fixture
def runs(tmp_path):
    """Folders: `a` and `b` asked the same rows, `c` other rows."""
    shares_by_folder = {
        "a": {"icr": 0.5, "zero-shot": 0.2},
        "b": {"icv": 0.3},
        "c": {"icv": 0.3},
    }
    for folder, shares in shares_by_folder.items():
        (tmp_path / folder).mkdir()
        rows = "2" if folder == "c" else "1"
        config = fake_config(rows=rows, task_rows=rows)
        accuracies = {
            (method, task["name"]): share
            for method, share in shares.items()
            for task in config["tasks"]
        }
        records.append(tmp_path / folder / "records.jsonl", fake_records(accuracies))
        save_json(tmp_path / folder / "config.json", config)
    return tmp_path


def failure(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main.main(["report", *map(str, arguments)])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_leads_pair_the_records_of_two_runs_and_refuse_runs_of_other_rows(runs):
    found = leads.leads([runs / "a", runs / "b"], ["icv/icr", "icr/zero-shot"], ["mr"])
    assert {key: lead["value"] for key, lead in found.items()} == {
        **{f"icv over icr, {group}": -20.0 for group in GROUPS},
        **{f"icr over zero-shot, {group}": 30.0 for group in GROUPS},
    }
    assert found["icv over icr, all tasks"]["by seed"] == [-20.0, -20.0]
    with pytest.raises(ValueError, match="differ in rows"):
        leads.leads([runs / "a", runs / "c"], ["icv/icr"])


def test_the_command_prints_leads_and_writes_them_to_a_file(runs, capsys):
    out = runs / "new" / "leads.json"
    pair = ["--leads", "icv/icr", "--without", "mr", "--out", str(out)]
    main.main(["report", str(runs / "a"), str(runs / "b"), *pair])
    shown = capsys.readouterr().out
    content = load_json(out)
    assert content["command"] == command()
    assert content["commit"]
    assert content["leads"] == leads.leads([runs / "a", runs / "b"], ["icv/icr"], ["mr"])
    assert list(content["leads"]) == [f"icv over icr, {group}" for group in GROUPS]
    assert "icv over icr, all tasks but mr: -20.0 (" in shown


def test_leads_without_pairs_are_those_of_every_method_over_zero_shot(runs, capsys):
    main.main(["report", str(runs / "a"), str(runs / "b"), "--leads"])
    shown = capsys.readouterr().out
    assert "icr over zero-shot, all tasks: +30.0 (" in shown
    assert "icv over zero-shot, all tasks: +10.0 (" in shown
    assert "zero-shot over" not in shown


def test_a_group_of_left_out_tasks_alone_is_not_told():
    roles = {"agnews": "source", "mr": "unseen", "cb": "unseen"}
    groups = leads.task_groups(roles, ["mr", "cb"])
    assert list(groups) == ["source tasks", "unseen tasks", "all tasks", "all tasks but mr and cb"]
    assert groups["all tasks but mr and cb"] == ["agnews"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "give a run's folder"),
        ("{a} {b}", "add --leads"),
        ("{a} {c} --leads icv/icr", "differ in rows (1, 2)"),
        ("{a} {b} --leads icv", "expected METHOD/METHOD"),
        ("{a} --leads icv/icr", "unknown method 'icv'"),
        ("{a} --leads --without imdb", "unknown task 'imdb'"),
        ("{a} --leads --out {a}/config.json", "config.json exists already"),
        ("{a} --leads --card {b}", "--leads goes with none of"),
        ("{a} --without mr", "options of --leads"),
        ("{a} --out {a}/leads.json", "options of --leads"),
        ("{a}/nowhere --leads", "config.json"),
    ],
)
def test_a_mistake_in_asking_for_leads_is_one_line_and_exit_code_two(
    arguments, message, runs, capsys
):
    folders = {name: runs / name for name in "abc"}
    words = [word.format(**folders) for word in arguments.split()]
    assert message in failure(capsys, *words)


def test_a_group_says_how_many_of_its_tasks_both_have_answered_and_one_without_any_is_left_out(
    runs,
):
    (runs / "d").mkdir()
    config = fake_config()
    sources = [task["name"] for task in config["tasks"] if task["role"] == "source"]
    accuracies = {("few-shot", name): 0.7 for name in sources}
    records.append(runs / "d" / "records.jsonl", fake_records(accuracies))
    save_json(runs / "d" / "config.json", fake_config(rows="1", task_rows="1"))
    points = leads.leads([runs / "a", runs / "d"], ["few-shot/icr"])
    assert set(points) == {"few-shot over icr, source tasks", "few-shot over icr, all tasks"}
    assert points["few-shot over icr, all tasks"]["value"] == 20.0
    line = leads.in_words("few-shot over icr, all tasks", points["few-shot over icr, all tasks"])
    assert f"{len(sources)} of {len(config['tasks'])} tasks" in line
