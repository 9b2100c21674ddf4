"""The number of steps that cross-validation chooses."""

import dataclasses

import pytest
import torch

import tiny
from icrouting import InContextRouter
from icrouting.fitting.folds import N_FOLDS, chosen_by_folds, pooled, stratified
from icrouting.fitting.queries import Query
from icrouting.fitting.training import Trainer
from icrouting.fitting.trunk import TrunkState
from icrouting.fitting.validation import Look
from test_validation import changed, task, weights


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


def test_the_loss_at_a_step_is_the_mean_over_all_queries():
    looks = [[Look(0, 1.0, 0.0), Look(10, 0.4, 1.0)], [Look(0, 1.0, 0.0), Look(10, 0.8, 0.0)]]
    assert pooled(looks, [3, 1])[1] == Look(10, pytest.approx(0.5), pytest.approx(0.75))


def test_a_fold_that_stopped_counts_with_its_last_loss():
    looks = [[Look(0, 1.0, 0.0), Look(10, 3.0, 0.0)], [Look(0, 1.0, 0.0), Look(20, 0.5, 0.0)]]
    assert pooled(looks, [1, 1])[-1].loss == pytest.approx((3.0 + 0.5) / 2)


def test_fewer_queries_than_folds_choose_nothing():
    assert chosen_by_folds(queries([0, 1]), lambda *args: pytest.fail("trained"), 0, None) is None


@pytest.fixture
def trainers(monkeypatch):
    ran = []
    run = Trainer.run

    def noted(self):
        ran.append(self)
        run(self)

    monkeypatch.setattr(Trainer, "run", noted)
    return ran


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
