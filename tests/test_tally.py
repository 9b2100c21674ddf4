import pytest

from fake_run import ICR_LOSES_ON_MR, TASKS, fake_config
from icrouting import metrics
from icrouting.tally import summarise


def test_means_and_gains_follow_from_the_cells():
    summary = summarise(ICR_LOSES_ON_MR, fake_config())
    unseen = summary.mean("icr", "unseen")
    cells = [summary.cell("icr", task) for task in ("mr", "cb")]
    assert unseen.accuracy.value == pytest.approx(sum(cell.accuracy.value for cell in cells) / 2)
    assert unseen.gain.value == pytest.approx(sum(cell.gain.change.value for cell in cells) / 2)
    baseline = summary.mean("zero-shot", "unseen")
    assert unseen.accuracy.value - baseline.accuracy.value == pytest.approx(unseen.gain.value)
    assert baseline.gain is None


def test_a_task_without_a_description_is_an_error():
    with pytest.raises(ValueError, match=r"does not describe the tasks \['cb'\]"):
        summarise(ICR_LOSES_ON_MR, fake_config(tasks=list(TASKS[:2])))


def test_groups_follow_the_sections_whatever_the_order_of_the_configuration():
    groups = summarise(ICR_LOSES_ON_MR, fake_config(tasks=TASKS[::-1])).groups
    assert list(groups) == ["source", "near", "far", "unseen", "all"]
    assert groups["unseen"] == (*groups["near"], *groups["far"])
    assert groups["all"] == (*groups["source"], *groups["unseen"])


def test_an_in_domain_task_that_was_not_a_source_is_unseen():
    tasks = [{**TASKS[0], "role": "unseen"}, *TASKS[1:]]
    groups = summarise(ICR_LOSES_ON_MR, fake_config(tasks=tasks)).groups
    assert "source" not in groups
    assert groups["in-domain, unseen"] == ("agnews",)
    assert groups["unseen"] == groups["all"]


def test_holm_corrects_over_the_tasks_of_one_method():
    summary = summarise(ICR_LOSES_ON_MR, fake_config())
    for method in ("icr", "few-shot"):
        gains = [cell.gain for cell in summary.cells if cell.method == method]
        assert tuple(gain.p_holm for gain in gains) == metrics.holm([gain.p_value for gain in gains])


def test_a_rivals_lead_is_its_accuracy_less_the_headlines():
    summary = summarise(ICR_LOSES_ON_MR, fake_config())
    (rival,) = summary.rivals
    ours, theirs = (summary.mean(method, "all").accuracy.value for method in (summary.headline, rival.method))
    assert rival.lead.value == pytest.approx(theirs - ours)
