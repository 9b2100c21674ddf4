import math

import pandas as pd
import pytest

from fake_run import ICR_LOSES_ON_MR, TASKS, fake_run
from icrouting.report import metrics, summary
from icrouting.report.summary import summarise


def test_means_and_gains_follow_from_the_cells():
    summary = summarise(ICR_LOSES_ON_MR, fake_run())
    unseen, baseline = (summary.line("mean", "unseen", method) for method in ("icr", "zero-shot"))
    cells = summary.cells("icr").loc[["mr", "cb"]]
    assert unseen.accuracy == pytest.approx(cells.accuracy.mean())
    assert unseen.gain == pytest.approx(cells.gain.mean())
    assert unseen.accuracy - baseline.accuracy == pytest.approx(unseen.gain)
    assert (unseen.gain_n, baseline.gain_n) == (2, 0)
    assert math.isnan(baseline.gain)


def test_a_task_without_a_description_is_an_error():
    with pytest.raises(ValueError, match=r"does not describe the tasks \['cb'\]"):
        summarise(ICR_LOSES_ON_MR, fake_run(tasks=list(TASKS[:2])))


def test_groups_follow_the_sections_whatever_the_order_of_the_configuration():
    groups = summarise(ICR_LOSES_ON_MR, fake_run(tasks=TASKS[::-1])).groups
    assert list(groups) == ["source", "near", "far", "unseen", "all"]
    assert groups["unseen"] == (*groups["near"], *groups["far"])
    assert groups["all"] == (*groups["source"], *groups["unseen"])


def test_an_in_domain_task_that_was_not_a_source_is_unseen():
    tasks = [{**TASKS[0], "role": "unseen"}, *TASKS[1:]]
    groups = summarise(ICR_LOSES_ON_MR, fake_run(tasks=tasks)).groups
    assert "source" not in groups
    assert groups["in-domain, unseen"] == ("agnews",)
    assert groups["unseen"] == groups["all"]


def test_holm_corrects_over_the_tasks_of_one_method():
    summary = summarise(ICR_LOSES_ON_MR, fake_run())
    for method in ("icr", "few-shot"):
        cells = summary.cells(method)
        assert len(cells) == 3
        assert cells.p_holm.equals(metrics.holm(cells.p_value))


def test_a_rivals_lead_is_its_accuracy_less_the_headlines():
    summary = summarise(ICR_LOSES_ON_MR, fake_run())
    ((rival, lead),) = summary.rivals.items()
    ours, theirs = (
        summary.line("mean", "all", method).accuracy for method in (summary.headline, rival)
    )
    assert lead.value == pytest.approx(theirs - ours)


def test_collapse_counts_losses_and_the_significant_among_them():
    cells = pd.DataFrame({"gain": [-0.2, -0.01, 0.0, 0.3, math.nan], "direction": [-1, 0, 0, 1, 0]})
    method = summary._method("icr", cells.assign(seconds=1.0, n_tokens=2.0))
    assert (method.n_collapsed, method.n_collapsed_significantly, method.n_compared) == (2, 1, 4)
    method = summary._method("icr", cells[:0].assign(seconds=1.0, n_tokens=2.0))
    assert (method.n_collapsed, method.n_collapsed_significantly, method.n_compared) == (0, 0, 0)
