"""Function vectors: heads taken apart, their effects, and the vector where it is added."""

import dataclasses
import logging

import numpy as np
import pytest
import torch

import tiny
from fitted import fit_method
from icrouting.decoder import states
from icrouting.decoder.batches import pad, tokenize
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import (
    FAMILIES,
    attention_of,
    branches_of,
    dims_of,
    layers_of,
    output_of,
)
from icrouting.decoder.hooks import edited_inputs, recorded
from icrouting.decoder.passes import next_token_logits
from icrouting.decoder.scoring import option_ids, score_options
from icrouting.decoder.states import last_outputs
from icrouting.methods import Settings, function_vectors, make
from icrouting.methods.function_vectors import FunctionVectors, indirect_effects, written
from icrouting.tasks.prompts import Prompt, few_shot
from icrouting.tasks.task import Example, Task, TaskSpec

TASK, OTHER = tiny.task("toy", n_test=30), tiny.task("other", n_test=30)
LAW_FAMILIES = ("llama", "qwen3", "gemma3", "gpt_neox")
ALL = list(tiny.ALL_CONFIGS)


@pytest.fixture
def few_prompts(monkeypatch):
    for name, n in (("N_PROMPTS", 12), ("N_SHUFFLED", 3)):
        monkeypatch.setattr(function_vectors, name, n)


def fitted(model, tokenizer, tasks=(TASK,), **changes):
    method = FunctionVectors(Settings(**{"demos_per_class": 1, "tries": 1, **changes}))
    return fit_method(method, model, tokenizer, tasks)


def projections_of(model):
    return [output_of(model, layer) for layer in range(len(layers_of(model)))]


def heads_of(model, tokenizer, text):
    """What the heads give at a text's last token."""
    given, _ = last_outputs(
        Decoder.of(model, tokenizer), projections_of(model), [text], edited_inputs
    )
    return torch.cat(given).unflatten(-1, (dims_of(model).n_heads, -1))


def few_shot_text(n=3):
    return few_shot(TASK, TASK.train[0], [(TASK, demo) for demo in TASK.train[1 : 1 + n]]).text


def logits_of(model, tokenizer, texts):
    with torch.no_grad():
        return next_token_logits(model, pad(tokenize(tokenizer, texts), 1))


@pytest.mark.parametrize("family", ALL)
def test_all_heads_together_write_what_attention_adds_to_the_residual_stream(family, tokenizer):
    """Less the bias, once; behind the norm, where a family has one."""
    model, text = tiny.model_of(family), few_shot_text()
    parts = written(model, heads_of(model, tokenizer, text))
    assert parts.shape == (5, dims_of(model).n_heads, model.config.hidden_size)
    for layer in range(5):
        projection, branch = output_of(model, layer), branches_of(model, layer)[0]
        with recorded([branch]) as outputs:
            logits_of(model, tokenizer, [text])
        expected = outputs[0][0, -1]
        if getattr(projection, "bias", None) is not None:
            expected = expected - projection.bias
        expected = expected * (
            0.7 if family == "granite" else 1.0
        )  # what its blocks add of a branch
        assert torch.allclose(parts[layer].sum(0), expected, atol=1e-4)
        assert parts[layer].abs().max() > 0.1


@pytest.mark.parametrize("family", ["granite", "llama", "mistral"])
def test_what_heads_write_is_what_the_state_behind_attention_has_more_than_the_one_before(
    family, tokenizer
):
    model, text = tiny.model_of(family), few_shot_text()
    parts, blocks = written(model, heads_of(model, tokenizer, text)), list(layers_of(model))
    behind = [block.post_attention_layernorm for block in blocks]
    with recorded([*blocks, *behind], edited_inputs) as states:
        logits_of(model, tokenizer, [text])
    for layer in range(5):
        gained = states[5 + layer][0, -1] - states[layer][0, -1]
        assert torch.allclose(parts[layer].sum(0), gained, atol=1e-4)


