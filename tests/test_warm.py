"""A fit that goes on from a router begins as that router, and learns new tasks beside the old."""

import dataclasses
import re

import pytest
import torch

import tiny
from icrouting.config import HIDDEN, FitConfig
from icrouting.decoder.scoring import score_options
from icrouting.fitting import stages
from icrouting.fitting.account import Account
from icrouting.fitting.training import Trainer
from icrouting.icr import InContextRouter
from icrouting.routing.router import Router
from icrouting.runtime.storage import load_json

OPTIONS = ("negative", "positive")


@pytest.fixture(scope="module", params=["sentence encoder", "hidden"])
def config(encoder_folder, request):
    return FitConfig(
        layers=(3, 4),
        rank=3,
        n_prompts=12,
        demos_per_class=2,
        encoder=str(encoder_folder) if request.param == "sentence encoder" else HIDDEN,
        hidden_width=13,
        n_queries=24,
        lr=0.01,
        epochs=3,
        min_steps=0,
        patience=0,
        w_gate=0.0,
    )


@pytest.fixture(scope="module")
def model():
    return tiny.model("llama")


@pytest.fixture(scope="module")
def old(config, model, tokenizer):
    return InContextRouter.fit(model, tokenizer, [tiny.task("old task")], config)


NEW = tiny.task("new")
NEW = dataclasses.replace(
    NEW, spec=dataclasses.replace(NEW.spec, template="Text: {text}\nTone:", options=("bad", "good"))
)
# What is left at its default is the old router's.
TRAINING = FitConfig(n_queries=24, lr=0.01, epochs=2, min_steps=0, patience=0)


def prompts():
    texts = [NEW.prompt(row) for row in NEW.test]
    return texts + [tiny.task("old task").prompt(row) for row in tiny.task("old task").test]


def go_on(old, model, tokenizer, tasks=(NEW,), config=TRAINING, keep=0, **settings):
    return InContextRouter.fit(
        model, tokenizer, list(tasks), config, start=old, keep=keep, **settings
    )


def test_before_its_first_step_it_scores_as_the_old_router(old, model, tokenizer, monkeypatch):
    monkeypatch.setattr(Trainer, "run", lambda self: None)
    new = go_on(old, model, tokenizer)
    assert torch.equal(new.pids.query_pids, old.pids.query_pids)
    with old.attached(model, tokenizer) as routed:
        expected = routed.score(prompts(), OPTIONS)
    assert (expected - score_options(model, tokenizer, prompts(), OPTIONS)).abs().max() > 1e-2
    with new.attached(model, tokenizer) as routed:
        torch.testing.assert_close(routed.score(prompts(), OPTIONS), expected, atol=1e-4, rtol=0)


