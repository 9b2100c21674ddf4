"""In-context vectors: their direction, and the turn that keeps norms."""

import dataclasses

import pytest
import torch

import tiny
from fitted import fit_method
from icrouting.decoder.batches import pad, tokenize
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import branches_of, layers_of
from icrouting.decoder.hooks import recorded
from icrouting.decoder.passes import next_token_logits
from icrouting.decoder.scoring import option_ids, score_options
from icrouting.decoder.states import last_outputs, mean_last_outputs
from icrouting.methods import Settings, icv
from icrouting.methods.icv import FORMS, ICV, icv_direction, turned
from icrouting.tasks.prompts import Prompt, few_shot

TASK, OTHER = tiny.task("toy", n_test=30), tiny.task("other", n_test=30)
LAW_FAMILIES = ("llama", "qwen3", "gemma3", "gpt_neox")
ALL = list(tiny.ALL_CONFIGS)


def fitted(model, tokenizer, tasks=(TASK,), **changes):
    method = ICV(Settings(**{"demos_per_class": 2, "tries": 1, **changes}))
    return fit_method(method, model, tokenizer, tasks)


def prompts_of(n=5):
    return [
        TASK.prompt(example) + "." * (3 * i % 7) + ":" for i, example in enumerate(TASK.test[:n])
    ]


def mlps_of(model):
    return [branches_of(model, layer)[1] for layer in range(len(layers_of(model)))]


def logits_of(model, tokenizer, texts):
    with torch.no_grad():
        return next_token_logits(model, pad(tokenize(tokenizer, texts), 1))


@pytest.mark.parametrize("family", ALL)
def test_what_every_mlp_adds_keeps_its_norm_and_turns_towards_the_direction(family, tokenizer):
    model, texts = tiny.model_of(family), prompts_of()
    method = fitted(model, tokenizer)
    # of every layer by itself: behind a turned layer, the next one's own output is another
    for layer, mlp in enumerate(mlps_of(model)):
        with recorded([mlp]) as outputs:
            logits_of(model, tokenizer, texts)
            plain = outputs[0]
        after = turned(plain, method.directions[layer], 0.1)
        assert torch.allclose(after.norm(dim=-1), plain.norm(dim=-1), rtol=1e-5)
        cosines = [
            torch.cosine_similarity(found, method.directions[layer], dim=-1)
            for found in (plain, after)
        ]
        assert (cosines[1] > cosines[0]).all()
    with recorded([mlps_of(model)[0]]) as outputs:
        logits_of(model, tokenizer, texts)
        plain = outputs[0]
    with method.applied(TASK), recorded([mlps_of(model)[0]]) as outputs:
        changed = logits_of(model, tokenizer, texts)
    assert torch.equal(outputs[0], turned(plain, method.directions[0], 0.1))
    assert (changed - logits_of(model, tokenizer, texts)).abs().max() > 1e-2


@pytest.mark.parametrize("family", LAW_FAMILIES)
def test_no_strength_changes_nothing(family, tokenizer):
    model, texts = tiny.model_of(family), prompts_of()
    method, plain = fitted(model, tokenizer), logits_of(model, tokenizer, texts)
    method.strength = torch.tensor(0.0)
    with method.applied(TASK):
        assert torch.allclose(logits_of(model, tokenizer, texts), plain, atol=2e-5)
    assert torch.equal(logits_of(model, tokenizer, texts), plain)


def test_the_turn_is_the_published_one_token_by_token():
    generator = torch.Generator().manual_seed(6)
    states, direction = (
        torch.randn(3, 4, 7, generator=generator),
        5 * torch.randn(7, generator=generator),
    )
    states[1, 2] = 0
    found = turned(states, direction, 0.3)
    unit, sides = direction / direction.norm(), []
    for row in range(3):
        for token in range(4):
            state = states[row, token]
            size = state.norm()
            if size == 0:
                assert torch.equal(found[row, token], torch.zeros(7))
                continue
            against = float(-(state @ unit) / size)
            sides.append(against > 0)
            mixed = state / size + 0.3 * (1 + max(0.0, against)) * unit
            assert torch.allclose(found[row, token], size * mixed / mixed.norm(), atol=1e-5)
    assert len(set(sides)) == 2
    assert turned(states.bfloat16(), direction, 0.3).dtype == torch.bfloat16


def test_the_direction_is_the_mean_and_the_first_principal_axis_of_the_covariance():
    generator = torch.Generator().manual_seed(1)
    changes = torch.randn(9, 30, generator=generator) * torch.linspace(0.1, 2, 30) + 3
    centred = changes - changes.mean(0)
    axis = torch.linalg.eigh((centred.T @ centred).double()).eigenvectors[:, -1].float()
    scores = centred @ axis
    axis = axis * scores[scores.abs().argmax()].sign()
    found = icv_direction(changes) - changes.mean(0)
    assert torch.allclose(found, axis, atol=1e-5)
    assert float(found.norm()) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(
        icv_direction(2 * changes.mean(0) - changes) - changes.mean(0), -found, atol=1e-5
    )


