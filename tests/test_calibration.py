"""Calibration in use: a prior from prompts without labels, taken away from further scores."""

import math
import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import null_space
from scipy.stats import multivariate_normal

import fitted
import tiny
from fitted import small_fit
from icrouting.icr import InContextRouter
from icrouting.routing import calibration as room
from icrouting.routing.calibration import BatchCalibration, CalibrationStream, mixture_of
from icrouting.routing.priors import WAYS, clusters, log_prior, without_prior
from icrouting.tasks.task import TaskSpec

TASK = tiny.task("toy", n_train=60, n_test=30)
OPTIONS = list(TASK.spec.options)
TEXTS = [TASK.prompt(row) for row in TASK.test]
SCORES = torch.from_numpy(np.random.default_rng(5).normal(size=(40, 3)) * 2).float()
LETTERS = ("a", "b", "c")


@pytest.fixture(scope="module")
def model():
    return tiny.model("llama")


@pytest.fixture(scope="module")
def icr(model, tokenizer):
    config = small_fit(n_prompts=8, n_queries=60)
    return InContextRouter.fit(model, tokenizer, [TASK], config)


@pytest.fixture
def routed(icr, model, tokenizer):
    with icr.attached(model, tokenizer) as attached:
        yield attached


@pytest.fixture
def strict(icr):
    return fitted.strict(icr)


def rows_of(examples):
    return [dict(example.fields) for example in examples]


# -- the prior itself


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_adjusted_by_itself_is_what_a_report_makes_of_it(way):
    calibration = BatchCalibration.of(SCORES, LETTERS, way)
    adjusted = calibration.adjusted(SCORES, LETTERS)
    expected = torch.from_numpy(without_prior(SCORES.double().numpy(), way))
    gap = adjusted - expected
    torch.testing.assert_close(gap, gap[:, :1].expand_as(gap), atol=1e-4, rtol=0)
    assert torch.equal(adjusted.argmax(1), expected.argmax(1))