@pytest.mark.parametrize(
    "family", [name for name in ALL if name not in ("gemma2", "gemma3", "olmo2")]
)
def test_one_head_writes_its_columns_of_the_projection_times_its_output(family, tokenizer):
    model = tiny.model_of(family)
    heads = heads_of(model, tokenizer, few_shot_text())
    head_dim, parts = heads.shape[-1], written(model, heads)
    for layer in range(5):
        weight = output_of(model, layer).weight
        weight = weight.T if family == "gpt2" else weight
        for head in range(heads.shape[1]):
            own = weight[:, head * head_dim : (head + 1) * head_dim] @ heads[layer, head]
            own *= 0.7 if family == "granite" else 1.0
            assert torch.allclose(parts[layer, head], own, atol=1e-5)


@pytest.mark.parametrize("family", LAW_FAMILIES)
def test_a_head_patched_with_its_own_output_has_no_effect(family, tokenizer):
    model, text = tiny.model_of(family), few_shot_text()
    own = heads_of(model, tokenizer, text)
    assert indirect_effects(Decoder.of(model, tokenizer), [(text, 7)], own).abs().max() < 1e-6
    assert (
        indirect_effects(Decoder.of(model, tokenizer), [(text, 7)], own.flip(-1)).abs().max() > 1e-4
    )


