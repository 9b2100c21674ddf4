import re

import pytest

from fake_run import ICR_LOSES_ON_MR, TASKS, fake_records, fake_run
from icrouting.report.summary import summarise
from icrouting.report.wording import conclusion
from icrouting.runtime.pages import points


def test_the_conclusion_names_gains_losses_and_rivals():
    said = conclusion(summarise(ICR_LOSES_ON_MR, fake_run()))
    assert said.startswith(
        "ICR scores 70.0 on the 1 source task, 30.0 points above zero-shot (95 % interval "
    )
    assert "50.0 on average over the 2 unseen tasks, 20.0 points below zero-shot" in said
    assert "below zero-shot on 1 of 3 tasks (mr), significantly on mr" in said
    assert re.search(
        r"Ahead of it: few-shot by 20\.0 points \(95 % interval 1\d\.\d to 2\d\.\d, 3 tasks\)\.$",
        said,
    )


def test_the_conclusion_does_not_sell_noise_as_a_gain():
    some = fake_records({("zero-shot", "mr"): 0.5, ("icr", "mr"): 0.54})
    said = conclusion(summarise(some, fake_run(methods=("zero-shot", "icr"), tasks=[TASKS[1]])))
    assert "not distinguishable from no change" in said
    assert "It is not below zero-shot on this task." in said
    assert "Ahead" not in said


def test_the_conclusion_speaks_of_the_last_method_where_there_is_no_icr():
    some = fake_records({("zero-shot", "mr"): 0.5, ("probe", "mr"): 0.9, ("few-shot", "mr"): 0.2})
    said = conclusion(
        summarise(some, fake_run(methods=("zero-shot", "probe", "few-shot"), tasks=[TASKS[1]]))
    )
    assert said.startswith("few-shot scores 20.0 on the 1 unseen task, 30.0 points below zero-shot")
    assert "Ahead of it: probe by 70.0 points" in said


@pytest.mark.parametrize(
    ("share_right", "ending"), [(0.2, "mr, significantly."), (0.46, "mr, not significantly.")]
)
def test_a_loss_on_the_only_task_is_said_of_it(share_right, ending):
    some = fake_records({("zero-shot", "mr"): 0.5, ("icr", "mr"): share_right})
    said = conclusion(summarise(some, fake_run(("zero-shot", "icr"), tasks=[TASKS[1]])))
    assert said.endswith(f"It is below zero-shot on {ending}")


def test_a_lead_that_is_not_significant_is_said_to_be_none_to_build_on():
    some = fake_records(
        {("zero-shot", "mr"): 0.5, ("icr", "mr"): 0.5, ("few-shot", "mr"): 0.54, ("icv", "mr"): 0.9}
    )
    methods = ("zero-shot", "icr", "few-shot", "icv")
    said = conclusion(summarise(some, fake_run(methods, tasks=[TASKS[1]])))
    few_shot, icv = said.split("Ahead of it: ")[1].split("), ")
    assert few_shot.startswith("few-shot by 6.7 points (95 % interval ")
    assert few_shot.endswith("1 task; not distinguishable from no lead")
    assert icv.startswith("icv by 40.0")
    assert "not distinguishable" not in icv


@pytest.mark.parametrize(
    ("share", "is_signed", "text"),
    [
        (0.5612, False, "56.1"),
        (0.05, True, "+5.0"),
        (-0.012, True, "\N{MINUS SIGN}1.2"),
        (-0.0001, False, "0.0"),
    ],
)
def test_shares_read_as_points(share, is_signed, text):
    assert points(share, is_signed) == text
