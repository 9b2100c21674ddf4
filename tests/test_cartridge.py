"""A cartridge: demonstrations before any step, and distilled from more of them afterwards."""

import dataclasses

import pytest
import torch

import tiny
from fitted import fit_method
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.labels import Parting
from icrouting.decoder.scoring import score
from icrouting.methods import Settings
from icrouting.methods.cartridge import (
    Cartridge,
    Lesson,
    demonstration_tokens,
    lesson_loss,
    option_partings,
    reached,
)
from icrouting.tasks.prompts import Prompt, few_shot, zero_shot
from test_label_fits import relabelled
from test_soft_prompts import same, whole

TASK = tiny.task("toy", n_test=30)
OTHER = tiny.task("other", n_test=30)
SMALL = {"tries": 1, "train_rows": 8, "train_epochs": 2, "demos_per_class": 2}


def fitted(model, tokenizer, tasks=(TASK,), **changes):
    return fit_method(Cartridge(Settings(**SMALL | changes)), model, tokenizer, tasks)


def untrained(model, tokenizer, demos, task=TASK):
    method = Cartridge(Settings())
    method.decoder = Decoder.of(model, tokenizer)
    tokens = demonstration_tokens(method.decoder, [(task, demo) for demo in demos])
    with torch.no_grad():
        method.soft_prompt = method.start(tokens)
    return method


def scores_of(decoder, task, prompts):
    options = task.spec.options
    return score(decoder, prompts, options, label_scoring=task.spec.label_scoring)


@pytest.mark.parametrize("label_scoring", ["first", "sum"])
@pytest.mark.parametrize("family", tiny.ALL_CONFIGS)
def test_before_any_step_it_is_the_few_shot_prompt_with_its_demonstrations(
    family, label_scoring, tokenizer
):
    model = tiny.model_of(family)
    if getattr(model.config, "sliding_window", None):
        # Padding counts for a window, and the two ways pad otherwise.
        model.config.sliding_window = 200
    spec = dataclasses.replace(TASK.spec, label_scoring=label_scoring)
    task = dataclasses.replace(TASK, spec=spec)
    demos = task.train[:4]
    method = untrained(model, tokenizer, demos, task)
    rows = task.test[:5]
    pairs = [(task, demo) for demo in demos]
    expected = scores_of(method.decoder, task, [few_shot(task, row, pairs) for row in rows])
    bare = [zero_shot(task, row) for row in rows]
    plain = scores_of(method.decoder, task, bare)
    with method.applied(task):
        found = scores_of(method.decoder, task, bare)
    assert (found - expected).abs().max() < 1e-4
    assert (found - plain).abs().max() > 1e-2


def test_the_untrained_setting_is_the_start(tokenizer):
    model = tiny.model("llama")
    trained = fitted(model, tokenizer)
    start = trained._distilled(trained.soft_prompt, [], 0, lr=0.0)
    assert torch.equal(start["soft_prompt"], trained.soft_prompt)
    assert 0.0 in [setting["lr"] for setting in Cartridge.grid]


def test_the_loss_goes_down_and_the_first_token_stays(tokenizer):
    model = tiny.model("llama")
    short = fitted(model, tokenizer, train_epochs=1)
    long = fitted(model, tokenizer, train_epochs=12)
    n_steps = len(short.losses)
    assert long.losses[-n_steps:].mean() < 0.7 * long.losses[:n_steps].mean()
    assert torch.equal(short.soft_prompt[0], long.soft_prompt[0])
    assert not torch.equal(short.soft_prompt[1:], long.soft_prompt[1:])


def test_no_label_of_a_lesson_s_row_is_read(tokenizer):
    """What the teacher says of a row is the same whatever its label is."""
    model = tiny.model("llama")
    method = Cartridge(Settings(**SMALL))
    method.decoder = Decoder.of(model, tokenizer)
    flipped = dataclasses.replace(TASK.train[0], label=1 - TASK.train[0].label)
    assert option_partings(method.decoder, TASK, TASK.train[0]) == option_partings(
        method.decoder, TASK, flipped
    )


def test_a_loss_is_the_kl_over_options_by_hand(tokenizer):
    model = tiny.model("llama")
    decoder = Decoder.of(model, tokenizer)
    prompts = [[5, 9, 17], [40, 3]]
    teachers = [torch.tensor([0.25, 0.75]).log(), torch.tensor([0.2, 0.5, 0.3]).log()]
    following = [[7, 12], [7, 100, 30]]
    expected = []
    for place, tokens in enumerate(prompts):
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, -1]
        student = logits[following[place]].softmax(0)
        teacher = teachers[place].exp()
        expected.append(float((teacher * (teacher / student).log()).sum()))
    lessons = [Lesson(*parts, 1.0) for parts in zip(prompts, following, teachers, strict=True)]
    with torch.no_grad():
        loss = lesson_loss(decoder, lessons)
    assert float(loss) == pytest.approx(sum(expected) / 2, abs=1e-5)


def test_weighted_places_sum_to_the_kl_over_whole_options():
    """By the chain rule, of options (1, 2), (1, 3, 4), (1, 3, 5) and (6)."""
    places = [Parting([], [1, 6], 0), Parting([1], [2, 3], 0), Parting([1, 3], [4, 5], 0)]
    teacher = [torch.tensor([p, 1 - p]) for p in (0.7, 0.2, 0.4)]
    student = [torch.tensor([p, 1 - p]) for p in (0.5, 0.6, 0.9)]

    def options(ways):
        (one, other), (early, late), (four, five) = ways
        return torch.stack([one * early, one * late * four, one * late * five, other])

    weights = reached(places, [shares.log() for shares in teacher])
    by_place = 0.0
    for weight, p, q in zip(weights, teacher, student, strict=True):
        by_place += weight * float((p * (p / q).log()).sum())
    p, q = options(teacher), options(student)
    assert by_place == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-6)


def test_a_place_at_which_options_part_comes_once(tokenizer):
    decoder = Decoder.of(tiny.model("llama"), tokenizer)
    task = relabelled(TASK)
    beginnings = [parting.beginning for parting in option_partings(decoder, task, task.train[0])]
    assert beginnings[0] == []
    assert len(beginnings) == len({tuple(beginning) for beginning in beginnings}) > 1


def test_over_tasks_the_prefix_shows_one_row_of_each_class_of_each(tokenizer):
    model = tiny.model("llama")
    alone, pooled = fitted(model, tokenizer), fitted(model, tokenizer, (TASK, OTHER))
    assert len(pooled.soft_prompt) > len(alone.soft_prompt)
    assert pooled.n_labelled == 2 * alone.n_labelled == 2 * SMALL["train_rows"]
    assert pooled.n_trained == pooled.soft_prompt[1:].numel()


def test_leaving_restores_the_model(tokenizer):
    model = tiny.model("llama")
    method = fitted(model, tokenizer)
    prompts = [Prompt("", TASK.prompt(row)) for row in TASK.test[:3]]
    plain = scores_of(method.decoder, TASK, prompts)
    before = whole(model)
    with method.applied(TASK):
        assert not torch.allclose(scores_of(method.decoder, TASK, prompts), plain, atol=1e-3)
    assert same(before, whole(model))
    assert torch.equal(scores_of(method.decoder, TASK, prompts), plain)
