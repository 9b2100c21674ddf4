"""What LIVE and M2IV promise: their laws, and their loop against slow obvious versions."""

import dataclasses

import numpy as np
import pytest
import torch

import tiny
from fitted import fit_method
from icrouting.decoder.batches import pad
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import all_branches_of, branches_of, layers_of
from icrouting.decoder.hooks import recorded
from icrouting.decoder.passes import next_token_logits
from icrouting.decoder.scoring import option_ids, score_options
from icrouting.decoder.states import last_of
from icrouting.methods import Settings
from icrouting.methods import distilling as d
from icrouting.methods.live import Live, turned
from icrouting.methods.m2iv import M2IV, synergy
from icrouting.tasks.prompts import few_shot

TASK = tiny.task("toy", n_test=30)
OTHER = tiny.task("others", n_test=30)
FAMILIES = ("llama", "qwen3", "gemma3", "gpt_neox")
KINDS = pytest.mark.parametrize("kind", [Live, M2IV], ids=lambda kind: kind.name)
OPTIONS = TASK.spec.options


def prompts():
    # of mixed lengths
    return [
        TASK.prompt(example) + "." * (3 * i % 7) + ":" for i, example in enumerate(TASK.test[:7])
    ]


def fitted(kind, model, tokenizer, tasks=(TASK,), seed=0, **changes):
    method = kind(
        Settings(
            **{"demos_per_class": 2, "train_rows": 24, "train_epochs": 4, "tries": 1, **changes}
        )
    )
    return fit_method(method, model, tokenizer, tasks, seed)


def bare(kind, model, tokenizer, strength=0.1, scale=1.0):
    """A method whose vectors were not learned."""
    method = kind(Settings())
    method.decoder = Decoder.of(model, tokenizer)
    n_places = len(layers_of(model)) * (1 if kind is Live else 2)
    generator = torch.Generator().manual_seed(4)
    method.vectors = scale * torch.randn(n_places, model.config.hidden_size, generator=generator)
    method.strengths = torch.full((n_places,), strength)
    return method


def scores(model, tokenizer, method=None):
    if method is None:
        return score_options(model, tokenizer, prompts(), OPTIONS)
    with method.applied(TASK):
        return score_options(model, tokenizer, prompts(), OPTIONS)


@KINDS
@pytest.mark.parametrize("family", FAMILIES)
def test_at_strength_nought_nothing_changes_and_else_something(kind, family, tokenizer):
    model = tiny.model(family)
    plain = scores(model, tokenizer)
    assert torch.equal(scores(model, tokenizer, bare(kind, model, tokenizer, strength=0.0)), plain)
    assert not torch.allclose(
        scores(model, tokenizer, bare(kind, model, tokenizer)), plain, atol=1e-3
    )
    assert torch.equal(scores(model, tokenizer), plain)