@pytest.mark.parametrize("way", WAYS)
def test_a_uniform_prior_changes_no_answer(way):
    turned = torch.cat([SCORES.roll(shift, 1) for shift in range(3)])
    calibration = BatchCalibration.of(turned, LETTERS, way)
    assert calibration.log_prior.abs().max() < 1e-5
    adjusted = calibration.adjusted(SCORES, LETTERS)
    torch.testing.assert_close(adjusted, SCORES.log_softmax(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", WAYS)
def test_the_order_of_prompts_within_an_option_stays(way):
    calibration = BatchCalibration.of(SCORES[:20], LETTERS, way)
    adjusted = calibration.adjusted(SCORES[20:], LETTERS)
    before = SCORES[20:].log_softmax(1)
    assert torch.equal(adjusted.argsort(0), before.argsort(0))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sizes", [(40,), (1, 39), (2, 1, 5, 32), (1,) * 40])
def test_a_stream_after_n_prompts_is_the_batch_of_those_n(way, sizes):
    stream = CalibrationStream(way)
    for scores in SCORES.split(list(sizes)):
        last = stream.adjusted(scores, LETTERS)
    batch = BatchCalibration.of(SCORES, LETTERS, way)
    assert stream.n_prompts == 40
    assert stream.calibration is not None
    torch.testing.assert_close(stream.calibration.log_prior, batch.log_prior, atol=1e-6, rtol=0)
    torch.testing.assert_close(last, batch.adjusted(scores, LETTERS), atol=1e-6, rtol=0)


def test_a_stream_leaves_scores_as_they_are_before_there_are_enough():
    stream = CalibrationStream()
    first = stream.adjusted(SCORES[:1], LETTERS)
    torch.testing.assert_close(first, SCORES[:1].log_softmax(1))
    assert stream.calibration is None
    stream.adjusted(SCORES[1:3], LETTERS)
    assert stream.calibration is not None


def test_a_long_stream_estimates_anew_when_one_prompt_in_a_hundred_is_new(monkeypatch):
    estimates = []
    monkeypatch.setattr(room, "log_prior", lambda *_: estimates.append(1) or np.zeros(3))
    stream = CalibrationStream()
    stream.adjusted(SCORES.repeat(10, 1), LETTERS)
    for row in SCORES[:20]:
        stream.adjusted(row[None], LETTERS)
    # At 400, 404, 409, 414 and 419 prompts.
    assert len(estimates) == 5
    assert stream.n_prompts == 420


@pytest.mark.parametrize("n_prompts", [0, 1, 2])
def test_fewer_prompts_than_options_are_refused(n_prompts):
    with pytest.raises(ValueError, match=f"{n_prompts} prompts of 3 options"):
        BatchCalibration.of(SCORES[:n_prompts], LETTERS)


def test_one_option_is_refused():
    with pytest.raises(ValueError, match="two options or more"):
        BatchCalibration.of(SCORES[:, :1], LETTERS[:1])
    with pytest.raises(ValueError, match="two options or more"):
        CalibrationStream().adjusted(SCORES[:, :1], LETTERS[:1])


def test_a_calibration_of_other_options_or_of_something_else_is_refused():
    calibration = BatchCalibration.of(SCORES, LETTERS, made_of="router 1")
    with pytest.raises(ValueError, match=r"of the options .*'a', 'b', 'c'"):
        calibration.adjusted(SCORES, ("b", "a", "c"), "router 1")
    with pytest.raises(ValueError, match="is of router 1, and this is router 2"):
        calibration.adjusted(SCORES, LETTERS, "router 2")
    stream = CalibrationStream()
    stream.adjusted(SCORES, LETTERS, "router 1")
    with pytest.raises(ValueError, match="begin another"):
        stream.adjusted(SCORES, LETTERS, "router 2")


def slowly_guarded(scores, starts_at_mean=True):
    """The guarded prior, a number at a time."""
    n_prompts, k = scores.shape
    rows = []
    for row in scores:
        total = math.log(sum(math.exp(score) for score in row))
        mean = sum(score - total for score in row) / k
        rows.append([score - total - mean for score in row])
    places = range(k)
    lean = [0.0] * k
    if starts_at_mean:
        lean = [sum(row[y] for row in rows) / n_prompts for y in places]
    squares = sum((row[y] - lean[y]) ** 2 for row in rows for y in places)
    apart = math.sqrt(squares / (n_prompts * (k - 1)))
    variance = apart**2 / 2
    shares = [1 / k] * k
    n_even = max(10, 0.25 * n_prompts)
    for _ in range(200):
        posteriors = []
        for row in rows:
            fits = [math.exp(apart * (row[y] - lean[y]) / variance) * shares[y] for y in places]
            posteriors.append([fit / sum(fits) for fit in fits])
        counts = [sum(posterior[y] for posterior in posteriors) for y in places]
        means = [sum(row[y] for row in rows) / n_prompts for y in places]
        lean = [means[y] - apart * (counts[y] / n_prompts - 1 / k) for y in places]
        along = 0.0
        for row, posterior in zip(rows, posteriors, strict=True):
            along += sum(posterior[y] * (row[y] - lean[y]) for y in places)
        apart = along / (n_prompts * (1 - 1 / k))
        # What is left of each prompt, label by label.
        left = 0.0
        for row, posterior in zip(rows, posteriors, strict=True):
            for y in places:
                middle = [lean[z] + apart * ((z == y) - 1 / k) for z in places]
                left += posterior[y] * sum((row[z] - middle[z]) ** 2 for z in places)
        variance = left / (n_prompts * (k - 1))
        total = sum(counts) + k * n_even
        shares = [(count + n_even) / total for count in counts]
    return [lean[y] - variance / apart * math.log(shares[y]) for y in places]


def test_the_guarded_prior_is_that_of_the_slow_iteration():
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1, 2], [40, 10, 10])
    scores = rng.normal(size=(60, 3)) + 2.0 * (labels[:, None] == np.arange(3)) + [1.0, 0.0, -1.0]
    fast = log_prior(scores, "guarded")
    # Both starts come to the same clusters here.
    for starts_at_mean in (True, False):
        slow = np.array(slowly_guarded(scores, starts_at_mean))
        np.testing.assert_allclose(fast - fast.mean(), slow - slow.mean(), atol=1e-3)


