"""ELICIT: the library, its injection and its retriever, each against a slow version."""

import numpy as np
import pytest
import torch

import tiny
from fitted import fit_method
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import CACHE, layers_of
from icrouting.decoder.hooks import edited, recorded
from icrouting.decoder.scoring import option_ids, score_options
from icrouting.methods import Settings, elicit
from icrouting.methods.elicit import Elicit
from icrouting.methods.retriever import same_task, train_head
from icrouting.methods.task_vectors import sweep
from icrouting.routing.encoder import load_encoder
from icrouting.tasks.task import Task, TaskSpec

TASK = tiny.task("toy")
NEWS = TaskSpec("news", "far", "News: {text}\nTopic:", ("joy", "dull"))
ROWS = tiny.task("others")
OTHER = Task(NEWS, ROWS.train, ROWS.test, ROWS.validation)
LAW_FAMILIES = ("llama", "qwen3", "gemma3", "gpt_neox")


def prompts():
    return [TASK.prompt(row) + "." * (2 * i) + ":" for i, row in enumerate(TASK.test[:5])]


def scores(model, tokenizer, texts):
    return score_options(model, tokenizer, texts, TASK.spec.options)


def fitted(model, tokenizer, encoder_folder, tasks=(TASK,), **changes):
    method = Elicit(
        Settings(
            **{
                "demos_per_class": 2,
                "train_rows": 6,
                "tries": 2,
                "encoder": str(encoder_folder),
                **changes,
            }
        )
    )
    return fit_method(method, model, tokenizer, tasks)


@pytest.fixture(scope="module")
def pooled(tokenizer, encoder_folder):
    return fitted(tiny.model("llama"), tokenizer, encoder_folder, (TASK, OTHER))


@pytest.mark.parametrize("family", LAW_FAMILIES)
@pytest.mark.slow
def test_with_one_task_it_is_an_added_mean_task_vector(family, tokenizer, encoder_folder):
    model = tiny.model(family)
    padded = tokenizer(prompts(), return_tensors="pt", padding=True)  # on the left
    method = fitted(model, tokenizer, encoder_folder, tries=1)
    plain = scores(model, tokenizer, prompts())
    (layer,) = set(method.layers.tolist())
    vector = 2 * method.states.mean(0)[layer]

    def add(_, hidden):
        return torch.cat([hidden[:, :-1], hidden[:, -1:] + vector], 1)

    expected = []
    for prompt in prompts():
        with torch.no_grad(), edited([layers_of(model)[layer]], add):
            logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
        expected.append(logits[option_ids(tokenizer, prompt, TASK.spec.options)])
    positions = (padded.attention_mask.cumsum(1) - 1).clamp(min=0)
    with method.applied(TASK), torch.no_grad():
        assert torch.allclose(scores(model, tokenizer, prompts()), torch.stack(expected), atol=1e-4)
        logits = model(**padded, position_ids=positions).logits[:, -1]
    ids = torch.tensor([option_ids(tokenizer, prompt, TASK.spec.options) for prompt in prompts()])
    assert torch.allclose(logits.gather(1, ids), torch.stack(expected), atol=1e-4)
    assert not torch.allclose(torch.stack(expected), plain, atol=1e-2)
    method.weight = torch.tensor(0.0)
    with method.applied(TASK):
        assert torch.equal(scores(model, tokenizer, prompts()), plain)
    assert method.n_trained == 0
    assert not (method.retrieved(prompts())[1] < 0).any()


@pytest.mark.parametrize("family", LAW_FAMILIES)
def test_the_sweep_that_adds_equals_the_naive_one(family, tokenizer):
    model = tiny.model(family)
    items = [(TASK, row) for row in TASK.train[:9]]
    vector = 9 * torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(5))
    vectors = torch.outer(
        torch.tensor([1.0, -1, 1, -1, 1]), vector
    )  # so that layers differ in accuracy
    naive = []
    for layer in range(5):
        method = Elicit(Settings())
        method.decoder = Decoder.of(model, tokenizer)
        method.weight = torch.tensor(1.0)
        method.states = vectors.expand(10, -1, -1)
        method.layers = torch.full((10,), layer)
        method.features = torch.zeros(0, 0)
        method.head = torch.zeros(0)
        method.threshold = torch.zeros(())
        with method.applied(TASK):
            guesses = (
                scores(model, tokenizer, [TASK.prompt(row) for _, row in items]).argmax(1).tolist()
            )
        naive.append(
            np.mean([guess == row.label for guess, (_, row) in zip(guesses, items, strict=True)])
        )
    found = sweep(Decoder.of(model, tokenizer), items, vectors, kept=1.0)
    assert found.tolist() == pytest.approx(naive)
    assert len(set(naive)) > 1


