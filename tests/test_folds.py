"""The number of steps that cross-validation chooses."""

import dataclasses

import pytest
import torch

import tiny
from icrouting import InContextRouter
from icrouting.decoder.decoder import Decoder
from icrouting.fitting import plan
from icrouting.fitting.folds import N_FOLDS, chosen_by_folds, pooled, stratified
from icrouting.fitting.queries import Query, n_rows_of
from icrouting.fitting.training import Trainer
from icrouting.fitting.trunk import TrunkState
from icrouting.fitting.validation import Look
from icrouting.methods import Settings, make
from test_validation import changed, fit, task, weights


def queries(labels):
    state = TrunkState([1], torch.zeros(1, 2), 0.0)
    return [
        Query(state, torch.zeros(2), [3, 4], label, str(n), row=n, answer=label)
        for n, label in enumerate(labels)
    ]


def test_an_example_of_several_queries_stands_in_one_fold():
    state = TrunkState([1], torch.zeros(1, 2), 0.0)
    split = [
        Query(state, torch.zeros(2), [3, 4], place, row=n, answer=n % 2, n_answer=place)
        for n in range(6)
        for place in range(2)
    ]
    folds = stratified(split, seed=0)
    assert folds[::2] == folds[1::2]
    assert sorted(folds[::2]) == [0, 0, 1, 1, 2, 2]


def test_every_fold_has_its_share_of_every_label():
    labels = [0] * 9 + [1] * 6
    folds = stratified(queries(labels), seed=0)
    for label, n_each in ((0, 3), (1, 2)):
        counts = [
            sum(fold == number and each == label for fold, each in zip(folds, labels, strict=True))
            for number in range(N_FOLDS)
        ]
        assert counts == [n_each] * N_FOLDS


def test_every_fold_has_its_share_of_every_label_of_every_task():
    """Another task's rows of the same label number do not stand for a task's own."""
    state = TrunkState([1], torch.zeros(1, 2), 0.0)
    tasks = ["one", "two"] * 9
    both = [
        Query(state, torch.zeros(2), [3, 4], 0, str(n), task=name, row=n)
        for n, name in enumerate(tasks)
    ]
    folds = stratified(both, seed=0)
    for name in ("one", "two"):
        fold_list = [fold for query, fold in zip(both, folds, strict=True) if query.task == name]
        assert [fold_list.count(number) for number in range(N_FOLDS)] == [3] * N_FOLDS


def test_every_query_is_judged_once_by_a_router_that_did_not_learn_from_it():
    judged = []

    def training(rest, held, folder):
        assert {query.text for query in rest}.isdisjoint(query.text for query in held)
        assert len(rest) + len(held) == 7
        judged.extend(query.text for query in held)
        return [Look(0, 1.0, 0.5)]

    chosen_by_folds(queries([0, 1, 0, 1, 0, 1, 0]), training, 0, None)
    assert sorted(judged) == [str(number) for number in range(7)]


@pytest.mark.parametrize(("n_new", "judged_tasks"), [(5, {"new"}), (2, {"new", "old"})])
def test_rows_that_the_start_has_learned_from_are_learned_from_and_not_judged_on(
    n_new, judged_tasks
):
    new = [dataclasses.replace(query, task="new") for query in queries([0, 1] * n_new)[:n_new]]
    old = []
    for place, query in enumerate(queries([0, 1, 0, 1])):
        old.append(dataclasses.replace(query, task="old", row=100 + place))
    judged = []

    def training(rest, held, folder):
        judged.extend(held)
        assert len(rest) + len(held) == n_new + 4
        return [Look(0, 1.0, 0.5)]

    chosen = chosen_by_folds([*new, *old], training, 0, None, ["old"])
    assert {query.task for query in judged} == judged_tasks
    assert len({query.row for query in judged}) == len(judged) == chosen.n_rows


def test_the_loss_at_a_step_is_the_mean_over_all_queries():
    looks = [[Look(0, 1.0, 0.0), Look(10, 0.4, 1.0)], [Look(0, 1.0, 0.0), Look(10, 0.8, 0.0)]]
    assert pooled(looks, [3, 1])[1] == Look(10, pytest.approx(0.5), pytest.approx(0.75))


def test_a_fold_that_stopped_counts_with_its_last_loss():
    looks = [[Look(0, 1.0, 0.0), Look(10, 3.0, 0.0)], [Look(0, 1.0, 0.0), Look(20, 0.5, 0.0)]]
    assert pooled(looks, [1, 1])[-1].loss == pytest.approx((3.0 + 0.5) / 2)


def test_fewer_queries_than_folds_choose_nothing():
    assert chosen_by_folds(queries([0, 1]), lambda *args: pytest.fail("trained"), 0, None) is None