def test_the_guard_gives_back_what_a_skewed_task_would_lose():
    # Sure answers, nine in ten of one label: their mean is the labels' more than the model's.
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [180, 20])
    scores = np.where(labels[:, None] == np.arange(2), 4.0, 0.0) + rng.normal(size=(200, 2))
    right = {}
    for way in WAYS:
        right[way] = (without_prior(scores, way).argmax(1) == labels).mean()
    assert right["guarded"] > max(right["batch"], right["batch-probability"]) + 0.05
    assert right["guarded"] > 0.99


def test_prompts_of_another_kind_are_told_by_their_scores():
    calibration = BatchCalibration.of(SCORES[:20], LETTERS)
    assert calibration.chance_of(SCORES[20:]) > 0.01
    assert calibration.chance_of(SCORES[20:] + torch.tensor([3.0, 0.0, 0.0])) < 1e-4


# -- hostile numbers


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_refused(number):
    scores = SCORES.clone()
    scores[7, 1] = number
    with pytest.raises(ValueError, match="NaN or infinity among those of 1 prompts"):
        BatchCalibration.of(scores, LETTERS)


def test_scores_of_another_width_than_the_options_are_refused():
    with pytest.raises(ValueError, match=r"each of 2 options .* shape \(40, 3\)"):
        BatchCalibration.of(SCORES, LETTERS[:2])
    with pytest.raises(ValueError, match=r"each of 3 options .* shape \(40, 1\)"):
        BatchCalibration.of(SCORES, LETTERS).adjusted(SCORES[:, :1], LETTERS)
    with pytest.raises(ValueError, match=r"each of 3 options .* shape \(40, 2\)"):
        CalibrationStream().adjusted(SCORES[:, :2], LETTERS)


@pytest.mark.parametrize("n_before", [0, 2, 20])
def test_a_stream_goes_on_after_an_error_as_if_it_had_not_been(n_before):
    stream = CalibrationStream()
    for row in SCORES[:n_before]:
        stream.adjusted(row[None], LETTERS)
    with pytest.raises(ValueError, match="the estimate is as it was"):
        stream.adjusted(SCORES[20:].where(SCORES[20:] < 1, math.nan), LETTERS)
    with pytest.raises(ValueError, match="options"):
        stream.adjusted(SCORES[20:], ("a", "b"))
    assert stream.n_prompts == n_before
    stream.adjusted(SCORES[n_before:], LETTERS)
    assert stream.calibration == BatchCalibration.of(SCORES, LETTERS)


@pytest.mark.parametrize("n_before", [0, 2, 20])
def test_a_stream_that_was_pickled_goes_on(n_before):
    stream = CalibrationStream("batch")
    if n_before:
        stream.adjusted(SCORES[:n_before], LETTERS)
    again = pickle.loads(pickle.dumps(stream))
    for each in (stream, again):
        each.adjusted(SCORES[n_before:], LETTERS)
    assert again.calibration == stream.calibration


def test_a_long_stream_is_not_copied_for_every_prompt(monkeypatch):
    joined = []
    usual = torch.cat
    monkeypatch.setattr(torch, "cat", lambda pieces: joined.append(1) or usual(pieces))
    stream = CalibrationStream("batch")
    stream.adjusted(SCORES.repeat(50, 1), LETTERS)
    for row in SCORES[:38]:
        stream.adjusted(row[None], LETTERS)
    # At 2,000 prompts, and at 2,020.
    assert len(joined) == 2
    assert stream.n_prompts == 2038