@pytest.mark.slow
def test_the_library_holds_the_last_tokens_states_of_prompts_that_the_retriever_does_not_ask(
    tokenizer, encoder_folder, monkeypatch
):
    shown = []
    texts_read = []
    model = tiny.model("llama")
    few_shot = elicit.few_shot
    read = elicit._read

    def noted_prompt(*args):
        prompt = few_shot(*args)
        shown.append(prompt.text)
        return prompt

    def noted_texts(encoder, by_task, owners):
        texts_read.append(by_task)
        return read(encoder, by_task, owners)

    monkeypatch.setattr(elicit, "few_shot", noted_prompt)
    monkeypatch.setattr(elicit, "_read", noted_texts)
    method = fitted(model, tokenizer, encoder_folder, (TASK, OTHER), demos_per_class=1, tries=1)
    assert len(shown) == len(method.states) == 20
    for text, state in list(zip(shown, method.states, strict=True))[8:12]:
        with torch.no_grad(), recorded(list(layers_of(model))) as outputs:
            model(**tokenizer(text, return_tensors="pt"))
        assert torch.allclose(state, torch.stack([output[0, -1] for output in outputs]), atol=1e-4)
    queries = texts_read[0]
    assert [len(each) for each in queries] == [12, 12]
    assert queries[0][0].startswith("Review: ")
    assert queries[0][1] in queries[0][0]
    assert not any(query in text for query in queries[0] for text in shown[:10])
    assert not any(query in text for query in queries[1] for text in shown[10:])


@pytest.mark.slow
def test_what_is_retrieved_is_the_mean_of_the_ten_likeliest_at_their_most_frequent_layer(
    pooled, encoder_folder
):
    texts = [*prompts(), *(OTHER.prompt(row) for row in OTHER.test[:5])]
    pooled.layers = torch.tensor([1, 3]).repeat_interleave(10)
    likely = same_task(pooled.head, load_encoder(str(encoder_folder))(texts), pooled.features)
    middle = likely.max(1).values.sort().values[4:6].mean()
    pooled.threshold = middle
    added, layers = pooled.retrieved(texts)
    for row in range(len(texts)):
        order = sorted(range(20), key=lambda entry: -likely[row, entry])[:10]
        votes = pooled.layers[order].tolist()
        layer = max((1, 3), key=votes.count)
        assert int(layers[row]) == (layer if likely[row].max() >= middle else -1)
        assert torch.allclose(
            added[row], pooled.weight * pooled.states[order, layer].mean(0), atol=1e-5
        )
    assert (pooled.retrieved(texts)[1] < 0).float().mean() == 0.5


@pytest.mark.slow
def test_a_prompt_that_retrieves_nothing_is_answered_as_by_the_bare_model(pooled, tokenizer):
    model = pooled.model
    plain = scores(pooled.model, tokenizer, prompts())
    likeliest = (
        same_task(pooled.head, load_encoder(pooled.settings.encoder)(prompts()), pooled.features)
        .max(1)
        .values
    )
    pooled.threshold = likeliest.median()
    alone = pooled.retrieved(prompts())[1] < 0
    assert alone.sum() == 2
    with pooled.applied(TASK):
        found = scores(model, tokenizer, prompts())
    assert torch.equal(found[alone], plain[alone])
    assert (found[~alone] - plain[~alone]).abs().amax(1).min() > 1e-3
    pooled.threshold = torch.tensor(1.1)
    with pooled.applied(TASK):
        assert torch.equal(scores(model, tokenizer, prompts()), plain)