@KINDS
@pytest.mark.parametrize("family", FAMILIES)
def test_both_paddings_score_like_single_prompts(kind, family, tokenizer):
    model = tiny.model(family)
    method = bare(kind, model, tokenizer)
    together = scores(model, tokenizer, method)
    padded = tokenizer(prompts(), return_tensors="pt", padding=True)  # on the left
    positions = (padded.attention_mask.cumsum(1) - 1).clamp(min=0)
    ids = torch.tensor([option_ids(tokenizer, prompt, OPTIONS) for prompt in prompts()])
    with method.applied(TASK), torch.no_grad():
        left = model(**padded, position_ids=positions).logits[:, -1].gather(1, ids)
        alone = [
            model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1] for prompt in prompts()
        ]
    assert torch.allclose(left, together, atol=1e-4)
    assert torch.allclose(torch.stack(alone).gather(1, ids), together, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_live_turns_every_blocks_output_and_keeps_its_norm(family, tokenizer):
    model = tiny.model(family)
    method = bare(Live, model, tokenizer, strength=0.7)
    blocks = list(layers_of(model))
    batch = tokenizer(prompts()[0], return_tensors="pt")
    with (
        recorded(blocks) as before,
        method.applied(TASK),
        recorded(blocks) as after,
        torch.no_grad(),
    ):
        model(**batch)
    for layer, (plain, edit) in enumerate(zip(before, after, strict=True)):
        moved = plain + 0.7 * method.vectors[layer]
        assert torch.allclose(edit.norm(dim=-1), plain.norm(dim=-1), rtol=1e-5)
        assert torch.allclose(
            torch.cosine_similarity(edit, moved, dim=-1), torch.ones(plain.shape[:2]), atol=1e-5
        )
        assert (torch.cosine_similarity(edit, plain, dim=-1) < 0.999).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_m2iv_adds_its_vectors_to_what_each_branch_gives(family, tokenizer):
    """One branch alone, the last layer's MLP: the last block's output moves by the vector."""
    model = tiny.model(family)
    method = bare(M2IV, model, tokenizer)
    batch = tokenizer(prompts()[0], return_tensors="pt")
    last = [layers_of(model)[-1], branches_of(model, len(layers_of(model)) - 1)[1]]
    for place in (-1, -2):
        strengths = torch.zeros(len(method.strengths))
        outputs = []
        for strength in (0.0, 0.6):
            strengths[place] = strength
            with (
                method._edited(method.vectors, strengths.clone()),
                recorded(last) as found,
                torch.no_grad(),
            ):
                model(**batch)
            # the attention branch's vector is read by the MLP too, unless the two are parallel
            outputs.append(found[0] - found[1] if place == -2 else found[0])
        assert torch.allclose(
            outputs[1] - outputs[0], (0.6 * method.vectors[place]).expand_as(outputs[0]), atol=1e-4
        )


def test_turning_copes_with_nought_and_with_the_norms_of_sinks():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 3, 8, generator=generator)
    vector = torch.randn(8, generator=generator)
    hidden[0, 0] = 0
    hidden[1, 2] = 1e4 * hidden[1, 2]
    one = torch.tensor(1.0)
    assert torch.isfinite(turned(hidden, vector, one)).all()
    assert torch.equal(turned(hidden, torch.zeros(8), one), hidden)
    assert torch.equal(turned(hidden, -hidden[0, 1], one)[0, 1], torch.zeros(8))
    half = turned(hidden.half(), vector, one)
    assert half.dtype == torch.float16
    wide = turned(hidden.half().float(), vector, one)
    assert torch.allclose(half.float(), wide, rtol=2e-3, atol=1e-3)
    hidden.requires_grad_()
    turned(hidden, vector, one).sum().backward()
    assert torch.isfinite(hidden.grad).all()


@KINDS
@pytest.mark.parametrize("family", FAMILIES)
def test_every_vector_and_strength_has_a_gradient_and_no_weight(kind, family, tokenizer):
    model = tiny.model(family)
    method = bare(kind, model, tokenizer)
    vectors, strengths = (tensor.requires_grad_() for tensor in (method.vectors, method.strengths))
    batch = pad(tokenizer(prompts()).input_ids, 1)
    with method._edited(vectors, strengths):
        next_token_logits(model, batch).log_softmax(-1)[:, 3].sum().backward()
    assert (vectors.grad.norm(dim=1) > 0).all()
    assert (strengths.grad != 0).all()
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.slow
@KINDS
def test_training_lowers_the_loss_on_a_model_that_stays_as_it_was(kind, tokenizer):
    model = tiny.model("llama")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    method = bare(kind, model, tokenizer)
    method.sources = [TASK]
    method.settings = Settings(demos_per_class=2, train_rows=16)
    lessons = d.lessons_of(method, np.random.default_rng(0))
    found = d.distilled(
        method, lessons, len(method.vectors), method._edited, lr=0.1, epochs=40, seed=0
    )
    assert len(found["losses"]) == 40
    assert found["losses"][-3:].mean() < 0.7 * found["losses"][:3].mean()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.slow