@pytest.mark.parametrize(
    ("family", "budget"),
    [*((family, 8192) for family in ALL), ("llama", 1000), ("llama", 300), ("gemma3", 300)],
)
@pytest.mark.slow
def test_effects_from_the_cache_equal_those_of_whole_prompts_patched_head_by_head(
    family, budget, tokenizer, monkeypatch
):
    monkeypatch.setattr(states, "PREFIX_BUDGET", budget)
    monkeypatch.setattr(states, "MOST_VARIANTS", budget // 100)
    model = tiny.model_of(family) if budget >= 1000 else tiny.model(family, "eager")
    prompts = [(few_shot_text(2), 11), (few_shot_text(1), 40)]
    shape = (
        5,
        dims_of(model).n_heads,
        output_of(model, 0).weight.shape[0 if family == "gpt2" else 1],
    )
    means = torch.randn(
        *shape[:2], shape[2] // shape[1], generator=torch.Generator().manual_seed(4)
    )
    slow = torch.zeros(shape[:2])
    for text, answer in prompts:
        plain = logits_of(model, tokenizer, [text]).softmax(-1)[0, answer]
        for layer in range(5):
            for head in range(shape[1]):

                def patch(place, given, layer=layer, head=head):
                    patched, width = given.clone(), means.shape[-1]
                    patched[:, -1, head * width : (head + 1) * width] = means[layer, head]
                    return patched

                with edited_inputs([output_of(model, layer)], patch):
                    slow[layer, head] += (
                        logits_of(model, tokenizer, [text]).softmax(-1)[0, answer] - plain
                    )
    found = indirect_effects(Decoder.of(model, tokenizer), prompts, means)
    assert torch.allclose(found, slow / 2, atol=2e-6)
    assert found.abs().max() > 5e-4


@pytest.mark.parametrize("family", LAW_FAMILIES)
def test_the_vector_is_added_at_the_last_token_of_one_layer_under_both_paddings(family, tokenizer):
    model, method = tiny.model_of(family), FunctionVectors(Settings())
    prompts = [
        TASK.prompt(example) + "." * (3 * i % 7) + ":" for i, example in enumerate(TASK.test[:5])
    ]
    method.decoder = Decoder.of(model, tokenizer)
    method.layer = torch.tensor(2)
    method.vector = torch.randn(
        model.config.hidden_size, generator=torch.Generator().manual_seed(2)
    )
    padded = tokenizer(prompts, return_tensors="pt", padding=True)  # on the left
    positions = (padded.attention_mask.cumsum(1) - 1).clamp(min=0)
    block = layers_of(model)[2]
    with recorded([block]) as outputs, torch.no_grad():
        model(**padded, position_ids=positions)
        plain = outputs[0]
    with method.applied(TASK), recorded([block]) as outputs, torch.no_grad():
        logits = model(**padded, position_ids=positions).logits[:, -1]
    assert torch.equal(outputs[0][:, :-1], plain[:, :-1])
    assert torch.allclose(outputs[0][:, -1], plain[:, -1] + method.vector, atol=1e-6)
    with method.applied(TASK):
        together = score_options(
            model, tokenizer, [Prompt("", prompt) for prompt in prompts], TASK.spec.options
        )
    ids = torch.tensor([option_ids(tokenizer, prompt, TASK.spec.options) for prompt in prompts])
    assert torch.allclose(logits.gather(1, ids), together, atol=1e-4)
    before = logits_of(model, tokenizer, prompts)
    assert not torch.allclose(before.gather(1, ids), together, atol=1e-2)
    method.vector = torch.zeros_like(method.vector)
    with method.applied(TASK):
        assert torch.equal(logits_of(model, tokenizer, prompts), before)


def test_the_vector_sums_what_the_k_strongest_heads_write_of_their_means(
    few_prompts, tokenizer, monkeypatch
):
    asked = []
    monkeypatch.setattr(
        function_vectors, "few_shot", lambda *trial: asked.append(few_shot(*trial)) or asked[-1]
    )
    monkeypatch.setattr(function_vectors, "TOP_HEADS", (7, 3))
    model = tiny.model("llama")
    method = fitted(model, tokenizer, tries=1)
    assert len(asked) == 12
    means = torch.stack([heads_of(model, tokenizer, prompt.text) for prompt in asked]).mean(0)
    assert (
        method.right.sum() < 20
    )  # a random model's likeliest token is no answer: all prompts count
    strongest = sorted(
        ((method.effects[i, j].item(), i, j) for i in range(5) for j in range(6)), reverse=True
    )[:7]
    expected = sum(
        output_of(model, i).weight[:, 10 * j : 10 * j + 10] @ means[i, j] for _, i, j in strongest
    )
    assert torch.allclose(method.vector, expected, atol=1e-4)
    assert (int(method.layer), method.n_cached(TASK), method.tried) == (5 // 3, 42, [])
    shown = {
        demo for prompt in asked for demo in prompt.text.split("\n") if demo.startswith("Review:")
    }
    assert method.n_labelled == len(shown)


def test_k_and_layer_are_chosen_on_validation_rows_the_published_ones_first(
    few_prompts, tokenizer, monkeypatch
):
    accuracies = iter((0.5, 0.7, 0.7, 0.2, 0.1, 0.7))
    monkeypatch.setattr(FunctionVectors, "validated", lambda self: next(accuracies))
    method = fitted(tiny.model("llama"), tokenizer, tries=12)
    assert [(tried["k"], tried["layer"]) for tried in method.tried] == [
        (k, layer) for layer in (1, 2) for k in (20, 10, 50)
    ]
    assert int(method.layer) == 1
    first = fitted(tiny.model("llama"), tokenizer, tries=1)
    assert method.n_labelled == first.n_labelled + len(TASK.validation)
    assert torch.equal(first.effects, method.effects)
    assert not torch.allclose(first.vector, method.vector)


@pytest.mark.parametrize(("n_right", "n_used"), [(26, 26), (19, 40)])
@pytest.mark.slow
def test_only_prompts_answered_rightly_are_averaged_unless_few_are(
    n_right, n_used, tokenizer, monkeypatch, caplog
):
    used, shown, real = [], [], function_vectors.last_outputs

    def answered(decoder, modules, texts, by):
        states, _ = real(decoder, modules, texts, by)
        shown.extend(texts)
        truth = [option_ids(tokenizer, text, TASK.spec.options)[label_of(text)] for text in texts]
        return states, torch.tensor([*truth[:n_right], *(0 for _ in truth[n_right:])])

    def effects(decoder, prompts, means):
        used.append((prompts, means))
        return torch.zeros(means.shape[:2])

    monkeypatch.setattr(function_vectors, "last_outputs", answered)
    monkeypatch.setattr(function_vectors, "indirect_effects", effects)
    model = tiny.model("llama")
    with caplog.at_level(logging.INFO):
        method = fitted(model, tokenizer)
    ((prompts, means),) = used
    assert int(method.right.sum()) == n_right
    assert ("all are used" in caplog.text) == (n_used == 40)
    expected = torch.stack([heads_of(model, tokenizer, text) for text in shown[:n_used]]).mean(0)
    assert torch.allclose(means, expected, atol=1e-5)
    assert len(prompts) == 25
    for (text, answer), clean in zip(prompts, shown, strict=False):
        assert answer == option_ids(tokenizer, text, TASK.spec.options)[label_of(text)]
        assert sorted(text.split()) == sorted(clean.split())
        assert text.rsplit("Review:")[-1] == clean.rsplit("Review:")[-1]
    assert any(text != clean for (text, _), clean in zip(prompts, shown, strict=False))


def label_of(text):
    """Of a prompt's query, whose second word says it."""
    return ("dull", "joy").index(text.rsplit("Review: ", 1)[1].split()[0])


def test_a_query_is_not_among_its_demonstrations_and_tasks_share_the_prompts():
    trials = function_vectors._trials([TASK, OTHER], 2, np.random.default_rng(0))
    big = [tiny.task(name, n_train=70) for name in ("a", "bc", "def")]
    assert len(trials) == 80
    for task, query, demos in trials:
        assert {id(row) for row in (query, *(demo for _, demo in demos))} <= {
            id(row) for row in task.train
        }
        assert all(of is task and demo is not query for of, demo in demos)
        assert [demo.label for _, demo in demos].count(0) == 2
    shares = [
        task.name for task, _, _ in function_vectors._trials(big, 1, np.random.default_rng(0))
    ]
    assert len(shares) == 100
    assert all(32 <= shares.count(task.name) <= 34 for task in big)


def test_answers_are_shuffled_as_words_where_examples_differ_in_their_choices():
    spec = TaskSpec("choice", "far", "{text}\n{choices}\nAnswer:")
    rows = [Example({"text": "x"}, ("a",) * n, n - 1) for n in (2, 3, 4, 5)]
    task = Task(spec, tuple(rows), ())
    trial = function_vectors.Trial(task, rows[0], [(task, row) for row in rows[1:]])
    texts = {function_vectors._shuffled(trial, np.random.default_rng(seed)) for seed in range(20)}
    assert len(texts) == 6
    assert few_shot(*trial).text in texts


@pytest.mark.parametrize("regime", ["function-vectors", "function-vectors-once"])
def test_both_regimes_fit(regime, few_prompts, tokenizer):
    (method,) = make([regime], Settings(demos_per_class=1, tries=1))
    method.fit(tiny.model("llama"), tokenizer, [TASK, OTHER], np.random.default_rng(0))
    vectors = [method.on(task).vector for task in (TASK, OTHER)]
    assert torch.equal(*vectors) == regime.endswith("once")


def test_what_cannot_be_fitted_is_refused_in_a_sentence(few_prompts, tokenizer, monkeypatch):
    model = tiny.model("llama")
    with pytest.raises(ValueError, match="give at least one source task"):
        fitted(model, tokenizer, [])
    with pytest.raises(ValueError, match="validation rows: give 5 training rows or more"):
        fitted(model, tokenizer, [dataclasses.replace(TASK, validation=())], tries=2)
    with pytest.raises(ValueError, match="no training example left"):
        fitted(model, tokenizer, [dataclasses.replace(TASK, train=TASK.train[:1])])
    monkeypatch.setitem(
        FAMILIES, "qwen3", dataclasses.replace(FAMILIES["qwen3"], output="nonsense")
    )
    with pytest.raises(
        ValueError,
        match=r"output projection of 'qwen3' models is not known \(looked for 'nonsense'",
    ):
        fitted(tiny.model("qwen3"), tokenizer)
    monkeypatch.delitem(FAMILIES, "llama")  # routed all the same, by another row that fits
    with pytest.raises(ValueError, match="output projection of 'llama' models is not known"):
        fitted(tiny.model("llama"), tokenizer)


@pytest.mark.parametrize("family", ALL)
def test_the_output_projection_is_the_last_step_of_attention(family, tokenizer):
    model = tiny.model_of(family)
    modules = [*projections_of(model), *(attention_of(model, layer) for layer in range(5))]
    with recorded(modules) as outputs:
        logits_of(model, tokenizer, [few_shot_text(1)])
    for layer in range(5):
        assert torch.equal(outputs[layer], outputs[5 + layer])
        assert (
            output_of(model, layer).weight.numel() == model.config.hidden_size * 60
            or family not in LAW_FAMILIES
        )
