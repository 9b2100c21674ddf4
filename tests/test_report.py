import csv
import html as markup
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

import browser
from fake_run import (
    FIT,
    ICR_LOSES_ON_MR,
    RATIO,
    TASKS,
    fake_config,
    fake_records,
    fake_run,
    many_methods,
)
from icrouting.evaluation import records
from icrouting.evaluation.folder import RunFolder
from icrouting.report import page as report
from icrouting.report.figures import confusions
from icrouting.report.page import summarise
from icrouting.report.table import NONE, marks
from icrouting.report.wording import conclusion
from icrouting.runtime.pages import points

ROUTING = {
    "layers": [4, 5, 6],
    "tasks": {
        task["name"]: {
            "head_gates": [[0.1, 0.9, 0.4, 0.2, 0.3]] * 3,
            "routing_vector_abs": [[0.0, 0.2]] * 3,
        }
        for task in TASKS
    },
}
TRAINING = [
    {
        "step": step,
        "loss": 2 / step,
        "ce": 1.9 / step,
        "conf": 0.1,
        "spar": 0.2,
        "gate": 0.5,
        "lr": 1e-4,
    }
    for step in range(1, 31)
]
NO_FOLDER = RunFolder(Path("holds neither routing nor training"))


def write_run(folder, some=ICR_LOSES_ON_MR, config=None, is_full=False):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or fake_config()))
    records.append(folder / "records.jsonl", some)
    if is_full:
        (folder / "routing.json").write_text(json.dumps(ROUTING))
        lines = [
            json.dumps({**row, "validation_accuracy": 0.5} if row["step"] % 10 == 0 else row)
            for row in TRAINING
        ]
        (folder / "training.jsonl").write_text("\n".join(lines) + '\n{"step": 31, "lo')
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A finished run of three methods on three tasks, with its reports."""
    config = fake_config(dtype="bfloat16")
    folder = write_run(tmp_path_factory.mktemp("run") / "full", config=config, is_full=True)
    report.write(folder)
    return folder


@pytest.fixture(scope="module")
def page(run_folder):
    return (run_folder / "report.html").read_text(encoding="utf-8")


def text_of(page):
    return " ".join(
        markup.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)).split()
    )


@pytest.mark.slow
def test_every_cell_is_in_every_format(run_folder, page):
    summary = summarise(ICR_LOSES_ON_MR, fake_run())
    cells = summary.lines.loc["task"]
    assert len(cells) == 9
    text, plain = text_of(page), (run_folder / "report.md").read_text()
    lines = list(csv.DictReader((run_folder / "report.csv").read_text().splitlines()))
    for (task, method), cell in cells.iterrows():
        value = points(cell.accuracy)
        interval = f"{points(cell.accuracy_low)} to {points(cell.accuracy_high)}"
        assert f"{value} {marks(cell)} {interval}".replace("  ", " ") in text
        assert f"{value} ±" in plain
        (line,) = [line for line in lines if (line["name"], line["method"]) == (task, method)]
        assert float(line["accuracy"]) == cell.accuracy


@pytest.mark.slow
def test_the_page_fetches_nothing_and_runs_nothing(page):
    references = re.findall(r"""(?:src|href|action|data|poster)\s*=\s*["']([^"']*)""", page)
    assert references
    assert all(reference.startswith(("data:", "#")) for reference in references)
    outside = re.sub(r'src="data:[^"]*"', "", page)
    for word in ("http", "<script", "@import", "url(", "<link"):
        assert word not in outside


def test_the_page_shows_the_command_the_configuration_the_notes_and_the_timing(page):
    text = text_of(page)
    for shown in (
        "icr evaluate --model <tiny>",
        "abc1234",
        "30 of 500 test items",
        "dtype bfloat16",
    ):
        assert shown in text
    assert f"1.04 1.01 to 1.07 540 {RATIO['note']}" in text
    assert "group: far, role: unseen, n_options: 3, options: A, B, C" in text


def test_times_measured_in_turns_and_what_is_kept_are_in_every_text(run_folder, page):
    plain = (run_folder / "report.md").read_text()
    assert f"| ICR | 1.04 | 1.01 to 1.07 | 540 | {RATIO['note']} |" in plain
    assert f"ICR 1.04 1.01 to 1.07 540 {RATIO['note']}" in text_of(page)


@pytest.mark.slow
def test_the_options_of_confusion_matrices_are_named_and_old_runs_say_that_they_kept_none(page):
    assert "agnews : 0 World, 1 Sports, 2 Business, 3 Technology" in text_of(page)
    assert "mr : 0 negative, 1 positive" in text_of(page)
    old_tasks = [{**task, "options": []} for task in TASKS]
    old = report.html(report.report_of(fake_run(tasks=old_tasks), ICR_LOSES_ON_MR), NO_FOLDER)
    assert text_of(old).count("whose names this run has not kept") == len(TASKS)


def test_the_fit_of_icr_is_among_the_costs_without_a_time(run_folder, page):
    assert (
        f"| ICR | 1 | 3,000 | 1,370 | 6,100 | 5,000 | {NONE} |"
        in (run_folder / "report.md").read_text()
    )
    assert f"ICR 1 3,000 1,370 6,100 5,000 {NONE}" in text_of(page)
    assert "its time is not known" in text_of(page)


@pytest.mark.slow
def test_the_report_counts_the_items_that_there_were(run_folder, page):
    asked = fake_run(n_test=500)
    made = report.report_of(asked, ICR_LOSES_ON_MR)
    assert "at most 30 test items each" in text_of(report.html(made, NO_FOLDER))
    assert "up to 30 items a task" in report.markdown(made)


@pytest.mark.slow
def test_a_lone_task_and_item_are_counted_in_the_singular():
    some = fake_records({("zero-shot", "mr"): 1, ("icr", "mr"): 1}, n_items=1)
    made = report.report_of(fake_run(("zero-shot", "icr"), tasks=[TASKS[1]]), some)
    assert "1 task, at most 1 test item each" in text_of(report.html(made, NO_FOLDER))


@pytest.mark.parametrize("name", ["a|b", "a\nb"])
def test_a_task_s_name_does_not_break_a_table(name):
    tasks = [{**TASKS[1], "name": name}, TASKS[0]]
    ratio = {**RATIO, "note": f"median of 5 turns on 4 prompts of {name}"}
    run = fake_run(("icr",), tasks=tasks, timing={"baseline": "zero-shot", "ratios": [ratio]})
    some = [replace(record, task=name) for record in fake_records({("icr", "mr"): 1})]
    lines = report.markdown(report.report_of(run, some)).splitlines()
    tables = [line for line in lines if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in tables}
    assert widths == {5, 6, 8}
    assert sum("a" in line and "b" in line.split(name[0])[-1] for line in tables) >= 2


def test_every_picture_has_an_alternative_text_and_a_caption(page):
    assert page.count("<img") == page.count('alt="') == page.count("<figcaption>") == 6 + 3
    assert 'alt=""' not in page


@pytest.mark.slow
def test_a_report_remade_is_the_same_and_leaves_no_part_behind(run_folder):
    names = ("report.html", "report.md", "report.csv", "summary.json")
    before = [(run_folder / name).read_bytes() for name in names]
    report.write(run_folder)
    assert [(run_folder / name).read_bytes() for name in names] == before
    assert not list(run_folder.glob("*.part"))


def test_the_summary_file_holds_the_conclusion_and_the_figures(run_folder):
    values = json.loads((run_folder / "summary.json").read_text())
    summary = summarise(ICR_LOSES_ON_MR, fake_run())
    assert values["conclusion"] == conclusion(summary)
    assert len(values["lines"]) == len(summary.lines)
    for line in values["lines"]:
        found = summary.line(line["kind"], line["name"], line["method"])
        assert line["accuracy"] == found.accuracy
        assert line.get("gain") == (found.gain if found.gain_n else None)
        assert line["accuracy_n"] == found.accuracy_n
    assert values["rivals"]["few-shot"]["high"] == summary.rivals["few-shot"].high


@pytest.mark.slow
def test_a_run_in_progress_renders_and_says_what_is_missing(tmp_path):
    done = [one for one in ICR_LOSES_ON_MR if one.method != "few-shot" and one.task != "cb"]
    cut = [one for one in done if (one.method, one.task, one.seed) != ("icr", "mr", 1)]
    summary = report.write(write_run(tmp_path / "run", cut)).summary
    assert "few-shot: no records on agnews, mr, cb" in summary.unfinished
    assert "icr: no records on cb" in summary.unfinished
    assert "icr: 30 of 60 predictions on mr" in summary.unfinished
    few = [one for one in cut if one.method != "icr" or one.index > 3]
    assert any(line.count("predictions on") == 2 for line in summarise(few, fake_run()).unfinished)
    text = text_of((tmp_path / "run" / "report.html").read_text())
    assert "This run is not complete" in text
    assert "So far" in text
    assert "1 of 2 tasks" in text
    assert "Not complete: icr: no records on cb." in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.slow
def test_a_lone_baseline_renders_without_gains():
    some = fake_records({("zero-shot", "mr"): 0.5})
    run = fake_run(methods=("zero-shot",), tasks=[TASKS[1]])
    made = report.report_of(run, some)
    page = report.html(made, NO_FOLDER)
    assert "There is no gain to report: only zero-shot has been run." in text_of(page)
    assert made.summary.methods[0].n_compared == 0


@pytest.mark.slow
def test_methods_without_a_baseline_render():
    some = fake_records({("icr", "mr"): 0.5})
    made = report.report_of(fake_run(methods=("icr",), tasks=[TASKS[1]]), some)
    assert "no zero-shot records to compare with" in made.conclusion
    assert "ICR" in text_of(report.html(made, NO_FOLDER))


@pytest.mark.slow
def test_what_comes_from_the_run_is_escaped():
    run = fake_run(notes=["<img src=x>"], model="<b>&", command="a 'b' \"c\" <d>")
    page = report.html(report.report_of(run, ICR_LOSES_ON_MR), NO_FOLDER)
    assert "<img src=x>" not in page
    assert "&lt;b&gt;&amp;" in page


@pytest.mark.slow
def test_a_cell_that_was_refused_part_way_is_left_open(tmp_path):
    refused = [["few-shot", "mr", "a prompt is too long"]]
    records = [
        record for record in ICR_LOSES_ON_MR if (record.method, record.task) != ("few-shot", "mr")
    ]
    half = [r for r in ICR_LOSES_ON_MR if (r.method, r.task) == ("few-shot", "mr")][:10]
    whole, cut = (
        summarise(found, fake_run(refused=refused)) for found in (records, [*records, *half])
    )
    assert cut.line("task", "mr", "few-shot") is None
    assert cut.unfinished == whole.unfinished == []
    assert cut.lines.drop(columns="confusion").equals(whole.lines.drop(columns="confusion"))


@pytest.mark.slow
def test_what_was_finished_before_a_method_was_refused_is_shown():
    first = [r for r in ICR_LOSES_ON_MR if (r.method, r.task, r.seed) != ("few-shot", "mr", 1)]
    refused = [["few-shot", "mr", "loss is nan"]]
    summary, whole = summarise(first, fake_run(refused=refused)), summarise(first, fake_run())
    assert summary.line("task", "mr", "few-shot").accuracy_n == 30
    assert summary.unfinished == whole.unfinished == ["few-shot: 30 of 60 predictions on mr"]


def test_no_records_are_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="no records to summarise"):
        report.write(write_run(tmp_path / "run", []))


