"""Routers with names of their own: each a column of a run, beside the one without a name."""

import dataclasses
import json
import shutil

import pytest

import tiny
from commands import EVALUATE, fit, on
from fitted import fit_method
from icrouting.cli import main, reading
from icrouting.evaluation import records
from icrouting.evaluation.config import EvalConfig
from icrouting.icr import InContextRouter
from icrouting.methods import registry
from icrouting.methods.settings import Entrant, Settings
from icrouting.routing import artifact

pytestmark = pytest.mark.slow
SMALL = "--methods zero-shot icr --seeds 0 --n-test 5"


@pytest.fixture(scope="module")
def routers(world, encoder_folder, tmp_path_factory):
    """The folders of three routers of one model: of ranks 2, 3 and, on another task, 2."""
    base = tmp_path_factory.mktemp("routers")
    fit(world, encoder_folder, base / "three", "--rank", "3", "--lr", "0.3")
    fit(world, encoder_folder, base / "elsewhere", "--tasks", "mr")
    shutil.copytree(world / "router", base / "two")
    return base


@pytest.fixture(scope="module")
def named(world, routers, tmp_path_factory):
    """A run of the world's router and two named ones."""
    run = tmp_path_factory.mktemp("named") / "run"
    # The router without a name is already among the options of `evaluate`.
    evaluate_by(
        world, run, world / "router", f"two={routers / 'two'}", f"three={routers / 'three'}"
    )
    return run


def evaluate_by(world, run, *routers, more=()):
    where = [*on(world), "--router", *map(str, routers), "--out", str(run)]
    main.main(["eval", *where, *EVALUATE.split(), *SMALL.split(), *more])


def logits_of(run, method):
    return {
        (record.task, record.seed, record.index): record.option_logits
        for record in records.read(run / "records.jsonl")
        if record.method == method
    }


def test_one_router_under_a_name_answers_as_without_it(named):
    assert logits_of(named, "two") == logits_of(named, "icr")
    assert logits_of(named, "three") != logits_of(named, "icr")


def test_a_named_router_answers_as_it_does_alone(world, named, routers, tmp_path):
    evaluate_by(world, tmp_path / "run", routers / "three")
    assert logits_of(tmp_path / "run", "icr") == logits_of(named, "three")


def test_a_run_says_which_router_stands_behind_which_name(named, routers):
    config = json.loads((named / "config.json").read_text())
    assert config["methods"] == ["zero-shot", "icr", "two", "three"]
    digests = {
        name: InContextRouter.from_pretrained(routers / name).digest() for name in ("two", "three")
    }
    assert config["routers"] == digests
    assert config["router"] == digests["two"]


def test_tables_pictures_and_costs_have_a_column_each(named):
    markdown = (named / "report.md").read_text()
    assert "| two |" in markdown
    assert "| three |" in markdown
    config = json.loads((named / "config.json").read_text())
    assert {row["method"] for row in config["fits"]} >= {"icr", "two", "three"}
    assert {row["method"] for row in config["timing"]["ratios"]} >= {"icr", "two", "three"}
    page = (named / "report.html").read_text()
    assert "The router three" in page
    assert (named / "routing-three.json").exists()


def test_named_routers_may_join_a_run_but_not_change_under_their_names(
    world, named, routers, tmp_path, capsys
):
    run = shutil.copytree(named, tmp_path / "run")
    evaluate_by(world, run, f"again={routers / 'three'}")
    assert logits_of(run, "again") == logits_of(run, "three")
    assert json.loads((run / "config.json").read_text())["routers"].keys() == {
        "two",
        "three",
        "again",
    }
    with pytest.raises(SystemExit):
        evaluate_by(world, run, f"two={routers / 'three'}")
    assert "two was router" in capsys.readouterr().err