def few(folder=None, **changes):
    """A fit on rows that are too few to hold a slice of them back."""
    config = changed(n_queries=100, min_steps=20, **changes)
    of = task(n_validation=4, n_train=8)
    return InContextRouter.fit(tiny.model("llama"), tiny.tokenizer(), [of], config, folder=folder)


def test_a_fit_on_few_rows_ends_at_the_chosen_step_having_learned_from_all_rows(trainers):
    few()
    *folds, last = trainers
    assert len(folds) == N_FOLDS
    assert len(last.queries) == 12
    assert last.step == last.chosen.step


def test_where_no_step_helps_the_router_changes_nothing(monkeypatch):
    monkeypatch.setattr("icrouting.fitting.stages.chosen_by_folds", lambda *args: Look(0, 1.0, 0.5))
    assert few().router.state_dict()["alpha.2.weight"].abs().max() == 0


def test_without_patience_nothing_is_chosen(trainers):
    few(patience=0)
    assert len(trainers) == 1
    assert trainers[0].step == 20


@pytest.mark.slow
def test_a_fit_that_was_stopped_in_a_fold_goes_on_to_the_same_router(
    trainers, tmp_path, monkeypatch
):
    whole = few()
    update = Trainer._update

    def interrupted(self, terms):
        if self.step == 7 and self.folder and self.folder.name == "fold-1":
            raise KeyboardInterrupt
        update(self, terms)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "_update", interrupted)
        few(tmp_path)
    monkeypatch.setattr(Trainer, "_update", update)
    resumed = few(tmp_path)
    assert torch.equal(weights(resumed), weights(whole))
    assert dataclasses.asdict(trainers[-1].chosen) == dataclasses.asdict(trainers[3].chosen)


def test_examples_are_counted_and_not_their_queries():
    state = TrunkState([1], torch.zeros(1, 2), 0.0)
    two_rows = [Query(state, torch.zeros(2), [3, 4], 0, row=n // 3, n_answer=n) for n in range(6)]
    assert n_rows_of(two_rows) == 2
    assert chosen_by_folds(two_rows, None, 0, None) is None


# Each training takes all its steps, and the last step is the one that is chosen.
LONG = changed(n_queries=100, min_steps=40, patience=99)


@pytest.fixture
def n_read(monkeypatch):
    """The queries that trainings read, one batch after another."""
    sizes = []
    terms = Trainer._terms

    def counted(self, entry, attachment, queries):
        sizes.append(len(queries))
        return terms(self, entry, attachment, queries)

    monkeypatch.setattr(Trainer, "_terms", counted)
    monkeypatch.setattr("icrouting.fitting.folds.pooled", lambda *args: [Look(40, 1.0, 0.5)])
    return sizes


def took(icr, of, folder):
    icr.save_pretrained(folder)
    (method,) = make(["icr"], Settings(router=str(folder)))
    return method.fitted_before([of]), method.fitted_before([])


@pytest.mark.slow
def test_what_icr_took_counts_the_folds_trainings_and_the_slice(n_read, tmp_path):
    few_rows = task(n_validation=8, n_train=16)
    icr = fit(LONG, of=few_rows)
    assert icr.description.sources[0].n_queries == 16 + 8
    for cost in took(icr, few_rows, tmp_path):
        # The last batch of a fold's pass may be cut off by the end of training.
        assert cost["backwards"] == pytest.approx(sum(n_read), abs=3)
        assert cost["labelled"] == 16 + 8
    assert sum(n_read) > 3 * 40 * 4


def test_what_icr_took_counts_the_rows_that_judged_it(n_read, tmp_path):
    of = task(n_validation=12, n_train=16)
    icr = fit(LONG, of=of)
    for cost in took(icr, of, tmp_path):
        assert cost["backwards"] == sum(n_read)
        assert cost["labelled"] == 16 + 12


def test_a_fit_that_nothing_watches_says_no_more_than_earlier_versions_did(n_read, tmp_path):
    of = task(n_validation=12, n_train=16)
    icr = fit(changed(n_queries=100, min_steps=0, patience=0), of=of)
    assert "n_judged" not in icr.description.sources[0].as_kept()
    for cost in took(icr, of, tmp_path):
        assert cost["backwards"] == sum(n_read)
        assert cost["labelled"] == 16


def test_a_plan_counts_the_slice_and_the_folds_trainings():
    of = task(n_validation=8, n_train=16)
    decoder = Decoder.of(tiny.model("llama"), tiny.tokenizer())

    def planned(config):
        return plan.plan_fit(decoder.model, decoder.tokenizer, [of], config, torch.float32)

    assert planned(LONG).queries["toy"].count == 16 + 8
    whole = planned(LONG)
    alone = planned(dataclasses.replace(LONG, patience=0))
    assert alone.queries["toy"].count == 16
    # Four trainings of 40 steps of about as many queries, where there was one.
    assert 3.5 < whole.flops["training"] / alone.flops["training"] < 4.5
