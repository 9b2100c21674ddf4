"""What fits cost and tried, as a run's report tells it."""

import csv
import json

import numpy as np
import pytest
import torch

import tiny
from fake_run import fake_records, fake_run
from icrouting.evaluation.costs import fit_costs, write_tried
from icrouting.methods import Settings, make
from icrouting.report.page import markdown, report_of
from icrouting.runtime.storage import save_tensors

TASKS = [tiny.task("toy", n_test=30), tiny.task("other", n_test=30)]


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("fits"), tiny.model("llama")
    settings = Settings(demos_per_class=2, i2cl_epochs=3, tries=1)
    for method in make(["task-vectors", "task-vectors-once", "i2cl"], settings):
        file = folder / f"{method.name}-seed0.safetensors"
        method.fit(model, tokenizer, TASKS, np.random.default_rng(0), file)
        for task in TASKS:
            method.on(task)
    return folder


@pytest.mark.slow
def test_costs_are_means_over_the_fits_of_each_method(folder):
    inner, pooled, i2cl = fit_costs(folder, ["task-vectors", "task-vectors-once", "i2cl"])
    assert (inner["fits"], pooled["fits"], i2cl["fits"]) == (2, 1, 2)
    # demonstrations of two classes and the validation rows, and twice that where tasks are pooled
    assert inner["labelled"] == 2 * 2 + len(TASKS[0].validation)
    assert pooled["labelled"] == 2 * inner["labelled"]
    assert inner["backwards"] == inner["trained"] == 0
    # demonstrations once each; then two rows a step, two steps an epoch
    assert i2cl["backwards"] == 3 * 2 * 2
    assert i2cl["forwards"] == 4 + i2cl["backwards"]
    assert i2cl["trained"] == 4 * 5


@pytest.mark.slow
def test_every_setting_that_was_tried_is_written(folder, tmp_path):
    write_tried(folder, ["task-vectors", "i2cl"], tmp_path / "tried.csv")
    rows = list(csv.DictReader((tmp_path / "tried.csv").read_text().splitlines()))
    assert [json.loads(row["setting"])["layer"] for row in rows] == [*range(5), *range(5)]
    assert {row["fit"] for row in rows} == {"seed0-toy", "seed0-other"}
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows)


def test_fits_of_an_earlier_version_have_no_cost(tmp_path):
    save_tensors(tmp_path / "i2cl-seed0.safetensors", {"a": torch.zeros(1)})
    assert fit_costs(tmp_path, ["i2cl"]) == []
    write_tried(tmp_path, ["i2cl"], tmp_path / "tried.csv")
    assert (tmp_path / "tried.csv").read_text() == "method,fit,setting,accuracy\n"


@pytest.mark.slow
def test_the_report_lists_the_costs(folder):
    few_records = fake_records({("icr", "agnews"): 0.5})
    costs = fit_costs(folder, ["i2cl"])
    assert "| i2cl | 2 | 4 | 20 | 16 | 12 |" in markdown(
        report_of(fake_run(fits=costs), few_records)
    )
    assert "What a fit costs" not in markdown(report_of(fake_run(fits=[]), few_records))