def test_a_missing_or_incomplete_configuration_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="is no run folder"):
        report.write(tmp_path)
    whole = fake_config()
    spoilt = [
        {**whole, **change}
        for change in ({"seeds": 3}, {"tasks": [{"name": "mr"}]}, {"refused": [["icr"]]})
    ]
    for text, message in (
        *(('{"model": "x"}', "missing"), ("[]", "got list"), ("{", "is not JSON")),
        *zip(
            map(json.dumps, spoilt),
            ("seeds: .*array", "tasks.0.group: Field required", "refused.0.1"),
            strict=True,
        ),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            report.write(tmp_path)


@pytest.mark.slow
def test_drawing_leaves_matplotlibs_settings_alone():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    assert confusions(summarise(ICR_LOSES_ON_MR, fake_run()), "icr").count("<svg") == 1
    assert dict(mpl.rcParams) == before


@pytest.mark.browser
def test_in_a_browser_pictures_load_and_nothing_scrolls_sideways(page, tmp_path):
    for width, found in browser.lay_out(page, (1280, 700, 400), tmp_path).items():
        assert found["images"] == page.count("<img")
        assert found["broken"] == found["clipped"] == 0
        assert found["width"] <= width


@pytest.mark.browser
def test_in_a_browser_the_costs_of_long_named_methods_are_not_cut_off(tmp_path):
    names = ("icr", "iterative-vectors-once", "multi-task-few-shot, context kept")
    sizes = {"trained": 134515008, "forwards": 1234567, "backwards": 1234567, "seconds": 12345.6}
    fits = [{**FIT, **sizes, "method": name} for name in names]
    ratios = [{**RATIO, "method": name, "n_cached": 134515008} for name in names]
    run = fake_run(fits=fits, timing={"baseline": "zero-shot", "ratios": ratios})
    page = report.html(report.report_of(run, ICR_LOSES_ON_MR), NO_FOLDER)
    for found in browser.lay_out(page, (1400, 1200, 1000, 800, 400), tmp_path).values():
        assert found["clipped"] == 0


@pytest.mark.browser
def test_in_a_browser_a_run_of_many_methods_does_not_scroll_sideways(tmp_path):
    records, run = many_methods(20)
    page = report.html(report.report_of(run, records), RunFolder(tmp_path))
    for width, found in browser.lay_out(page, (1280, 700, 400), tmp_path).items():
        assert found["broken"] == found["clipped"] == 0
        assert found["width"] <= width


@pytest.mark.slow
def test_tasks_of_more_options_than_can_be_read_have_no_confusion_matrix(tmp_path):
    wide = [replace(r, option_logits=(*r.option_logits, *[-9.0] * 40)) for r in ICR_LOSES_ON_MR]
    mixed = [
        many if many.task == "mr" else few for many, few in zip(wide, ICR_LOSES_ON_MR, strict=True)
    ]
    found = summarise(mixed, fake_run()).cells("icr").confusion
    assert [task for task, counts in found.items() if not counts] == ["mr"]
    pages = []
    for name, some in (("mixed", mixed), ("wide", wide)):
        report.write(write_run(tmp_path / name, some))
        pages.append((tmp_path / name / "report.html").read_text())
    assert ["Confusion matrices of" in page for page in pages] == [True, False]
