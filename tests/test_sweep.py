"""`icr sweep`: as separate fits and evaluations, what they have in common computed once."""

import json
import shutil

import pytest

from children import finish, start
from commands import on
from icrouting.cli import main
from icrouting.cli import sweep as room
from icrouting.evaluation import records
from icrouting.evaluation.evaluate import Evaluation
from icrouting.fitting import extraction, trunk
from icrouting.fitting.training import Trainer
from icrouting.icr import InContextRouter

pytestmark = pytest.mark.slow

FIT = (
    "--n-prompts 9 --demos-per-class 1 --n-queries 9 --epochs 1 --hidden-width 5 --min-steps 0 "
    "--patience 0 --lr 0.3"
)


def sweep(world, encoder_folder, out, *words):
    where = [*on(world), "--encoder", str(encoder_folder), "--out", str(out)]
    how = [*FIT.split(), "--sources", "sst2", "--tasks", "sst2", "mr", "--n-test", "7"]
    main.main(["sweep", *words, *where, *how])


@pytest.fixture(scope="module")
def counts():
    """How often stages ran and prompts were scored, while a sweep of the module was made."""
    return {"extraction": 0, "trunk": 0}


@pytest.fixture(scope="module")
def swept(world, encoder_folder, tmp_path_factory, counts):
    """A sweep of two ranks."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    capture, fill = extraction.capture_last_tokens, trunk._fill

    def counted_capture(*args, **kwargs):
        counts["extraction"] += 1
        return capture(*args, **kwargs)

    def counted_fill(*args):
        counts["trunk"] += 1
        return fill(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction, "capture_last_tokens", counted_capture)
        patch.setattr(trunk, "_fill", counted_fill)
        sweep(world, encoder_folder, out, "rank=2,3")
    return out


@pytest.fixture(scope="module")
def apart(world, encoder_folder, tmp_path_factory, counts, swept):
    """The folder of a router of each rank, and of its run, by the words that users know."""
    base = tmp_path_factory.mktemp("apart")
    for rank in ("2", "3"):
        how = [*FIT.split(), "--rank", rank, "--encoder", str(encoder_folder), "--check", "0"]
        main.main(["fit", *on(world), *how, "--tasks", "sst2", "--out", str(base / rank)])
        how = [
            "--tasks",
            "sst2",
            "mr",
            "--methods",
            "zero-shot",
            "icr",
            "--seeds",
            "0",
            "--n-test",
            "7",
        ]
        router = ["--router", str(base / rank), "--out", str(base / f"run{rank}")]
        main.main(["eval", *on(world), *how, *router, "--n-test", "7"])
    return base


def logits_of(run, method):
    return {
        (record.task, record.seed, record.index): record.option_logits
        for record in records.read(run / "records.jsonl")
        if record.method == method
    }


def answers_of(run):
    return [(record.key, record.option_logits) for record in records.read(run / "records.jsonl")]


@pytest.mark.parametrize("rank", ["2", "3"])
def test_a_sweep_is_as_separate_fits_and_evaluations(rank, swept, apart):
    router = InContextRouter.from_pretrained(swept / "fits" / f"rank={rank}")
    assert router.digest() == InContextRouter.from_pretrained(apart / rank).digest()
    run = apart / f"run{rank}"
    assert logits_of(swept / "run", f"rank={rank}") == logits_of(run, "icr")
    assert logits_of(swept / "run", "zero-shot") == logits_of(run, "zero-shot")


def test_the_two_ranks_differ(swept):
    assert logits_of(swept / "run", "rank=2") != logits_of(swept / "run", "rank=3")


def test_what_does_not_depend_on_the_axis_ran_once(swept, counts):
    assert counts["trunk"] == 1
    # A batch of nine prompts.
    assert counts["extraction"] == 1


def test_a_sweep_ends_in_a_table_and_a_picture(swept):
    content = json.loads((swept / "sweep.json").read_text())
    assert content["axes"] == {"rank": ["2", "3"]}
    assert content["reference"] == "rank=2"
    assert content["groups"]["unseen"] == ["mr"]
    assert {line["name"] for line in content["lines"]} == {"rank=2", "rank=3", "zero-shot"}
    assert "| rank=2 (reference) |" in (swept / "sweep.md").read_text()
    assert (swept / "sweep.csv").read_text().startswith("name,kind,group,")
    assert "<svg" in (swept / "sweep.svg").read_text()
    config = json.loads((swept / "run" / "config.json").read_text())
    assert list(config["routers"]) == ["rank=2", "rank=3"]


def test_a_finished_sweep_computes_nothing_and_takes_further_values(
    world, encoder_folder, swept, tmp_path, monkeypatch
):
    out = shutil.copytree(swept, tmp_path / "out")
    before = answers_of(out / "run")
    fitted = []
    init = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: fitted.append(self.config.rank) or init(self))
    monkeypatch.setattr(extraction, "extract", lambda *_: pytest.fail("extracted anew"))
    sweep(world, encoder_folder, out, "rank=2,3")
    assert not fitted
    assert answers_of(out / "run") == before
    sweep(world, encoder_folder, out, "rank=2,3,4")
    assert fitted == [4]
    assert answers_of(out / "run")[: len(before)] == before
    assert json.loads((out / "sweep.json").read_text())["axes"] == {"rank": ["2", "3", "4"]}


@pytest.mark.parametrize("place", ["fit", "evaluation"])
def test_a_sweep_that_is_killed_goes_on_to_the_same_end(
    place, world, encoder_folder, swept, tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        train, answer, calls = Trainer.run, Evaluation._answer, []

        def run(self):
            calls.append("fit")
            if place == "fit" and calls == ["fit", "fit"]:
                raise Killed
            return train(self)

        def answered(self, *args):
            calls.append("evaluation")
            if place == "evaluation" and calls.count("evaluation") == 3:
                raise Killed
            return answer(self, *args)

        patch.setattr(Trainer, "run", run)
        patch.setattr(Evaluation, "_answer", answered)
        with pytest.raises(Killed):
            sweep(world, encoder_folder, out, "rank=2,3")
    assert not (out / "sweep.json").exists()
    monkeypatch.setattr(extraction, "extract", lambda *_: pytest.fail("extracted anew"))
    sweep(world, encoder_folder, out, "rank=2,3")
    assert sorted(answers_of(out / "run")) == sorted(answers_of(swept / "run"))


def test_strength_needs_one_fit_and_at_nothing_is_zero_shot(world, encoder_folder, tmp_path):
    out = tmp_path / "out"
    sweep(world, encoder_folder, out, "strength=0,0.5,1", "--rank", "2")
    assert [folder.name for folder in (out / "fits").iterdir()] == ["as usual"]
    run = out / "run"
    assert logits_of(run, "strength=0") == logits_of(run, "zero-shot")
    assert logits_of(run, "strength=0.5") != logits_of(run, "strength=1")
    routers = json.loads((run / "config.json").read_text())["routers"]
    assert routers["strength=0.5"] == f"{routers['strength=1']} at strength 0.5"


def test_sources_may_be_an_axis(world, encoder_folder, tmp_path):
    where = [*on(world), "--encoder", str(encoder_folder), "--out", str(tmp_path / "out")]
    how = ["--rank", "2", "--sources", "sst2", "mr", "--tasks", "sst2", "mr", "--n-test", "5"]
    main.main(["sweep", "sources=1,2", *where, *FIT.split(), *how])
    config = json.loads((tmp_path / "out" / "run" / "config.json").read_text())
    assert {task["role"] for task in config["tasks"]} == {"source"}
    for name, tasks in (("sources=1", ["sst2"]), ("sources=2", ["sst2", "mr"])):
        icr = InContextRouter.from_pretrained(tmp_path / "out" / "fits" / name)
        assert list(icr.description.tasks) == tasks


def test_a_dry_run_prints_the_grid_and_computes_nothing(
    world, encoder_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(room, "load", lambda *_: pytest.fail("a model was loaded"))
    sweep(world, encoder_folder, tmp_path / "out", "rank=2,3", "--dry-run")
    shown = capsys.readouterr().out
    assert "rank=3" in shown
    assert "extraction: once for 2 fits" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["ranks=2"], "unknown axis 'ranks': did you mean rank"),
        (["--preset", "bases"], "unknown preset 'bases': did you mean basis"),
        (["rank=2,0"], "rank=0"),
        (["rank=2,9"], "needs more than 9 prompts"),
        (["rank=2,31"], "rank=31"),
        (["layers=late,4-5"], "layers=4-5: routed layers must be ascending indices below 5"),
        (["layers=all", "encoder=hidden"], "encoder hidden"),
        (["encoder=sentence,pinned:other"], "unknown pinned encoder"),
        (["rank=2", "--methods", "zero-shots"], "did you mean zero-shot"),
        (["rank=2", "--reference", "rank=3"], "unknown reference"),
        ([], "nothing to sweep"),
    ],
)
def test_a_value_that_a_fit_refuses_is_told_for_the_whole_grid_before_anything_runs(
    words, why, world, encoder_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(room, "load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as caught:
        sweep(world, encoder_folder, tmp_path / "out", *words)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert why in line
    assert not (tmp_path / "out").exists()


def test_seeds_fit_each_setting_anew_and_are_one_row(world, encoder_folder, tmp_path):
    out = tmp_path / "out"
    sweep(world, encoder_folder, out, "rank=2", "--seeds", "0", "1")
    assert {folder.name for folder in (out / "fits").iterdir()} == {
        "rank=2 seed=0",
        "rank=2 seed=1",
    }
    content = json.loads((out / "sweep.json").read_text())
    (line, _) = [line for line in content["lines"] if line["group"] == "source"]
    assert line["name"] == "rank=2"
    first, second = (logits_of(out / "run", f"rank=2 seed={seed}") for seed in (0, 1))
    assert first != second


@pytest.mark.processes
def test_processes_share_a_sweep(swept, world, encoder_folder, tmp_path):
    where = [*on(world), "--encoder", str(encoder_folder), "--out", str(tmp_path / "out")]
    how = [*FIT.split(), "--sources", "sst2", "--tasks", "sst2", "mr", "--n-test", "7"]
    assert finish(start(2, "sweep", "rank=2,3", *where, *how)) == [0, 0]
    both = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert {(line["name"], line["group"]) for line in both["lines"]} == {
        (line["name"], line["group"])
        for line in json.loads((swept / "sweep.json").read_text())["lines"]
    }
    shared, alone = answers_of(tmp_path / "out" / "run"), answers_of(swept / "run")
    assert sorted(key for key, _ in shared) == sorted(key for key, _ in alone)
