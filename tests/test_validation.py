"""A training that is watched: how long it takes, which router it keeps, and what it learns from."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

import tiny
from icrouting import FitConfig, InContextRouter
from icrouting.config import EARLIER, PAPER
from icrouting.decoder.decoder import Decoder
from icrouting.fitting import queries as reading
from icrouting.fitting import training
from icrouting.fitting.rows import n_judged, rows_to_learn_from
from icrouting.fitting.training import Trainer
from icrouting.fitting.validation import Look, Watch
from icrouting.methods import Settings, controls
from icrouting.routing.features import features_of
from icrouting.routing.router import Router
from icrouting.runtime.storage import load_json, save_json

OPTIONS = ["negative", "positive"]
SETTINGS = FitConfig(
    (3, 4),
    rank=3,
    n_prompts=6,
    n_queries=9,
    demos_per_class=1,
    encoder="hidden",
    hidden_width=7,
    lr=0.01,
    batch_size=4,
    epochs=1,
    min_steps=30,
    patience=2,
)


def task(n_validation=24, n_train=24):
    """A toy task with as many validation rows."""
    whole = tiny.task(n_train=n_train + n_validation)
    train = whole.train[:n_train]
    return dataclasses.replace(whole, train=train, validation=whole.train[n_train:])


def fit(config=SETTINGS, folder=None, of=None):
    """A fit on a tiny model."""
    return InContextRouter.fit(
        tiny.model("llama"), tiny.tokenizer(), [of or task()], config, folder=folder
    )


def weights(icr):
    return torch.cat([value.flatten() for value in icr.router.state_dict().values()])


def changed(**changes):
    return dataclasses.replace(SETTINGS, **changes)


def test_few_rows_are_passed_over_until_min_steps_are_taken():
    # Three batches of four: two passes are six steps.
    assert changed(epochs=2, min_steps=40).n_steps(9) == 40
    assert changed(epochs=2, min_steps=40).n_passes(9) == pytest.approx(40 / 3)


def test_where_rows_are_many_the_passes_say_how_many_steps():
    assert changed(epochs=2, min_steps=40).n_steps(1000) == 500
    assert changed(epochs=2, min_steps=0).n_steps(9) == 6


def test_every_pass_of_a_training_reads_every_query_once(trainers):
    fit(changed(min_steps=8, patience=0))
    (trainer,) = trainers
    rows = []
    for step in range(8):
        trainer.step = step
        rows.append(trainer._rows())
    first_pass = [*rows[0], *rows[1], *rows[2]]
    second_pass = [*rows[3], *rows[4], *rows[5]]
    assert sorted(first_pass) == sorted(second_pass) == list(range(9))
    assert first_pass != second_pass


def test_a_look_is_what_the_attached_router_answers(trainers):
    of = task()
    icr = fit(changed(min_steps=10, patience=99), of=of)
    (trainer,) = trainers
    prompts = [of.prompt(row) for row in of.validation]
    labels = torch.tensor([row.label for row in of.validation])
    with icr.attached(tiny.model("llama"), tiny.tokenizer()) as routed:
        scores = routed.score(prompts, OPTIONS)
    look = trainer.watch.best_look
    # Rounding of other batches, in float32.
    assert look.loss == pytest.approx(
        torch.nn.functional.cross_entropy(scores, labels).item(), abs=1e-4
    )
    assert look.accuracy == pytest.approx((scores.argmax(1) == labels).float().mean().item())
    # An untrained router answers otherwise, so that the comparison says something.
    assert abs(trainer.watch.looks[0].loss - look.loss) > 1e-3


def test_the_router_of_the_least_validation_loss_is_kept(trainers, monkeypatch):
    seen = {}
    add = Watch.add

    def noted(self, look, router):
        seen[look.loss] = {name: value.clone() for name, value in router.state_dict().items()}
        add(self, look, router)

    monkeypatch.setattr(Watch, "add", noted)
    fit(changed(min_steps=60))
    (trainer,) = trainers
    assert min(seen) < list(seen)[-1], "the last router is not the best one"
    best = seen[min(seen)]
    # Behind the first layers, which absorb the features' scale, the weights stay what they were.
    for name in ("alpha.2.weight", "gamma.2.weight"):
        assert torch.equal(trainer.router.state_dict()[name], best[name])


def test_a_watch_is_over_when_the_loss_has_not_fallen_for_its_patience():
    watch = Watch([object()], patience=2, n_steps=100)
    router = Router(4, 2, 3, 2, 5, torch.Generator().manual_seed(0))
    over = []
    for step, loss in enumerate([0.7, 0.6, 0.65, 0.6, 0.5]):
        watch.add(Look(step, loss, 0.5), router)
        over.append(watch.is_over)
    # A loss that is as low as the least has not fallen.
    assert over == [False, False, False, True, False]


def test_without_patience_no_row_is_held_back(trainers):
    fit(changed(patience=0))
    assert trainers[0].held == []


def test_looks_leave_a_training_as_it_is(monkeypatch):
    looked = fit(changed(min_steps=1))
    # Where passes take steps enough, the router is looked at and the last one kept all the same.
    monkeypatch.setattr(training.Trainer, "_judge", lambda *args: None)
    unseen = fit(changed(min_steps=1))
    assert torch.equal(weights(looked), weights(unseen))


@pytest.mark.parametrize("stop_at", [1, 10, 25])
def test_a_watched_fit_that_was_stopped_goes_on_to_the_same_router(
    stop_at, trainers, tmp_path, monkeypatch
):
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 3)
    whole = fit()
    update = Trainer._update

    def interrupted(self, terms):
        if self.step == stop_at:
            raise KeyboardInterrupt
        update(self, terms)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "_update", interrupted)
        fit(folder=tmp_path)
    resumed = fit(folder=tmp_path)
    assert torch.equal(weights(resumed), weights(whole))
    assert trainers[2].watch.looks == trainers[0].watch.looks


def test_a_fit_stopped_while_it_is_looked_at_loses_no_look(trainers, tmp_path, monkeypatch):
    whole = fit()

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(training, "answered", interrupted)
        fit(folder=tmp_path)
    resumed = fit(folder=tmp_path)
    assert torch.equal(weights(resumed), weights(whole))
    assert trainers[2].watch.looks == trainers[0].watch.looks


def test_a_finished_training_that_is_taken_up_takes_no_step(tmp_path, monkeypatch):
    whole = fit(folder=tmp_path)
    monkeypatch.setattr(Trainer, "_update", lambda *args: pytest.fail("a step was taken"))
    assert torch.equal(weights(fit(folder=tmp_path)), weights(whole))


def test_the_log_has_validation_at_the_steps_that_were_looked_at(trainers, tmp_path):
    fit(changed(min_steps=20, patience=99), folder=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    looks = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    assert looks == {look.step: look.loss for look in trainers[0].watch.looks if look.step}
    assert list(looks) == [10, 20]


def learned_and_held(n_validation, patience):
    """The texts that are learned from, and those that are validated on."""
    of = task(n_validation, n_train=12)
    model = tiny.model("llama")
    decoder = Decoder.of(model, tiny.tokenizer())
    features = features_of("hidden", decoder, "cpu")
    config = changed(n_queries=1000, patience=patience)
    queries, scale = reading.training_queries(decoder, [of], features, 3, config)
    held = reading.held_queries(decoder, [of], features, scale, 3, config)
    return [query.text for query in queries], [query.text for query in held]


def test_a_slice_too_small_to_validate_on_is_learned_from():
    learned, held = learned_and_held(n_validation=9, patience=2)
    assert len(set(learned)) == 12 + 9
    assert held == []


def test_a_slice_that_is_validated_on_is_not_learned_from():
    learned, held = learned_and_held(n_validation=10, patience=2)
    assert len(set(learned)) == 12
    assert len(set(held)) == 10
    assert not set(learned) & set(held)


def test_without_patience_the_slice_stays_apart():
    learned, _ = learned_and_held(n_validation=9, patience=0)
    assert len(set(learned)) == 12


def test_the_paper_has_no_least_number_of_steps_and_keeps_the_last_router():
    assert (PAPER.min_steps, PAPER.patience) == (0, 0)


def test_a_router_of_an_earlier_version_was_fitted_without_these_settings(tmp_path):
    earlier = fit(changed(**EARLIER))
    earlier.save_pretrained(tmp_path)
    assert not EARLIER.keys() & load_json(tmp_path / "config.json")["fit"].keys()
    again = InContextRouter.from_pretrained(tmp_path)
    assert again.description == earlier.description


def test_a_router_keeps_the_settings_that_earlier_versions_lack(tmp_path):
    icr = fit(changed(min_steps=11, patience=3))
    icr.save_pretrained(tmp_path)
    again = InContextRouter.from_pretrained(tmp_path)
    assert (again.description.fit.min_steps, again.description.fit.patience) == (11, 3)


def test_a_fit_that_an_earlier_version_began_is_set_aside_for_other_steps(tmp_path, caplog):
    fit(changed(**EARLIER), folder=tmp_path)
    settings = load_json(tmp_path / "fit.json")
    save_json(tmp_path / "fit.json", {k: v for k, v in settings.items() if k not in EARLIER})
    fit(changed(**EARLIER), folder=tmp_path)
    assert "set aside" not in caplog.text
    fit(folder=tmp_path)
    assert "min_steps was 0, is 30" in caplog.text
    assert (tmp_path / "former-1" / "training.safetensors").exists()


def test_where_passes_take_steps_enough_the_last_router_is_kept(trainers):
    fit(changed(min_steps=20, epochs=9))
    (trainer,) = trainers
    assert trainer.step == 27
    assert trainer.watch.looks
    assert not trainer.watch.best


def test_a_task_without_validation_rows_leaves_its_share_to_the_others():
    judging = task(n_validation=120, n_train=9)
    rehearsed = dataclasses.replace(tiny.task("old"), validation=())
    assert n_judged([judging, rehearsed], SETTINGS) == {"toy": 100, "old": 0}
    other = dataclasses.replace(judging, spec=dataclasses.replace(judging.spec, name="other"))
    assert n_judged([judging, rehearsed, other], SETTINGS) == {"toy": 50, "old": 0, "other": 50}


def test_without_min_steps_a_small_slice_stays_apart():
    of = task(n_validation=9, n_train=12)
    assert rows_to_learn_from(of, [of], changed(min_steps=0)) == of.train


def test_a_control_that_an_earlier_version_saved_is_known_by_the_same_words():
    control = controls.Refit(Settings(encoder="hidden"))
    control.config = changed(**EARLIER)
    control._features = lambda: SimpleNamespace(fingerprint="hidden")
    assert "min_steps" not in control.depends_on()
    assert "patience" not in control.depends_on()
    control.config = changed()
    assert "min_steps=30, patience=2, " in control.depends_on()
