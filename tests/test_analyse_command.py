"""`icr analyse`: a page with every picture and its sentence, and tables that are kept."""

import json
import re

import pandas as pd
import pytest

import browser
from commands import on
from icrouting.analysing import run
from icrouting.analysing.config import PARTS, AnalysisConfig
from icrouting.analysing.parts import ANALYSES
from icrouting.cli import main

# Two dozen pictures take seconds.
pytestmark = pytest.mark.slow
FEW = ("--n-test", "3", "--n-prompts", "8")


def analyse(world, out, *more):
    where = [str(world / "router"), "--out", str(out), *on(world)]
    main.main(["analyse", *where, "--tasks", "sst2", "mr", *FEW, *more])


@pytest.fixture(scope="module")
def out(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysis")
    analyse(world, folder)
    return folder


@pytest.fixture(scope="module")
def page(out):
    return (out / "analysis.html").read_text()


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main.main(["analyse", *arguments])
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_every_part_has_its_section(page):
    assert re.findall(r'<section id="([\w-]+)">', page) == list(PARTS)


def test_every_picture_has_a_sentence_that_says_what_it_shows(page):
    figures = page.split("<figure ")[1:]
    assert len(figures) >= 10
    for figure in figures:
        (sentence,) = re.findall(r'<p class="says">(.+?)</p>', figure, re.DOTALL)
        assert sentence.endswith(".")
        assert "nan" not in sentence
        assert figure.count("<svg ") == 1


def test_the_page_has_no_script_and_fetches_nothing(page):
    assert "<script" not in page
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page)
    outside = [each for each in addresses if not re.match(r"#|data:image/png|[\w-]+\.csv$", each)]
    assert not outside
    assert not re.findall(r"@import|url\((?!#)", page)


def test_every_file_that_the_page_names_lies_beside_it(page, out):
    names = set(re.findall(r'href="([\w-]+\.csv)"', page))
    assert names == {file.name for file in out.glob("*.csv")}


def test_no_two_pictures_share_the_name_of_a_part(page):
    names = re.findall(r' id="([^"]+)"', page)
    in_pictures = [name for name in names if re.match(r"p[0-9a-f]{7}-", name)]
    assert len(in_pictures) == len(set(in_pictures))


def test_colours_of_text_are_the_pages_and_none_is_fixed(page):
    assert "var(--ink)" in page
    assert "#1c1c1d" not in page


def test_unseen_tasks_are_told_from_those_that_the_router_was_fitted_on(page):
    assert "Fitted on: sst2. Unseen: mr." in " ".join(page.split())


def test_a_part_that_was_computed_is_not_computed_again(world, out, monkeypatch, capsys):
    monkeypatch.setattr(run, "ANALYSES", {name: _broken(part) for name, part in ANALYSES.items()})
    before = (out / "analysis.html").read_text()
    analyse(world, out)
    assert capsys.readouterr().out.count("(kept from an earlier run)") == len(PARTS)
    assert (out / "analysis.html").read_text() == before


def _broken(part):
    def refuse(study):
        raise AssertionError("computed again")

    return run.Part(part.title, refuse, part.pictures, part.settings, part.shows_demos)


def test_other_settings_compute_a_part_anew(world, tmp_path):
    analyse(world, tmp_path, "--parts", "importance")
    state = json.loads((tmp_path / "analysis.json").read_text())["parts"]["importance"]
    analyse(world, tmp_path, "--parts", "importance", "--seed", "1")
    now = json.loads((tmp_path / "analysis.json").read_text())["parts"]["importance"]
    assert (state["made_of"]["seed"], now["made_of"]["seed"]) == (0, 1)


def test_a_table_that_was_deleted_is_computed_anew(world, tmp_path):
    analyse(world, tmp_path, "--parts", "importance")
    file = tmp_path / "importance-layers.csv"
    text = file.read_text()
    file.unlink()
    analyse(world, tmp_path, "--parts", "importance")
    assert file.read_text() == text


def test_the_parts_that_were_not_chosen_are_not_computed(world, tmp_path):
    analyse(world, tmp_path, "--parts", "importance")
    assert {file.name for file in tmp_path.glob("*.csv")} == {
        "importance-layers.csv",
        "importance-units.csv",
    }


def test_tables_are_numbers_that_pandas_reads(out):
    table = pd.read_csv(out / "intervention-intervention.csv")
    assert (table[table.off == "nothing"].kl == 0).all()


def test_without_tasks_those_that_the_router_was_fitted_on_are_asked(world, tmp_path):
    where = [str(world / "router"), "--out", str(tmp_path), *on(world)]
    main.main(["analyse", *where, *FEW, "--parts", "importance"])
    assert set(pd.read_csv(tmp_path / "importance-layers.csv").task) == {"sst2"}


def test_an_unknown_part_is_refused_with_near_matches():
    with pytest.raises(ValueError, match="unknown part 'attentoin': did you mean attention"):
        AnalysisConfig(parts=("attentoin",))


def test_a_part_that_the_command_does_not_know_ends_it_before_any_work(capsys, world, tmp_path):
    error = refusal(
        capsys, str(world / "router"), "--out", str(tmp_path), *on(world), "--parts", "importanc"
    )
    assert "did you mean importance?" in error
    assert not list(tmp_path.iterdir())


def test_too_few_prompts_for_a_part_end_the_command_before_any_part(capsys, world, tmp_path):
    where = [str(world / "router"), "--out", str(tmp_path), *on(world)]
    error = refusal(capsys, *where, "--n-prompts", "4")
    assert "two draws of 2 directions need more than 5 few-shot prompts" in error
    assert not list(tmp_path.glob("*.csv"))


def test_no_part_at_all_is_refused():
    with pytest.raises(ValueError, match="parts: name one or more"):
        AnalysisConfig(parts=())


def test_a_run_without_routing_is_refused(capsys, tmp_path):
    (tmp_path / "records.jsonl").touch()
    (tmp_path / "config.json").write_text('{"router": null}')
    error = refusal(capsys, str(tmp_path), "--out", str(tmp_path / "out"))
    assert "is a run without routing" in error


def test_a_run_that_measured_a_router_says_which_to_name(capsys, tmp_path):
    (tmp_path / "records.jsonl").touch()
    (tmp_path / "config.json").write_text('{"router": "0123456789abcdef"}')
    error = refusal(capsys, str(tmp_path), "--out", str(tmp_path / "out"))
    assert "name the folder of the one that it measured (0123456789abcdef)" in error


@pytest.mark.browser
def test_the_page_fits_a_phone_and_a_wide_screen(page, tmp_path):
    laid_out = browser.lay_out(page, (400, 1280), tmp_path)
    for width, seen in laid_out.items():
        assert seen["width"] <= width
        assert seen["drawn"] == page.count("<svg ")
        assert seen["broken"] == seen["fetched"] == 0
