"""LoRA on the queries and values of all layers, by labels and by few-shot prompts."""

import numpy as np
import pytest
import torch

import tiny
from fitted import SMALL, fit_method
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.scoring import score_options
from icrouting.methods import Settings
from icrouting.methods.adapters import injected
from icrouting.methods.distilling import lessons_of, mimicry
from icrouting.methods.lora_qv import LoraQv, LoraQvDistilled

TASK = tiny.task("toy", n_train=40, n_test=6)
TEXTS = [TASK.prompt(row) for row in TASK.test]
OPTIONS = list(TASK.spec.options)


def unfitted(kind, family, tokenizer, **changes):
    method = kind(Settings(**SMALL | changes))
    method.decoder = Decoder.of(tiny.model(family), tokenizer)
    method.sources = [TASK]
    method.tried = []
    return method


@pytest.mark.parametrize(
    ("family", "modules"),
    [("llama", {"q_proj", "v_proj"}), ("gpt_neox", {"query_key_value"}), ("gpt2", {"c_attn"})],
)
def test_the_projections_of_every_layer_are_updated(family, modules, tokenizer):
    method = unfitted(LoraQv, family, tokenizer)
    names = method._targets()
    assert {name.rpartition(".")[2] for name in names} == modules
    assert len(names) == len(modules) * len(method.decoder.layers)


def test_an_update_of_zero_changes_nothing(tokenizer):
    method = unfitted(LoraQv, "llama", tokenizer)
    model = method.decoder.base
    plain = score_options(model, tokenizer, TEXTS, OPTIONS)
    with injected(model, method._targets(), 32, 0):
        model.eval()
        assert torch.allclose(score_options(model, tokenizer, TEXTS, OPTIONS), plain, atol=1e-6)
    assert torch.equal(score_options(model, tokenizer, TEXTS, OPTIONS), plain)


@pytest.mark.parametrize("kind", [LoraQv, LoraQvDistilled])
def test_it_changes_answers_inside_and_leaves_no_trace(kind, tokenizer):
    model = tiny.model("llama")
    plain = score_options(model, tokenizer, TEXTS, OPTIONS)
    method = fit_method(kind(Settings(**SMALL)), model, tokenizer, [TASK])
    with method.attached(model, tokenizer, TASK) as attached:
        assert not torch.allclose(attached.score(TEXTS, OPTIONS), plain)
    assert torch.equal(score_options(model, tokenizer, TEXTS, OPTIONS), plain)


def test_the_loss_is_the_divergence_from_the_few_shot_answers(tokenizer):
    method = unfitted(LoraQvDistilled, "llama", tokenizer)
    lessons = lessons_of(method, np.random.default_rng(0))
    rows = [0, 3, 5]
    logits = torch.randn(3, len(lessons.teacher[0]))
    slow = 0.0
    for row, student in zip(rows, logits.log_softmax(1), strict=True):
        teacher = lessons.teacher[row].float().log_softmax(0)
        slow += sum(float(p.exp() * (p - q)) for p, q in zip(teacher, student, strict=True)) / len(
            rows
        )
    assert float(mimicry(logits, lessons, rows)) == pytest.approx(slow, rel=1e-4)
    same = torch.stack([lessons.teacher[row].float() for row in rows])
    assert float(mimicry(same, lessons, rows)) == pytest.approx(0.0, abs=1e-5)


def test_the_student_comes_nearer_to_the_few_shot_answers(tokenizer):
    method = unfitted(LoraQvDistilled, "llama", tokenizer, train_epochs=8)
    lessons = lessons_of(method, np.random.default_rng(0))
    rows = range(len(lessons.labels))

    def loss():
        with torch.no_grad():
            return float(mimicry(method._logits(lessons.token_lists), lessons, rows))

    before = loss()
    adapter = method._taught(lessons, 0, lr=1e-2, alpha=32)
    with injected(method.decoder.base, method._targets(), 32, adapter):
        assert loss() < before


def test_labels_of_the_rows_are_not_read_by_the_loss(tokenizer):
    method = unfitted(LoraQvDistilled, "llama", tokenizer)
    lessons = lessons_of(method, np.random.default_rng(0))
    first = method._taught(lessons, 0, lr=1e-2, alpha=32)
    other = type(lessons)(lessons.token_lists, [7] * len(lessons.labels), lessons.teacher)
    second = method._taught(other, 0, lr=1e-2, alpha=32)
    assert all(torch.equal(first[name], second[name]) for name in first)