def test_a_single_change_is_its_own_direction():
    change = torch.randn(1, 30, generator=torch.Generator().manual_seed(1))
    assert torch.equal(icv_direction(change), change[0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", [*LAW_FAMILIES, "opt"])
def test_directions_come_from_the_last_tokens_of_both_texts(form, family, tokenizer, monkeypatch):
    """Embedding included, whose width OPT chooses by itself."""
    monkeypatch.setattr(icv, "FORMS", {form: FORMS[form]})
    seen, balanced = [], icv.balanced_demos
    monkeypatch.setattr(
        icv, "balanced_demos", lambda *args: seen.append(balanced(*args)) or seen[-1]
    )
    model = tiny.model_of(family)
    method = fitted(model, tokenizer)
    (demos,) = seen

    def states(text):
        with recorded([model.get_input_embeddings(), *layers_of(model)]) as outputs:
            logits_of(model, tokenizer, [text])
        return torch.cat([output.reshape(-1, output.shape[-1])[-1] for output in outputs])

    changes = []
    for demo in demos:
        bare = TASK.prompt(demo)
        others = [(TASK, other) for other in demos if other is not demo]
        told = (
            f"{bare} {TASK.answer(demo)}" if form == "pair" else few_shot(TASK, demo, others).text
        )
        assert told.endswith(bare) == (form != "pair")
        changes.append(states(told) - states(bare))
    n_layers, width = len(layers_of(model)), model.config.hidden_size
    expected = icv_direction(torch.stack(changes))
    assert len(expected) > n_layers * width
    assert torch.allclose(method.directions.flatten(), expected[-n_layers * width :], atol=2e-4)
    assert method.n_cached(TASK) == n_layers * width
    assert method.n_labelled == 4


def test_strength_and_form_are_chosen_on_validation_rows_the_published_first(
    tokenizer, monkeypatch
):
    accuracies = iter((0.5, 0.7, 0.1, 0.7, 0.2, 0.1, 0.3, 0.3))
    monkeypatch.setattr(ICV, "validated", lambda self: next(accuracies))
    method, first = (fitted(tiny.model("llama"), tokenizer, tries=tries) for tries in (12, 1))
    assert [(tried["strength"], tried["form"]) for tried in method.tried] == [
        (strength, form)
        for strength in (0.1, 0.05, 0.02, 0.2)
        for form in ("pair", "few-minus-zero")
    ]
    assert float(first.strength) == float(method.strength) == pytest.approx(0.1)
    assert not torch.allclose(first.directions, method.directions)
    assert method.n_labelled == 4 + len(TASK.validation)


@pytest.mark.parametrize("form", FORMS)
def test_one_demonstration_is_enough(form, tokenizer, monkeypatch):
    monkeypatch.setattr(icv, "FORMS", {form: FORMS[form]})
    model = tiny.model("llama")
    method = fitted(model, tokenizer, [dataclasses.replace(TASK, train=TASK.train[:1])])
    plain = logits_of(model, tokenizer, prompts_of())
    with method.applied(TASK):
        changed = logits_of(model, tokenizer, prompts_of())
    assert torch.isfinite(changed).all()
    # alone, a demonstration has no others to stand behind, so nothing changes
    assert torch.allclose(changed, plain, atol=2e-5) == (form == "few-minus-zero")


@pytest.mark.parametrize("family", LAW_FAMILIES)
def test_a_batch_padded_on_the_left_scores_like_single_prompts(family, tokenizer):
    model, prompts = tiny.model_of(family), prompts_of()
    method = fitted(model, tokenizer)
    padded = tokenizer(prompts, return_tensors="pt", padding=True)
    positions = (padded.attention_mask.cumsum(1) - 1).clamp(min=0)
    ids = torch.tensor([option_ids(tokenizer, prompt, TASK.spec.options) for prompt in prompts])
    with method.applied(TASK), torch.no_grad():
        logits = model(**padded, position_ids=positions).logits[:, -1]
        alone = [
            score_options(model, tokenizer, [Prompt("", prompt)], TASK.spec.options)
            for prompt in prompts
        ]
    assert torch.allclose(logits.gather(1, ids), torch.cat(alone), atol=1e-4)


def test_source_tasks_are_pooled_and_none_is_refused(tokenizer):
    model = tiny.model("llama")
    pooled, alone = fitted(model, tokenizer, [TASK, OTHER]), fitted(model, tokenizer, [TASK])
    assert not torch.allclose(pooled.directions, alone.directions)
    assert pooled.n_labelled == 8
    with pytest.raises(ValueError, match="give at least one source task"):
        fitted(model, tokenizer, [])


def test_last_outputs_stand_in_the_order_of_the_texts(tokenizer, monkeypatch):
    monkeypatch.setattr("icrouting.decoder.states.TOKEN_BUDGET", 40)
    model, texts = tiny.model("llama"), prompts_of(7)
    blocks = list(layers_of(model))
    found, likeliest = last_outputs(Decoder.of(model, tokenizer), blocks, texts)
    for row, text in enumerate(texts):
        with recorded(blocks) as outputs:
            logits = logits_of(model, tokenizer, [text])
        assert int(likeliest[row]) == int(logits.argmax())
        for states, output in zip(found, outputs, strict=True):
            assert torch.allclose(states[row], output[0, -1], atol=1e-5)
    assert torch.equal(
        mean_last_outputs(Decoder.of(model, tokenizer), blocks, texts)[2], found[2].mean(0)
    )