@pytest.mark.slow
def test_the_threshold_recalls_enough_pairs_of_validation_rows_and_one_above_it_does_not(
    tokenizer, encoder_folder
):
    method = fitted(tiny.model("llama"), tokenizer, encoder_folder, (TASK, OTHER), tries=1)
    encoder = load_encoder(str(encoder_folder))
    pairs = []
    for i, task in enumerate((TASK, OTHER)):
        features = encoder([task.prompt(row) for row in task.validation])
        pairs.append(
            same_task(method.head, features, method.features[10 * i : 10 * i + 10]).flatten()
        )
    likely = torch.cat(pairs)
    assert (likely >= method.threshold).float().mean() >= 0.8
    assert (likely > method.threshold).float().mean() <= 0.8
    assert method.n_trained == len(method.head) == (2 * 12 + 1) * 512 + (512 + 1) * 2


@pytest.mark.slow
def test_the_head_learns_which_task_a_query_is_of():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 8, generator=generator)

    def near(n):
        return centres.repeat_interleave(n, 0) + 0.3 * torch.randn(3 * n, 8, generator=generator)

    prompts = near(10)
    queries = near(12)
    held = near(20)
    owners = torch.arange(3)
    same = owners.repeat_interleave(12)[:, None] == owners.repeat_interleave(10)
    before = torch.get_rng_state()
    head = train_head(queries, prompts, same, np.random.default_rng(0))
    likely = same_task(head, held, prompts)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(train_head(queries, prompts, same, np.random.default_rng(0)), head)
    right = (likely > 0.5) == (
        owners.repeat_interleave(20)[:, None] == owners.repeat_interleave(10)
    )
    assert right.float().mean() > 0.95
    # the query comes first, in training as in use
    turned = same_task(head, prompts, held).T
    assert not torch.allclose(turned, likely, atol=1e-2)


def test_a_generated_token_is_left_alone(tokenizer, encoder_folder):
    model = tiny.model("llama")
    method = fitted(model, tokenizer, encoder_folder, tries=1)
    given = tokenizer(prompts()[0], return_tensors="pt")
    block = layers_of(model)[int(method.layers[0])]
    with torch.no_grad(), method.applied(TASK):
        first = model(**given, use_cache=True)
        token = first.logits[:, -1:].argmax(-1)
        mask = torch.ones(1, given.input_ids.shape[1] + 1, dtype=torch.long)
        behind = model(input_ids=token, attention_mask=mask, **{CACHE: first[CACHE]}).logits
    with torch.no_grad(), method.applied(TASK):
        cache = model(**given, use_cache=True)[CACHE]
    with torch.no_grad():
        bare = model(input_ids=token, attention_mask=mask, **{CACHE: cache}).logits
    assert torch.equal(behind, bare)
    assert not block._forward_hooks


def test_embeddings_alone_are_refused(tokenizer, encoder_folder):
    model = tiny.model("llama")
    method = fitted(model, tokenizer, encoder_folder, tries=1)
    with pytest.raises(ValueError, match="give the model `input_ids`"), method.applied(TASK):
        model(inputs_embeds=torch.zeros(1, 3, 42))


def test_a_source_task_without_validation_rows_is_refused(tokenizer, encoder_folder):
    bare = Task(TASK.spec, TASK.train, TASK.test)
    with pytest.raises(ValueError, match="validation rows: give 5 training rows or more"):
        fitted(tiny.model("llama"), tokenizer, encoder_folder, (TASK, bare))


@pytest.mark.slow
def test_the_published_setting_is_tried_first_and_the_recall_only_where_there_is_a_retriever(
    pooled, tokenizer
):
    searched = [row for row in pooled.tried if "layer" not in row]
    assert searched[0] | {"accuracy": 0} == {"weight": 2.0, "recall": 0.8, "accuracy": 0}
    assert searched[1]["recall"] == 0.7
    alone = fitted(tiny.model("llama"), tokenizer, "nowhere", tries=12)  # and no encoder is read
    assert [row["weight"] for row in alone.tried if "layer" not in row] == [2.0, 1.0, 0.5]
    assert [row["layer"] for row in alone.tried if "layer" in row] == [*range(5)] * 3
