"""Iterative Vectors against slow ways.

Extraction against a slow loop, feedback against its recursion, and where what is added goes.
"""

import numpy as np
import pytest
import torch

import tiny
from fitted import fit_method
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import all_branches_of, branches_of, layers_of
from icrouting.decoder.hooks import edited, recorded
from icrouting.decoder.scoring import option_ids, score_options
from icrouting.methods import Settings
from icrouting.methods.iterative_vectors import IterativeVectors, _episode, extract, outputs_at
from icrouting.tasks.prompts import episodes

TASK = tiny.task("toy")
LAW_FAMILIES = ("llama", "qwen3", "gemma3", "gpt_neox")


def drawn(model, tokenizer, n=12, task=TASK, first=1, shots=2):
    pairs = list(episodes(task, n, shots, np.random.default_rng(3)))
    shown = [_episode(Decoder.of(model, tokenizer), task, first, *each) for each in pairs]
    alone = [_episode(Decoder.of(model, tokenizer), task, first, [], query) for _, query in pairs]
    return shown, alone


def plain_of(model, alone):
    nothing = torch.zeros(1, len(layers_of(model)), model.config.hidden_size)
    return [outputs_at(model, query, nothing) for query in alone]


def fitted(model, tokenizer, tasks=(TASK,), **changes):
    method = IterativeVectors(Settings(**{"train_rows": 12, "tries": 1, **changes}))
    return fit_method(method, model, tokenizer, tasks)


def slow(model, shown, alone, strength):
    """The published loop: one episode at a time.

    All differences are in a list, their mean is taken at 0, 10, 20, ...
    """
    places, changes, vectors = all_branches_of(model)[::2], [], None
    for number, (episode, query) in enumerate(zip(shown, alone, strict=True)):
        found = {}

        def add(layer, output, episode=episode, found=found, vectors=vectors):
            output = output.clone()
            for position, row in zip(episode.positions, episode.rows, strict=True):
                if vectors is not None:
                    output[0, position] += strength * vectors[row][layer]
            found[layer] = output[0, episode.positions]
            return output

        with torch.no_grad(), edited(places, add):
            model(input_ids=torch.tensor([episode.tokens]))
        with torch.no_grad(), recorded(places) as bare:
            model(input_ids=torch.tensor([query.tokens]))
        diffs = torch.stack([found[layer] - bare[layer][0, -1] for layer in range(len(places))], 1)
        rows = torch.tensor(episode.rows)
        changes.append(torch.stack([diffs[rows == row].mean(0) for row in range(3)]))
        if number % 10 == 0 or number == len(shown) - 1:
            vectors = torch.stack(changes).mean(0)
    return vectors


@pytest.mark.parametrize("family", LAW_FAMILIES)
@pytest.mark.parametrize("strength", [0.0, 0.5])
@pytest.mark.slow
def test_the_vectors_are_those_of_the_published_loop(family, strength, tokenizer):
    model = tiny.model(family)
    shown, alone = drawn(model, tokenizer)
    found = extract(model, shown, plain_of(model, alone), strength, 3)
    assert torch.allclose(found, slow(model, shown, alone, strength), atol=1e-4)
    assert found.abs().mean() > 1e-2


@pytest.mark.slow
def test_without_feedback_the_vectors_are_the_plain_mean_difference(tokenizer):
    model = tiny.model("llama")
    shown, alone = drawn(model, tokenizer)
    plain = plain_of(model, alone)
    nothing = torch.zeros(3, 5, 42)
    changes = [outputs_at(model, e, nothing)[-1] - p[0] for e, p in zip(shown, plain, strict=True)]
    found = extract(model, shown, plain, 0.0, 3)
    assert torch.allclose(found[0], torch.stack(changes).mean(0), atol=1e-5)
    assert not torch.allclose(extract(model, shown, plain, 0.9, 3)[0], found[0], atol=1e-3)


@pytest.mark.slow
def test_feedback_follows_its_recursion_where_nothing_lies_between(tokenizer):
    """In layer 0 the change is the plain one plus strength times the vector.

    So the mean obeys a scalar recursion.
    """
    model, strength, n = tiny.model("llama"), 0.9, 33
    shown, alone = drawn(model, tokenizer, 1)
    plain = plain_of(model, alone)
    once = extract(model, shown, plain, strength, 3)[:, 0]
    factors, factor = [], 0.0
    for number in range(n):
        factors.append(1 + strength * factor)
        factor = float(np.mean(factors)) if number % 10 == 0 else factor
    found = extract(model, shown * n, plain * n, strength, 3)[:, 0]
    assert torch.allclose(found, float(np.mean(factors)) * once, rtol=1e-3, atol=1e-4)
    assert 2 < np.mean(factors) < 1 / (1 - strength)


def test_io_positions_are_the_tokens_before_the_answers(tokenizer):
    (demos, query) = next(episodes(TASK, 1, 2, np.random.default_rng(0)))
    episode = _episode(Decoder.of(tiny.model("llama"), tokenizer), TASK, 4, demos, query)
    assert episode.rows == [*(4 + demo.label for demo in demos), 0]
    assert episode.positions[-1] == len(episode.tokens) - 1
    for demo, position in zip(demos, episode.positions, strict=False):
        assert tokenizer.decode(episode.tokens[: position + 1]).endswith(TASK.prompt(demo))
        assert tokenizer.decode(episode.tokens[position + 1 :]).startswith(
            f" {TASK.answer(demo)}\n"
        )
    assert query not in demos