@KINDS
def test_a_fit_is_one_for_one_seed_and_says_what_it_took(kind, tokenizer):
    model = tiny.model("llama")
    layers_of(model)  # the rows of the probe of its family are not the fit's
    method, again, other = (fitted(kind, model, tokenizer, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(again.vectors, method.vectors)
    assert not torch.equal(other.vectors, method.vectors)
    assert len(method.losses) == 4 * 2
    n_places = 5 if kind is Live else 10
    assert method.n_trained == method.n_cached(TASK) == n_places * (42 + 1)
    assert method.n_labelled == 24  # one setting alone is not validated
    assert not method.tried
    assert method.cost["forwards"] == 24 * d.N_DRAWS + 24 * 4
    assert method.cost["backwards"] == 24 * 4


@KINDS
def test_the_loop_equals_a_plain_one(kind, tokenizer, monkeypatch):
    """Three steps over one batch, written out: KL, half the cross-entropy, AdamW and clip."""
    monkeypatch.setattr(d, "CLIP", clip := 0.05)
    model = tiny.model("llama")
    method = bare(kind, model, tokenizer)
    texts = [TASK.prompt(row) for row in TASK.train[:5]]
    labels = [
        option_ids(tokenizer, t, OPTIONS)[row.label]
        for t, row in zip(texts, TASK.train[:5], strict=True)
    ]
    drawn = torch.randn(5, tiny.VOCAB, generator=torch.Generator().manual_seed(2)).log_softmax(-1)
    lessons = d.Lessons(tokenizer(texts).input_ids, labels, list(drawn))
    n_places = len(method.vectors)
    found = d.distilled(method, lessons, n_places, method._edited, lr=3e-3, epochs=3, seed=9)
    vectors = 0.01 * torch.randn(n_places, 42, generator=torch.Generator().manual_seed(9))
    vectors = vectors.requires_grad_()
    strengths = torch.full((n_places,), 0.1, requires_grad=True)
    optimizer = torch.optim.AdamW(
        [{"params": [vectors], "lr": 3e-3}, {"params": [strengths]}], 1e-2, weight_decay=1e-3
    )
    losses = []
    for step in range(3):
        factor = 0.5 * (1 + np.cos(np.pi * step / 3))  # a tenth of three steps is no warm-up
        for group, lr in zip(optimizer.param_groups, (3e-3, 1e-2), strict=True):
            group["lr"] = lr * factor
        loss = torch.zeros(())
        for text, label, teacher in zip(texts, labels, drawn, strict=True):
            with method._edited(vectors, strengths):
                student = model(**tokenizer(text, return_tensors="pt")).logits[0, -1].softmax(-1)
            loss = (
                loss
                + (teacher.exp() * (teacher - student.log())).sum() / 5
                - 0.5 * student[label].log() / 5
            )
        optimizer.zero_grad()
        loss.backward()
        both = torch.cat([vectors.grad.flatten(), strengths.grad]).norm()
        for parameter in (vectors, strengths):
            parameter.grad *= min(1.0, clip / float(both))
        optimizer.step()
        losses.append(loss.item())
    assert both > clip  # the clip was at work
    assert found["losses"].tolist() == pytest.approx(losses, rel=1e-4)
    assert torch.allclose(found["vectors"], vectors, atol=1e-4)
    assert torch.allclose(found["strengths"], strengths, atol=1e-4)


def test_the_teacher_is_the_mean_over_draws_and_has_their_mean_gradient(tokenizer):
    model = tiny.model("llama")
    demos = [(TASK, row) for row in TASK.train[:6]]
    texts = [few_shot(TASK, row, demos[i % 5 :]).text for i, row in enumerate(TASK.test[:9])]
    with torch.no_grad():
        each = torch.stack(
            [
                model(**tokenizer(text, return_tensors="pt")).logits[0, -1].softmax(-1)
                for text in texts
            ]
        )
    found = torch.stack(d.teacher_log_probs(Decoder.of(model, tokenizer), texts, 3))
    assert found.dtype == torch.float16
    assert torch.allclose(found.float().exp(), each.reshape(3, 3, -1).mean(1), rtol=1e-2, atol=1e-6)
    logits = torch.randn(3, tiny.VOCAB, generator=torch.Generator().manual_seed(6)).requires_grad_()
    student = logits.log_softmax(-1)
    per_draw = sum((each[i] * (each[i].log() - student[i // 3])).sum() for i in range(9)) / 9
    (expected,) = torch.autograd.grad(per_draw, logits)
    lessons = d.Lessons([], [0, 1, 2], list(found))
    loss = d.lesson_loss(logits, lessons, [0, 1, 2]) - 0.5 * torch.nn.functional.cross_entropy(
        logits, torch.arange(3)
    )
    (got,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(got, expected, atol=2e-4 * float(expected.abs().max()) + 1e-5)
    assert per_draw.item() > loss.item()  # by the draws' own spread, which no student can lower


def test_demonstrations_are_drawn_anew_for_every_row_among_the_training_rows_in_use(
    tokenizer, monkeypatch
):
    teacher_texts = []
    teacher = d.teacher_log_probs

    def noted(decoder, texts, n_draws, beginnings):
        teacher_texts.extend(texts)
        return teacher(decoder, texts, n_draws, beginnings)

    monkeypatch.setattr(d, "teacher_log_probs", noted)
    method = Live(Settings(demos_per_class=2, train_rows=10))
    method.decoder = Decoder.of(tiny.model("llama"), tokenizer)
    method.sources = [TASK, OTHER]
    lessons = d.lessons_of(method, np.random.default_rng(3))
    prompts = [tokenizer.decode(tokens) for tokens in lessons.token_lists]
    assert len(prompts) == len(lessons.teacher) == len(lessons.labels) == 20
    for task, lesson_range in ((TASK, range(10)), (OTHER, range(10, 20))):
        by_prompt = {task.prompt(row): row for row in task.train}
        used = {prompts[i] for i in lesson_range}
        for i in lesson_range:
            answer = task.answer(by_prompt[prompts[i]])
            assert (
                lessons.labels[i]
                == tokenizer(f"{prompts[i]} {answer}").input_ids[len(lessons.token_lists[i])]
            )
            draws = teacher_texts[2 * i : 2 * i + 2]
            assert draws[0] != draws[1]
            for text in draws:
                assert text.endswith("\n" + prompts[i])
                shown = text.removesuffix(prompts[i]).removesuffix("\n").split("\nReview: ")
                shown = [
                    part if part.startswith("Review: ") else f"Review: {part}" for part in shown
                ]
                rows = {part.rsplit(" ", 1)[0]: part.rsplit(" ", 1)[1] for part in shown}
                assert len(rows) == 4
                assert prompts[i] not in rows
                assert rows.keys() <= used
                assert all(task.answer(by_prompt[prompt]) == word for prompt, word in rows.items())


@KINDS
def test_settings_are_tried_from_the_published_one_within_the_budget(kind, tokenizer, monkeypatch):
    options_tried = []
    model = tiny.model("llama")
    n_settings = 8 if kind is Live else 9
    vectors = bare(kind, model, tokenizer).vectors

    def numbered(*args, **options):
        strengths = torch.full((1,), len(options_tried))
        options_tried.append(options)
        return {"vectors": vectors, "losses": torch.zeros(1), "strengths": strengths}

    monkeypatch.setattr(f"icrouting.methods.{kind.name}.distilled", numbered)
    # The fourth setting is as good as the sixth, and comes first.
    monkeypatch.setattr(
        kind, "validated", lambda self: 0.5 + 0.1 * (self.strengths.item() in (3, 5))
    )
    method = fitted(kind, model, tokenizer, tries=12, train_epochs=10)
    assert len(method.tried) == len(options_tried) == n_settings
    assert options_tried[0]["lr"] == 1e-3
    assert options_tried[0]["epochs"] == 10
    assert len({options["seed"] for options in options_tried}) == 1
    assert method.strengths.item() == 3
    assert method.n_labelled == 24 + len(TASK.validation)
    first = {name: value for name, value in method.tried[0].items() if name != "accuracy"}
    assert first == ({"lr": 1e-3, "epochs": 10} if kind is Live else {"lr": 1e-3, "w_synergy": 0.1})
    if kind is Live:
        assert {options["epochs"] for options in options_tried} == {3, 10}
    else:
        has_no_synergy = [options["extra"] is None for options in options_tried]
        assert has_no_synergy == [False] * 6 + [True] * 3


def test_synergy_equals_the_matrix_written_out_and_knows_its_ends():
    generator = torch.Generator().manual_seed(0)
    attention, mlp = (torch.randn(11, 7, generator=generator) * 3 + 1 for _ in range(2))
    za, zm = ((view - view.mean(0)) / view.std(0, correction=0) for view in (attention, mlp))
    matrix = za.T @ zm / 11
    expected = sum(
        (1 - matrix[i, j]) ** 2 if i == j else 1e-3 * matrix[i, j] ** 2
        for i in range(7)
        for j in range(7)
    )
    assert float(synergy(attention, mlp)) == pytest.approx(float(expected) / 7, rel=1e-4)
    one_hot = torch.linalg.qr(torch.randn(12, 12, generator=generator) * 1.0).Q[:, :5]
    centred = torch.linalg.qr(one_hot - one_hot.mean(0)).Q
    assert float(synergy(centred, 4 * centred - 2)) == pytest.approx(0, abs=1e-5)
    assert float(synergy(centred, -centred)) == pytest.approx(4, rel=1e-4)
    assert float(synergy(torch.ones(1, 5), torch.ones(1, 5))) == pytest.approx(1)


def test_synergy_reads_both_branches_at_the_label_position_over_64_rows(tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "icrouting.methods.m2iv.synergy",
        lambda a, m: seen.append((a.detach(), m.detach())) or synergy(a, m),
    )
    model = tiny.model("gemma3")
    batches = []

    def spy(model, batch):
        branches = all_branches_of(model)
        with recorded(branches) as outputs:
            logits = next_token_logits(model, batch)
        batches.append(torch.stack([last_of(output, batch.last).detach() for output in outputs]))
        return logits

    monkeypatch.setattr(d, "next_token_logits", spy)
    monkeypatch.setattr(
        d,
        "teacher_log_probs",
        lambda decoder, texts, n, beginnings: [torch.zeros(tiny.VOCAB)] * (len(texts) // n),
    )
    method = fitted(M2IV, model, tokenizer, train_rows=32, train_epochs=3)
    assert [len(attention) for attention, _ in seen] == [16, 32, 48, 64, 64, 64]
    assert torch.isfinite(method.losses).all()
    for (attention, mlp), states in zip(seen, batches, strict=True):
        # what was added is the same in every row
        for view, own in ((attention, states[0::2].mean(0)), (mlp, states[1::2].mean(0))):
            assert torch.allclose(view[-16:] - view[-16:].mean(0), own - own.mean(0), atol=1e-4)
    assert torch.equal(seen[-1][0][:16], seen[-4][0][-16:])


def test_the_synergy_pulls_on_the_vectors(tokenizer):
    model = tiny.model("llama")
    method = bare(M2IV, model, tokenizer)
    vectors = method.vectors.requires_grad_()
    with recorded(all_branches_of(model)) as outputs, method._edited(vectors, method.strengths):
        batch = pad(tokenizer(prompts()).input_ids, 1)
        next_token_logits(model, batch)
        states = torch.stack([last_of(output, batch.last) for output in outputs])
        synergy(states[0::2].mean(0), states[1::2].mean(0)).backward()
    assert (vectors.grad[:-2].norm(dim=1) > 0).all()


@KINDS
@pytest.mark.slow
def test_pooled_sources_make_one_method_and_bad_input_one_line(kind, tokenizer):
    model = tiny.model("llama")
    method = fitted(kind, model, tokenizer, [TASK, OTHER], train_rows=7, tries=2)
    assert method.n_labelled == 14 + len(TASK.validation) + len(OTHER.validation)
    with pytest.raises(
        ValueError, match=rf"^{kind.name} learns from training rows: give at least one source task"
    ):
        fitted(kind, model, tokenizer, [])
    with pytest.raises(ValueError, match="validation rows: give 5 training rows or more"):
        fitted(
            kind,
            model,
            tokenizer,
            [dataclasses.replace(TASK, validation=())],
            train_rows=4,
            tries=2,
        )
    with pytest.raises(ValueError, match="no training example left"):
        fitted(kind, model, tokenizer, train_rows=1)


@KINDS
def test_a_model_is_restored_after_an_exception_in_training(kind, tokenizer, monkeypatch):
    model = tiny.model("llama")
    model.requires_grad_(True).train()
    monkeypatch.setattr(d, "lesson_loss", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fitted(kind, model, tokenizer)
    assert model.training
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