def test_named_routers_take_the_place_of_icr_where_it_has_none():
    entrants = (Entrant("a", "x"), Entrant("b", "y"))
    plain = EvalConfig(methods=("zero-shot", "icr", "icv"), entrants=entrants)
    assert plain.columns == ("zero-shot", "a", "b", "icv")
    with_unnamed = dataclasses.replace(plain, settings=Settings(router="z"))
    assert with_unnamed.columns == ("zero-shot", "icr", "a", "b", "icv")
    assert EvalConfig(methods=("icv",), entrants=entrants).columns == ("icv", "a", "b")
    assert dataclasses.replace(plain, methods=("b", "icr")).columns == ("b", "a")


def test_a_run_without_named_routers_is_written_as_before(world, tmp_path):
    evaluate_by(world, tmp_path / "run", world / "router")
    assert "routers" not in json.loads((tmp_path / "run" / "config.json").read_text())


def test_a_strength_is_part_of_what_a_run_holds_against_a_name():
    assert Entrant("a", "x").identified_by("0f") == "0f"
    assert Entrant("a", "x", strength=0.5).identified_by("0f") == "0f at strength 0.5"


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_an_entrant_is_attached_at_its_strength(strength, world):
    entrant = Entrant("weak", str(world / "router"), strength)
    (method,) = registry.make(["weak"], Settings(), [entrant])
    fit_method(method, tiny.model("llama"), tiny.tokenizer(), [])
    with method.applied(tiny.task("mr")) as routed:
        assert routed.strength == strength
    assert method._reader().scale == pytest.approx(strength * 0.8)


def test_a_folder_is_told_from_a_name(tmp_path):
    (tmp_path / "a=b").mkdir()
    folder = str(tmp_path / "a=b")
    assert reading._named_folder(folder) == (None, folder)
    assert reading._named_folder(f"rank=4={folder}") == ("rank=4", folder)
    assert reading._named_folder("small=owner/name") == ("small", "owner/name")
    assert reading._named_folder("owner/name") == (None, "owner/name")


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (("a={two}", "a={three}"), "two routers are called 'a'"),
        (("{two}", "{three}"), "give each a name"),
        (("icv={two}",), "a router cannot be called 'icv'"),
        (("icr={two}",), "a router cannot be called 'icr'"),
        (("prompt:x={two}",), "a router cannot be called 'prompt:x'"),
        (("a/b={two}",), "no '/'"),
        (("={two}",), "a router's name"),
        (("a={two}/nothing",), "no router at"),
    ],
)
def test_names_that_cannot_be_are_refused_before_a_model_is_loaded(
    names, why, world, routers, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("icrouting.cli.evaluate.load", lambda *_: pytest.fail("a model was loaded"))
    places = {name: routers / name for name in ("two", "three")}
    with pytest.raises(SystemExit):
        evaluate_by(world, tmp_path / "run", *(name.format(**places) for name in names))
    assert why in capsys.readouterr().err


def test_routers_of_other_base_models_are_no_one_run(world, routers, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("icrouting.cli.evaluate.load", lambda *_: pytest.fail("a model was loaded"))
    icr = InContextRouter.from_pretrained(routers / "three")
    description = dataclasses.replace(icr.description, fingerprint="0" * 16, base_weights={})
    artifact.save(tmp_path / "other", description, icr.pids, icr.router)
    with pytest.raises(SystemExit):
        evaluate_by(world, tmp_path / "run", world / "router", f"other={tmp_path / 'other'}")
    assert "routers of different base models" in capsys.readouterr().err


def test_what_any_router_learned_from_is_no_unseen_task(world, routers, tmp_path):
    where = [*on(world), "--router", f"a={routers / 'two'}", f"b={routers / 'elsewhere'}"]
    how = ["--tasks", "sst2", "mr", "--demos-per-class", "1"]
    main.main(["eval", "--out", str(tmp_path / "run"), *where, *how, *SMALL.split()])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert {task["role"] for task in config["tasks"]} == {"source"}
    assert any("b learned from mr alone" in note for note in config["notes"])


def test_a_card_takes_the_results_of_a_named_router(named, routers, tmp_path, capsys):
    card = shutil.copytree(routers / "three", tmp_path / "card")
    main.main(["report", str(named), "--card", str(card)])
    assert "| three |" in (card / "README.md").read_text()
