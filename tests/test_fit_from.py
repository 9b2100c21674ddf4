"""`icr fit --from`: a router goes on with new tasks, by name and from the command line."""

import shutil

import pytest

from icrouting.cli import main
from icrouting.icr import InContextRouter

# Enough to have a router, and no more.
FEW = "--n-queries 9 --epochs 1 --min-steps 0 --patience 0 --check 0"


@pytest.fixture
def run(world, encoder_folder, tmp_path, capsys, monkeypatch):
    """Runs `icr fit --from` on the world's router; returns what it said."""
    monkeypatch.setattr(
        "icrouting.fitting.stages.extract", lambda *args: pytest.fail("extracted again")
    )

    def went(*more, model=True, tasks="mr", out="new", data=None):
        arguments = ["fit", "--out", str(tmp_path / out), "--from", str(world / "router")]
        arguments += ["--data", str(data or world / "data"), "--tasks", *tasks.split()]
        arguments += FEW.split()
        arguments += more
        if model:
            arguments += ["--model", str(world / "model")]
        main.main(arguments)
        return " ".join(capsys.readouterr().out.split())

    return went


def failed(capsys, run, *more, **settings):
    with pytest.raises(SystemExit) as ended:
        run(*more, **settings)
    assert ended.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_a_router_goes_on_with_a_new_task_and_the_model_it_names(run, world, tmp_path):
    said = run(model=False)
    assert "its PIDs are kept (layers 2 to 4, rank 2), nothing is extracted; new: mr" in said
    icr = InContextRouter.from_pretrained(tmp_path / "new")
    assert list(icr.description.tasks) == ["sst2", "mr"]
    assert icr.description.origin.weights == (
        InContextRouter.from_pretrained(world / "router").digest()
    )


def test_what_is_finished_is_not_repeated_and_another_one_is_refused(run, capsys):
    run()
    assert "holds this router already" in run()
    assert "router of other settings or data" in failed(capsys, run, "--keep", "3")


def test_known_tasks_are_rehearsed_by_name(run, tmp_path):
    said = run("--keep", "3")
    assert "trained on again: 3 rows of sst2" in said
    icr = InContextRouter.from_pretrained(tmp_path / "new")
    assert icr.description.origin.rehearsed == {"sst2": 3}


def test_rows_that_cannot_be_found_are_named(run, world, tmp_path, capsys):
    shutil.copytree(world / "data" / "mr", tmp_path / "data" / "mr")
    said = failed(capsys, run, "--keep", "3", data=tmp_path / "data")
    assert "--keep needs the rows of 'sst2'" in said
    assert "leave --keep out" in said


def test_a_task_that_is_known_already_is_refused_without_keep(run, capsys):
    assert "fitted on sst2 already: say with `keep` (--keep)" in failed(
        capsys, run, tasks="sst2 mr"
    )


def test_a_contradiction_names_both(run, capsys):
    said = failed(capsys, run, "--rank", "3")
    assert "rank is 2 in the router to start from and 3 in this fit" in said


def test_keep_without_a_router_is_refused(world, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main.main(["fit", "--out", str(tmp_path / "x"), "--keep", "3"])
    assert "--keep 3 is of the tasks of a router: name it with --from" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_dry_run_counts_no_prompts(run):
    said = run("--dry-run", "--keep", "3")
    assert "nothing is extracted" in said
    assert "moments" not in said.replace("moments and PCA", "")
    assert "extraction 0:00:00" in said


def test_a_router_does_not_go_on_over_itself(run, world, capsys, tmp_path):
    shutil.copytree(world / "router", tmp_path / "new")
    before = (tmp_path / "new" / "model.safetensors").read_bytes()
    assert "router of other settings or data" in failed(capsys, run)
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == before