DEGENERATE = {
    "all the same": np.zeros((9, 3)),
    "all the same and sure": np.tile([50.0, 0.0, -50.0], (9, 1)),
    "two prompts": np.array([[3.0, -1.0], [2.0, 1.0]]),
    "two prompts apart": np.array([[900.0, 0.0], [0.0, 900.0]]),
    "an option that nobody chooses": np.random.default_rng(0).normal(size=(40, 3)) - [0, 0, 300],
    "77 prompts of 77 options": np.random.default_rng(1).normal(size=(77, 77)) * 9,
    "one prompt far away": np.concatenate([np.zeros((30, 4)), [[1e6, 0, 0, 0]]]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", DEGENERATE)
def test_on_degenerate_batches_the_prior_is_a_number_that_keeps_to_the_scores(way, kind):
    log_probs = torch.from_numpy(DEGENERATE[kind]).log_softmax(1).numpy()
    prior = log_prior(DEGENERATE[kind], way)
    assert np.isfinite(prior).all()
    # No further from the batch's scores than labels are given back for, at most.
    slack = 4 * log_probs.std() + 1e-3
    assert (prior - prior.mean() <= (log_probs - log_probs.mean(1)[:, None]).max(0) + slack).all()
    assert (prior - prior.mean() >= (log_probs - log_probs.mean(1)[:, None]).min(0) - slack).all()


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_of_one_answer_is_answered_evenly(way):
    scores = np.tile([2.0, 0.0, -1.0], (12, 1))
    shares = np.exp(without_prior(scores, way))
    np.testing.assert_allclose(shares / shares.sum(1, keepdims=True), 1 / 3, atol=0.01)


def slow_fit(centred, best, n_even):
    """The log posterior of clusters, by the densities of a normal distribution on the plane."""
    k = centred.shape[1]
    plane = null_space(np.ones((1, k)))
    total = 0.0
    for row in centred:
        density = 0.0
        for label in range(k):
            middle = best.lean + best.apart * (np.eye(k)[label] - 1 / k)
            normal = multivariate_normal(middle @ plane, best.variance * np.eye(k - 1))
            density += best.shares[label] * normal.pdf(row @ plane)
        total += math.log(density)
    return total + n_even * np.log(best.shares).sum()


def sample_of(n_prompts=60, k=3):
    rng = np.random.default_rng(2)
    labels = np.minimum(rng.geometric(0.6, n_prompts) - 1, k - 1)
    scores = rng.normal(size=(n_prompts, k)) + 3.0 * np.eye(k)[labels] + np.linspace(1, -1, k)
    log_probs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    return log_probs - log_probs.mean(1, keepdims=True)


def test_the_fit_of_clusters_is_the_log_posterior_without_the_density_s_constant():
    for n_prompts, k in ((60, 3), (48, 5)):
        centred = sample_of(n_prompts, k)
        for start in (centred.mean(0), np.zeros(k)):
            best = clusters(centred, start)
            n_even = max(10, n_prompts / 4)
            constant = n_prompts * (k - 1) / 2 * math.log(2 * math.pi)
            assert best.fit == pytest.approx(slow_fit(centred, best, n_even) + constant, abs=1e-6)


def test_no_clusters_nearby_fit_better_than_those_that_are_best():
    centred = sample_of()
    best = clusters(centred, centred.mean(0))
    highest = slow_fit(centred, best, 15)
    rng = np.random.default_rng(3)
    for _ in range(20):
        shares = best.shares * np.exp(rng.normal(size=3) * 0.1)
        lean = best.lean + rng.normal(size=3) * 0.1
        near = replace(
            best,
            lean=lean - lean.mean(),
            apart=best.apart * np.exp(rng.normal() * 0.1),
            variance=best.variance * np.exp(rng.normal() * 0.1),
            shares=shares / shares.sum(),
        )
        assert slow_fit(centred, near, 15) < highest + 1e-6


def test_prompts_of_the_same_task_are_not_called_unlike_where_options_are_many():
    rng = np.random.default_rng(4)
    mixing = rng.normal(size=(77, 77))
    chances = []
    for _ in range(20):
        scores = torch.from_numpy(rng.normal(size=(190, 77)) @ mixing).float()
        options = tuple(f"option {place}" for place in range(77))
        calibration = BatchCalibration.of(scores[:100], options, "batch")
        chances.append(calibration.chance_of(scores[100:]))
    assert min(chances) > 1e-3
    # Chances are uniform where there is nothing to tell.
    assert 0.25 < np.mean(chances) < 0.75


def test_of_fewer_prompts_than_options_nothing_is_told():
    scores = torch.from_numpy(np.random.default_rng(4).normal(size=(12, 9))).float()
    calibration = BatchCalibration.of(scores[:9], tuple("abcdefghi"), "batch")
    far = scores[9:] + torch.linspace(0, 90, 9)
    assert calibration.chance_of(far[:0]) == 1
    few = BatchCalibration.of(scores[:2, :2], ("a", "b"), "batch")
    assert few.chance_of(scores[:0, :2]) == 1
    with pytest.raises(ValueError, match="finite scores"):
        calibration.chance_of(far.log())


# -- in use


@pytest.mark.parametrize("way", WAYS)
def test_routed_scores_come_without_their_prior(routed, way):
    calibration = routed.calibrate(TEXTS, OPTIONS, way=way)
    plain = routed.score(TEXTS, OPTIONS)
    expected = plain.log_softmax(1) - calibration.log_prior
    adjusted = routed.score(TEXTS, OPTIONS, calibration=calibration)
    torch.testing.assert_close(adjusted, expected, atol=1e-5, rtol=0)
    assert calibration.n_prompts == len(TEXTS)


def test_a_stream_goes_along_with_routed_scores(routed):
    stream = CalibrationStream()
    for start in range(0, 30, 10):
        last = routed.score(TEXTS[start : start + 10], OPTIONS, calibration=stream)
    calibration = routed.calibrate(TEXTS, OPTIONS)
    torch.testing.assert_close(
        last, routed.score(TEXTS[20:], OPTIONS, calibration=calibration), atol=1e-4, rtol=0
    )


def test_statistics_of_another_strength_gate_or_router_are_refused(icr, strict, model, tokenizer):
    with icr.attached(model, tokenizer) as attached:
        calibration = attached.calibrate(TEXTS, OPTIONS)
    for settings in ({"strength": 0.5}, {"gate": False}):
        with (
            icr.attached(model, tokenizer, **settings) as attached,
            pytest.raises(ValueError, match="estimate it with what answers"),
        ):
            attached.score(TEXTS, OPTIONS, calibration=calibration)


def test_what_does_not_fit_costs_no_pass(routed, monkeypatch):
    def scored(*_, **__):
        raise AssertionError("a pass was made")

    calibration = routed.calibrate(TEXTS, OPTIONS)
    monkeypatch.setattr("icrouting.routing.routed.score", scored)
    with pytest.raises(ValueError, match="of the options"):
        routed.score(TEXTS, ["yes", "no"], calibration=calibration)
    with pytest.raises(ValueError, match="one list of options"):
        routed.score(TEXTS, [OPTIONS] * len(TEXTS), calibration=calibration)
    with pytest.raises(ValueError, match="1 prompts say nothing of the prior of"):
        routed.calibrate(TEXTS[:1], OPTIONS)


def test_prompts_of_several_tasks_are_warned_of(routed):
    others = [f"Text: {number}\nTopic:" for number in range(10)]
    with pytest.warns(UserWarning, match=r"end in 2 ways, 'Sentiment:' \(30\), 'Topic:' \(10\)"):
        routed.calibrate([*TEXTS, *others], OPTIONS)
    assert not mixture_of(TEXTS)
    assert not mixture_of([f"a text {number}" for number in range(40)])


# -- shipped with a router


def test_what_the_gate_leaves_alone_is_calibrated_and_says_so(strict, model, tokenizer):
    rows = rows_of(TASK.test)
    with strict.attached(model, tokenizer) as attached:
        calibration, answers = attached.calibrate_task(rows, "toy")
        plain = attached.score(TEXTS, OPTIONS).log_softmax(1)
    assert {answer.status for answer in answers} == {"left alone"}
    safe = strict.with_calibration(calibration)
    with safe.attached(model, tokenizer) as attached:
        predictions = attached.predict(rows, "toy")
    assert {each.status for each in predictions} == {"calibrated"}
    expected = (plain - calibration.by_options[0].log_prior).softmax(1)
    for prediction, shares in zip(predictions, expected, strict=True):
        values = list(prediction.probabilities.values())
        assert values == pytest.approx(shares.tolist(), abs=1e-5)


def test_what_the_gate_routes_is_as_without_calibration(icr, strict, model, tokenizer):
    known = rows_of(TASK.train[:20])
    with strict.attached(model, tokenizer) as attached:
        calibration, _ = attached.calibrate_task(rows_of(TASK.test))
    made_of = replace(calibration, made_of=calibration.made_of)
    safe = replace(icr, calibrations=(made_of,))
    with icr.attached(model, tokenizer) as attached:
        before = attached.predict(known)
    with safe.attached(model, tokenizer) as attached:
        after = attached.predict(known)
    for one, other in zip(before, after, strict=True):
        if one.status == "routed":
            assert one == other


def test_a_router_that_routes_all_gets_no_prior(icr, model, tokenizer):
    with (
        icr.attached(model, tokenizer, gate=False) as attached,
        pytest.raises(ValueError, match="none of 30 rows was left alone"),
    ):
        attached.calibrate_task(rows_of(TASK.test))


def test_too_few_rows_are_refused(strict, model, tokenizer):
    with (
        strict.attached(model, tokenizer) as attached,
        pytest.raises(ValueError, match="has 1 prompts of one list of options"),
    ):
        attached.calibrate_task(rows_of(TASK.test[:1]))


def test_priors_ship_with_the_router(strict, model, tokenizer, tmp_path):
    spec = TaskSpec("mine", "far", "Note: {text}\nMood:", ("good", "bad"))
    rows = rows_of(TASK.test)
    with strict.attached(model, tokenizer) as attached:
        calibration, _ = attached.calibrate_task(rows, spec)
    safe = strict.with_calibration(calibration)
    safe.save_pretrained(tmp_path / "safe")
    again = InContextRouter.from_pretrained(tmp_path / "safe")
    assert again == safe
    assert again != strict
    with again.attached(model, tokenizer) as attached:
        # By name alone: the template came along.
        shipped = attached.predict(rows, "mine")
    with safe.attached(model, tokenizer) as attached:
        assert attached.predict(rows, spec) == shipped
    assert {each.status for each in shipped} == {"calibrated"}


def test_a_prior_says_nothing_of_another_template(strict, model, tokenizer):
    spec = TaskSpec("mine", "far", "Note: {text}\nMood:", ("good", "bad"))
    rows = rows_of(TASK.test)
    with strict.attached(model, tokenizer) as attached:
        calibration, _ = attached.calibrate_task(rows, spec)
    with strict.with_calibration(calibration).attached(model, tokenizer) as attached:
        other = replace(spec, template="Note: {text}\nFeeling:")
        assert {each.status for each in attached.predict(rows, other)} == {"left alone"}


def test_a_later_prior_takes_the_place_of_an_earlier_one(strict, model, tokenizer):
    with strict.attached(model, tokenizer) as attached:
        first, _ = attached.calibrate_task(rows_of(TASK.test[:10]))
        second, _ = attached.calibrate_task(rows_of(TASK.test))
    safe = strict.with_calibration(first).with_calibration(second)
    assert safe.calibrations == (second,)


def test_a_prior_of_another_router_is_refused_and_on_disk_left_out(
    strict, model, tokenizer, tmp_path, caplog
):
    with strict.attached(model, tokenizer) as attached:
        calibration, _ = attached.calibrate_task(rows_of(TASK.test))
    other = replace(calibration, made_of="router 0123456789abcdef at strength 1 with its own gate")
    with pytest.raises(ValueError, match="not of this router"):
        strict.with_calibration(other)
    replace(strict, calibrations=(other,)).save_pretrained(tmp_path / "odd")
    assert InContextRouter.from_pretrained(tmp_path / "odd").calibrations == ()
    assert "left out the prior of 'toy'" in caplog.text


def test_a_damaged_file_of_priors_is_an_error(strict, model, tokenizer, tmp_path):
    with strict.attached(model, tokenizer) as attached:
        calibration, _ = attached.calibrate_task(rows_of(TASK.test))
    strict.with_calibration(calibration).save_pretrained(tmp_path)
    file = tmp_path / "calibration.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"calibration.safetensors is damaged"):
        InContextRouter.from_pretrained(tmp_path)


def test_a_router_without_priors_writes_no_file_of_them(icr, tmp_path):
    icr.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_calibrating_warns_of_nothing_on_one_task(routed):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        routed.calibrate(TEXTS, OPTIONS)