def test_the_first_step_trains_the_old_router_as_it_is_used(old, model, tokenizer, monkeypatch):
    """The scale of alpha stays where the old training ended: nothing jumps."""
    terms = Trainer._terms
    logits, trained = {}, []

    def watched(self, entry, attachment, queries):
        result = terms(self, entry, attachment, queries)
        trained.append(attachment.routing.routing_vector.detach())
        logits.update({query.text: None for query in queries})
        return result

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "_terms", watched)
        patched.setattr(
            Trainer, "_update", lambda self, terms: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        go_on(old, model, tokenizer)
    with old.attached(model, tokenizer) as routed:
        used = routed.routing(list(logits)).routing_vector
    torch.testing.assert_close(trained[0], used, atol=1e-4, rtol=0)


def test_releasing_undoes_absorbing():
    generator = torch.Generator().manual_seed(0)
    router = Router(7, 2, 3, 4, 5, generator)
    before = {name: value.clone() for name, value in router.state_dict().items()}
    mean = torch.randn(7, generator=generator)
    std = torch.rand(7, generator=generator) + 0.1
    router.absorb(mean, std)
    assert not torch.allclose(router.alpha[0].weight, before["alpha.0.weight"])
    router.release(mean, std)
    for name, value in router.state_dict().items():
        torch.testing.assert_close(value, before[name])


def test_a_channel_that_says_nothing_now_keeps_its_weights(old):
    """Divided by infinity they would be lost to prompts for which it says something."""
    n_features = old.description.n_features
    mean = torch.randn(n_features, generator=torch.Generator().manual_seed(0))
    std = torch.ones(n_features)
    std[3] = torch.inf
    router = Router(n_features, 2, 6, 3, 13)
    start = old.as_start()
    scale = start.scale((mean, std))
    start.put_into(router, scale)
    router.absorb(*scale)
    for name, value in router.state_dict().items():
        torch.testing.assert_close(value, old.router.state_dict()[name], atol=1e-5, rtol=1e-4)


def test_nothing_is_extracted(old, model, tokenizer, monkeypatch):
    monkeypatch.setattr(stages, "extract", lambda *args: pytest.fail("extracted"))
    go_on(old, model, tokenizer)


@pytest.mark.slow
def test_it_learns_the_new_task(old, model, tokenizer):
    texts = [NEW.prompt(row) for row in NEW.train]
    labels = torch.tensor([row.label for row in NEW.train])

    def loss_of(icr):
        with icr.attached(model, tokenizer) as routed:
            scores = routed.score(texts, NEW.spec.options)
        return torch.nn.functional.cross_entropy(scores, labels)

    new = go_on(old, model, tokenizer, config=dataclasses.replace(TRAINING, epochs=12, lr=0.03))
    assert loss_of(new) < 0.9 * loss_of(old)


def test_its_description_lists_all_tasks_and_where_it_comes_from(old, model, tokenizer, tmp_path):
    known = tiny.task("old task")
    new = go_on(old, model, tokenizer, tasks=(known, NEW), keep=5)
    description = new.description
    assert description.tasks == {"old task": 40, "new": 40}
    assert [source.name for source in description.sources] == ["old task", "new"]
    assert description.sources[0] == old.description.sources[0]
    assert (description.sources[1].n_prompts, description.sources[1].n_queries) == (0, 24)
    assert description.origin.weights == old.digest()
    assert description.origin.rehearsed == {"old task": 5}
    assert description.n_taken("old task") == old.description.n_taken("old task")
    assert description.n_taken("new") == (0, 24)
    new.save_pretrained(tmp_path)
    assert InContextRouter.from_pretrained(tmp_path) == new
    assert "trained on again: 5 rows of old task" in (tmp_path / "README.md").read_text()


def test_a_router_that_began_anew_says_nothing_of_an_origin(old, tmp_path):
    old.save_pretrained(tmp_path)
    assert "origin" not in load_json(tmp_path / "config.json")
    assert "goes on from" not in (tmp_path / "README.md").read_text()


def test_a_chain_of_starts_keeps_what_every_task_gave(old, model, tokenizer):
    second = go_on(old, model, tokenizer)
    third_task = dataclasses.replace(NEW, spec=dataclasses.replace(NEW.spec, name="third"))
    third = go_on(second, model, tokenizer, tasks=[third_task])
    assert third.description.origin.taken == {"old task": (12, 24), "new": (0, 24)}
    assert list(third.description.tasks) == ["old task", "new", "third"]


def test_rehearsal_trains_on_rows_of_the_known_task(old, model, tokenizer, monkeypatch):
    queries = []
    monkeypatch.setattr(Trainer, "run", lambda self: queries.extend(self.queries))
    known = tiny.task("old task")
    go_on(old, model, tokenizer, tasks=(known, NEW), keep=5)
    texts = {query.text for query in queries}
    assert len(texts & {known.prompt(row) for row in known.train}) == 5
    assert len(texts & {NEW.prompt(row) for row in NEW.train}) == 24


@pytest.mark.parametrize("name", ["rank", "hidden_width", "n_prompts"])
def test_a_setting_that_shapes_the_router_is_the_old_ones(name, old, model, tokenizer):
    other = dataclasses.replace(TRAINING, **{name: 2})
    value = getattr(old.description.fit, name)
    with pytest.raises(ValueError, match=f"{name} is {value} in the router to start from and 2"):
        go_on(old, model, tokenizer, config=other)


def test_other_layers_are_refused(old, model, tokenizer):
    with pytest.raises(ValueError, match=re.escape("layers is (3, 4) in the router")):
        go_on(old, model, tokenizer, config=dataclasses.replace(TRAINING, layers=(2, 3)))


def test_another_base_model_is_refused(old, tokenizer):
    with pytest.raises(ValueError, match="the router to start from"):
        go_on(old, tiny.model("llama", seed=1), tokenizer)


def test_a_known_task_needs_keep_and_keep_needs_a_known_task(old, model, tokenizer):
    with pytest.raises(ValueError, match="was fitted on old task already"):
        go_on(old, model, tokenizer, tasks=[tiny.task("old task")])
    with pytest.raises(ValueError, match=r"\(old task\), and none of them is among the tasks"):
        go_on(old, model, tokenizer, keep=3)
    with pytest.raises(ValueError, match="give `start`"):
        go_on(None, model, tokenizer, keep=3)


def test_a_known_name_with_another_template_is_refused(old, model, tokenizer):
    renamed = dataclasses.replace(NEW, spec=dataclasses.replace(NEW.spec, name="old task"))
    with pytest.raises(ValueError, match="give one of the two another name"):
        go_on(old, model, tokenizer, tasks=[renamed], keep=3)


def test_a_known_name_that_is_scored_otherwise_is_refused(old, model, tokenizer):
    task = tiny.task("old task")
    summed = dataclasses.replace(task, spec=dataclasses.replace(task.spec, label_scoring="sum"))
    with pytest.raises(ValueError, match="label_scoring 'first', not 'sum'"):
        go_on(old, model, tokenizer, tasks=[summed, NEW], keep=3)


def test_a_warm_start_that_was_stopped_goes_on_to_the_same_router(
    old, model, tokenizer, tmp_path, monkeypatch
):
    whole = go_on(old, model, tokenizer)
    update, steps = Trainer._update, []

    def interrupted(self, terms):
        if len(steps) == 2:
            raise KeyboardInterrupt
        steps.append(1)
        update(self, terms)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "_update", interrupted)
        go_on(old, model, tokenizer, folder=tmp_path)
    assert "training up to step 2" in stages.progress_in(tmp_path)
    resumed = go_on(old, model, tokenizer, folder=tmp_path)
    assert resumed.digest() == whole.digest()
    assert resumed == whole