def test_a_class_without_a_demonstration_adds_nothing_and_leaves_no_nan(tokenizer):
    model = tiny.model("llama")
    shown, alone = drawn(model, tokenizer, 4)
    found = extract(model, shown, plain_of(model, alone), 0.9, 5)
    assert torch.isfinite(found).all()
    assert not found[3:].any()
    assert found[:3].any(2).all()


@pytest.mark.slow
def test_tasks_are_pooled_in_the_querys_vector_and_apart_in_the_classes(tokenizer):
    model, other = tiny.model("llama"), tiny.task("others")
    shown, alone = drawn(model, tokenizer, 6)
    more, more_alone = drawn(model, tokenizer, 6, other, first=3)
    plain, more_plain = plain_of(model, alone), plain_of(model, more_alone)
    both = extract(model, shown + more, plain + more_plain, 0.0, 5)
    one, two = extract(model, shown, plain, 0.0, 3), extract(model, more, more_plain, 0.0, 5)
    assert torch.allclose(both[0], (one[0] + two[0]) / 2, atol=1e-5)
    assert torch.allclose(both[1:3], one[1:], atol=1e-5)
    assert torch.allclose(both[3:], two[3:], atol=1e-5)
    method = fitted(model, tokenizer, (TASK, other))
    assert method.vectors.shape == (1 + 2 + 2, 5, 42)
    assert method.n_cached(TASK) == 5 * 42


@pytest.mark.parametrize("family", LAW_FAMILIES)
def test_the_querys_vector_is_added_at_the_last_token_alone(family, tokenizer):
    model, prompts = (
        tiny.model(family),
        [TASK.prompt(row) + "." * (2 * i) + ":" for i, row in enumerate(TASK.test[:5])],
    )
    method = IterativeVectors(Settings())
    method.decoder = Decoder.of(model, tokenizer)
    n_layers, width = len(layers_of(model)), model.config.hidden_size
    method.vectors = torch.randn(3, n_layers, width, generator=torch.Generator().manual_seed(2))
    plain = score_options(model, tokenizer, prompts, TASK.spec.options)
    method.strength = torch.tensor(0.0)
    with method.applied(TASK):
        assert torch.equal(score_options(model, tokenizer, prompts, TASK.spec.options), plain)
    method.strength = torch.tensor(0.7)
    padded = tokenizer(prompts, return_tensors="pt", padding=True)  # on the left
    positions = (padded.attention_mask.cumsum(1) - 1).clamp(min=0)
    branch = branches_of(model, 0)[0]
    with torch.no_grad(), recorded([branch]) as outputs:
        model(**padded, position_ids=positions)
        before = outputs[0]
    with torch.no_grad(), method.applied(TASK), recorded([branch]) as outputs:
        logits = model(**padded, position_ids=positions).logits[:, -1]
        change = outputs[0] - before
        changed = score_options(model, tokenizer, prompts, TASK.spec.options)
    assert not change[:, :-1].any()
    assert torch.allclose(
        change[:, -1], (0.7 * method.vectors[0, 0]).expand(len(prompts), -1), atol=1e-5
    )
    ids = torch.tensor([option_ids(tokenizer, prompt, TASK.spec.options) for prompt in prompts])
    assert torch.allclose(logits.gather(1, ids), changed, atol=1e-4)
    assert not torch.allclose(changed, plain, atol=1e-2)


@pytest.mark.slow
def test_the_default_of_the_published_code_is_tried_first_and_the_budget_holds(tokenizer):
    tried = fitted(tiny.model("llama"), tokenizer, tries=5).tried
    assert [(row["strength"], row["extraction_strength"]) for row in tried][:2] == [
        (1.0, 0.1),
        (1.0, 0.5),
    ]
    assert len(tried) == 5


@pytest.mark.slow
def test_rows_are_counted_once(tokenizer):
    for tries, n_looked_at in (
        (1, 0),
        (2, len(TASK.validation)),
    ):  # validation rows are read only to choose
        method = fitted(tiny.model("llama"), tokenizer, train_rows=60, tries=tries)
        assert method.n_labelled == len(TASK.train) + n_looked_at


def test_a_template_that_merges_with_its_answers_is_refused(tokenizer, monkeypatch):
    def merged(tokenizer, texts, limit=None):
        return [[5, 6], [5, 7, 8]]

    monkeypatch.setattr("icrouting.decoder.decoder.tokenize", merged)
    with pytest.raises(ValueError, match="merge with their answers"):
        _episode(
            Decoder.of(tiny.model("llama"), tokenizer), TASK, 1, [TASK.train[0]], TASK.train[1]
        )


def test_no_source_task_is_refused(tokenizer):
    with pytest.raises(ValueError, match="give at least one source task"):
        fitted(tiny.model("llama"), tokenizer, ())
