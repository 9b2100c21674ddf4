"""Learned directions: PIDs that are trained beside the router, from where PCA has them."""

import dataclasses

import pytest
import torch

import tiny
from fitted import small_fit
from icrouting.decoder.decoder import Decoder
from icrouting.fitting import stages
from icrouting.fitting.training import Trainer
from icrouting.icr import InContextRouter
from icrouting.methods.controls import Refit, UniformAlpha, _TrainedDirections
from icrouting.methods.icr import Icr
from icrouting.methods.settings import Settings
from icrouting.routing.router import Router

TASK = tiny.task()
LEARNED = small_fit(basis="learned", lr=0.01, epochs=3, w_gate=0.0)


def fitted(tokenizer, config=LEARNED, family="llama", **more):
    return InContextRouter.fit(tiny.model(family), tokenizer, [TASK], config, gate=False, **more)


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_they_are_those_of_a_router_whose_parameters_they_are(family, tokenizer):
    """The control trains any directions so; here they start where PCA has them."""
    decoder = Decoder.of(tiny.model(family), tokenizer)
    config = dataclasses.replace(LEARNED, basis="pca")
    pids, router, _ = stages.fit(decoder, [TASK], config, kind=_TrainedDirections)
    icr = fitted(tokenizer, family=family)
    assert torch.equal(icr.pids.query_pids, pids.query_pids.detach())
    assert torch.equal(icr.pids.key_pids, pids.key_pids.detach())
    weights = icr.router.state_dict()
    assert weights.keys() == router.state_dict().keys() - {"query_pids", "key_pids"}
    for name, value in weights.items():
        assert torch.equal(value, router.state_dict()[name])


def test_training_moves_them_and_nothing_else_of_the_pids(tokenizer):
    learned = fitted(tokenizer).pids
    principal = fitted(tokenizer, dataclasses.replace(LEARNED, basis="pca")).pids
    for name in ("query_pids", "key_pids"):
        assert (getattr(learned, name) - getattr(principal, name)).abs().max() > 0.01
    for name in ("query_std", "key_std", "query_explained", "key_explained"):
        assert torch.equal(getattr(learned, name), getattr(principal, name))


def test_a_saved_router_routes_along_them(tokenizer, tmp_path):
    icr = fitted(tokenizer)
    icr.save_pretrained(tmp_path)
    again = InContextRouter.from_pretrained(tmp_path)
    assert again == icr
    assert again.pids == icr.pids
    model = tiny.model("llama")
    prompts = [TASK.prompt(row) for row in TASK.test]
    scores = []
    for router in (icr, again):
        with router.attached(model, tokenizer) as routed:
            scores.append(routed.score(prompts, TASK.spec.options))
    assert torch.equal(*scores)


def test_a_fit_that_was_stopped_goes_on_with_them(tokenizer, tmp_path, monkeypatch):
    whole = fitted(tokenizer)
    update = Trainer._update

    def stopping(self, terms):
        update(self, terms)
        if self.step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", stopping)
        with pytest.raises(KeyboardInterrupt):
            fitted(tokenizer, folder=tmp_path)
    assert fitted(tokenizer, folder=tmp_path) == whole


def test_the_best_router_on_validation_rows_has_its_own_directions(tokenizer, trainers):
    """What is kept of a training that watches is one moment's, directions and weights alike."""
    config = dataclasses.replace(LEARNED, min_steps=60, patience=2)
    held = tuple(TASK.train[:12])
    task = dataclasses.replace(TASK, train=TASK.train[12:], validation=held)
    model = tiny.model("llama")
    icr = InContextRouter.fit(model, tokenizer, [task], config, gate=False)
    best = trainers[-1].watch.best
    assert best
    assert torch.equal(icr.pids.query_pids, best["query_pids"])


def test_a_fit_that_goes_on_from_them_keeps_them(tokenizer):
    start = fitted(tokenizer)
    before = start.pids.query_pids.clone()
    other = tiny.task("other")
    config = small_fit(basis="pca", layers=(3, 4), lr=0.01)
    icr = InContextRouter.fit(
        tiny.model("llama"), tokenizer, [other], config, start=start, gate=False
    )
    assert torch.equal(icr.pids.query_pids, before)
    assert torch.equal(start.pids.query_pids, before)
    assert icr.description.fit.basis == "learned"


@pytest.mark.parametrize("kind", [Router, _TrainedDirections])
def test_a_training_moves_its_own_copy_alone(kind):
    """Each fold of a cross-validation starts from the same directions, and so does the fit."""
    pids = tiny.pids(tiny.model("llama"))
    before = pids.query_pids.clone()
    router = kind(12, 2, 6, 3, 5)
    router.learn_directions(pids)
    with torch.no_grad():
        router.query_pids += 1
    assert torch.equal(pids.query_pids, before)


@pytest.mark.parametrize("kind", [Refit, UniformAlpha])
def test_controls_of_such_a_router_learn_theirs_too(kind, tokenizer, tmp_path):
    icr = fitted(tokenizer)
    icr.save_pretrained(tmp_path)
    settings = Settings(router=str(tmp_path))
    control = kind(settings)
    control.decoder = Decoder.of(tiny.model("llama"), tokenizer)
    control.sources = [TASK]
    control.learn(None)
    principal = fitted(tokenizer, dataclasses.replace(LEARNED, basis="pca")).pids
    assert (control.query_directions - principal.query_pids).abs().max() > 0.01
    n_pids = icr.pids.query_pids.numel() + icr.pids.key_pids.numel()
    if kind is Refit:
        n_weights = sum(weights.numel() for weights in icr.router.parameters())
        assert control.n_trained == n_weights + n_pids
        assert torch.equal(control.query_directions, icr.pids.query_pids)
        assert Icr(settings).fitted_before([TASK])["trained"] == n_weights + n_pids