def test_the_old_router_is_left_as_it_is(old, model, tokenizer):
    digest = old.digest()
    go_on(old, model, tokenizer)
    assert old.digest() == digest


def test_the_same_fit_with_and_without_a_start_are_two(old, model, tokenizer, tmp_path, caplog):
    config = old.as_start().settings(TRAINING)
    InContextRouter.fit(model, tokenizer, [NEW], config, folder=tmp_path)
    go_on(old, model, tokenizer, folder=tmp_path)
    assert "start was None" in caplog.text


LONG = dataclasses.replace(TRAINING, n_queries=30, epochs=1)


@pytest.fixture(scope="module")
def gated(config, model, tokenizer):
    longer = dataclasses.replace(config, n_queries=30, epochs=1)
    return InContextRouter.fit(model, tokenizer, [tiny.task("old task")], longer)


def test_a_gate_keeps_what_it_knew_of_the_old_tasks(gated, model, tokenizer, tmp_path):
    new = go_on(gated, model, tokenizer, config=LONG)
    alone, added = new.gate.split()
    assert alone == gated.gate
    assert added.numbers.rows == (30,)
    new.save_pretrained(tmp_path)
    assert InContextRouter.from_pretrained(tmp_path) == new


def test_a_gate_stands_in_the_order_of_the_tasks_whatever_is_rehearsed(gated, model, tokenizer):
    tasks = (NEW, tiny.task("old task"))
    new = go_on(gated, model, tokenizer, tasks=tasks, config=LONG, keep=28)
    assert list(new.description.tasks) == ["old task", "new"]
    assert new.gate.split()[0] == gated.gate
    few = go_on(gated, model, tokenizer, tasks=tasks, config=LONG, keep=2)
    assert few.gate.split()[0] == gated.gate


def test_a_start_without_a_gate_gives_one_only_where_enough_is_rehearsed(
    gated, model, tokenizer, caplog
):
    start = dataclasses.replace(gated, gate=None)
    assert go_on(start, model, tokenizer, config=LONG).gate is None
    assert "old task has 0; the router to start from has no gate" in caplog.text
    tasks = (NEW, tiny.task("old task"))
    new = go_on(start, model, tokenizer, tasks=tasks, config=LONG, keep=27)
    assert new.gate.numbers.rows == (27, 30)


def of_few_rows(name, n_validation):
    whole = tiny.task(name, n_train=20)
    return dataclasses.replace(whole, validation=whole.validation[:n_validation])


@pytest.mark.parametrize("n_validation", [6, 4])
def test_rows_that_the_old_router_may_have_learned_from_are_rehearsed_or_left_out(
    n_validation, model, tokenizer, monkeypatch
):
    """Its fit learned from the slices that were too small to validate on."""
    known = of_few_rows("old task", n_validation)
    new = of_few_rows("new", n_validation)
    watched = {"min_steps": 6, "patience": 2, "epochs": 1}
    config = FitConfig(
        (3, 4), rank=2, n_prompts=8, demos_per_class=1, encoder=HIDDEN, hidden_width=7, **watched
    )
    learned = []
    judged = []

    def noted(self):
        learned.extend(query for query in self.queries if query.task == "old task")
        judged.extend(query for query in self.held if query.task == "old task")

    with monkeypatch.context() as patched:
        patched.setattr(stages, "chosen_by_folds", lambda *args: None)
        patched.setattr(Trainer, "run", lambda self: None)
        old = InContextRouter.fit(model, tokenizer, [known], config)
        patched.setattr(Trainer, "run", noted)
        go_on(old, model, tokenizer, (known, new), FitConfig(**watched), keep=2)
    assert len({query.text for query in learned}) == 2
    assert not judged


def test_folds_of_a_warm_start_judge_the_new_task_alone(old, model, tokenizer, trainers, tmp_path):
    tasks = (of_few_rows("old task", 4), of_few_rows("new", 4))
    config = FitConfig(min_steps=6, patience=2, epochs=1)
    new = go_on(old, model, tokenizer, tasks, config, keep=5, folder=tmp_path)
    *folds, last = trainers
    rehearsed = [query.task for query in last.queries].count("old task")
    assert rehearsed == 5
    for fold in folds:
        assert [query.task for query in fold.queries].count("old task") == rehearsed
        assert {query.task for query in fold.held} == {"new"}
    words = Account.of(tmp_path).in_words()
    assert f"of {new.description.n_taken('new')[1]} rows" in words
