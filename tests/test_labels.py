"""Whole-label scoring: the trie of option tokens behind one cached prompt, against slow ways."""

import numpy as np
import pytest
import torch

import tiny
from icrouting.decoder.scoring import option_tokens, score_options
from icrouting.tasks.prompts import Prompt, balanced_demos, few_shot
from icrouting.tasks.task import TaskSpec

# In float32; steps behind a cache add up in another order than one whole pass.
CLOSE = 1e-3
# One to six tokens; beginnings are shared at depths of one to four.
LABELS = [
    "joy",
    "good",
    "good ball",
    "good ball team",
    "good ball team vote joy",
    "good ball vote joy dull team",
    "dull vote joy",
    "dull vote team ball",
]
TASK = tiny.task()
PROMPTS = ["a film:", "the plot and the actors:", "joy:", TASK.prompt(TASK.test[0])]


def n_tokens(tokenizer, labels=LABELS):
    return torch.tensor([len(tokens) for tokens in option_tokens(tokenizer, "a:", labels)])


def slow_sums(model, tokenizer, texts, labels):
    """One whole pass of prompt and label for each, without a cache."""
    rows = []
    for text in texts:
        prompt_ids = tokenizer(text).input_ids
        row = []
        for label in labels:
            ids = tokenizer(f"{text} {label}").input_ids
            logits = model(torch.tensor([ids]), use_cache=False).logits[0].float()
            log_probs = logits.log_softmax(-1)
            places = range(len(prompt_ids), len(ids))
            row.append(sum(log_probs[place - 1, ids[place]] for place in places))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def test_the_labels_are_of_one_to_six_tokens(tokenizer):
    assert sorted(set(n_tokens(tokenizer).tolist())) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("family", tiny.ALL_CONFIGS)
def test_sums_are_those_of_whole_passes(family, tokenizer):
    model = tiny.model_of(family)
    fast = score_options(model, tokenizer, PROMPTS, LABELS, label_scoring="sum")
    assert (fast - slow_sums(model, tokenizer, PROMPTS, LABELS)).abs().max() < CLOSE


@pytest.mark.parametrize("budget", [1, 40, 90, 300])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_sums_are_the_same_in_parts_and_batches_of_any_size(family, budget, tokenizer):
    model = tiny.model_of(family)
    whole = score_options(model, tokenizer, PROMPTS, LABELS, label_scoring="sum")
    parts = score_options(
        model, tokenizer, PROMPTS, LABELS, label_scoring="sum", token_budget=budget
    )
    assert (parts - whole).abs().max() < CLOSE


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_sums_behind_a_shared_context_are_those_of_the_plain_way(family, tokenizer):
    model = tiny.model_of(family)
    demos = [(TASK, demo) for demo in balanced_demos(TASK, 2, np.random.default_rng(0))]
    prompts = [few_shot(TASK, example, demos) for example in TASK.test[:3]]
    kept = {}
    texts = [prompt.text for prompt in prompts]
    plain = slow_sums(model, tokenizer, texts, LABELS)
    for _ in range(2):
        shared = score_options(
            model, tokenizer, prompts, LABELS, label_scoring="sum", kept=kept, token_budget=500
        )
        assert (shared - plain).abs().max() < CLOSE


def test_means_are_sums_by_the_number_of_tokens(tokenizer):
    model = tiny.model("llama")
    sums = score_options(model, tokenizer, PROMPTS, LABELS, label_scoring="sum")
    means = score_options(model, tokenizer, PROMPTS, LABELS, label_scoring="mean")
    assert torch.equal(means, sums / n_tokens(tokenizer))


@pytest.mark.parametrize("label_scoring", ["sum", "mean"])
def test_labels_of_one_token_have_the_probabilities_of_their_logits(label_scoring, tokenizer):
    model = tiny.model("llama")
    options = ["joy", "good", "vote", "dull"]
    first = score_options(model, tokenizer, PROMPTS, options)
    whole = score_options(model, tokenizer, PROMPTS, options, label_scoring=label_scoring)
    assert (whole.softmax(1) - first.softmax(1)).abs().max() < 1e-5


def test_options_may_differ_by_prompt_in_their_tree(tokenizer):
    model = tiny.model("llama")
    lists = [LABELS[:4], ["joy", "dull"], LABELS[3:], LABELS]
    whole = score_options(model, tokenizer, PROMPTS, lists, label_scoring="sum")
    for place, (prompt, options) in enumerate(zip(PROMPTS, lists, strict=True)):
        alone = score_options(model, tokenizer, [prompt], options, label_scoring="sum")
        assert (whole[place, : len(options)] - alone[0]).abs().max() < CLOSE
        assert (whole[place, len(options) :] == -torch.inf).all()


def seen_shapes(model, *arguments, **settings):
    """The rows, the tokens read and the width of the mask of every pass."""
    shapes = []
    with model.register_forward_pre_hook(
        lambda m, args, kw: shapes.append((*kw["input_ids"].shape, kw["attention_mask"].shape[1])),
        with_kwargs=True,
    ):
        score_options(model, *arguments, label_scoring="sum", **settings)
    return shapes


def test_what_labels_begin_with_in_common_is_read_once(tokenizer):
    shapes = seen_shapes(tiny.model("llama"), tokenizer, [PROMPTS[0]], LABELS)
    n_prompt = len(tokenizer(PROMPTS[0]).input_ids)
    inner = set()
    for tokens in option_tokens(tokenizer, "a:", LABELS):
        inner |= {tuple(tokens[:n]) for n in range(1, len(tokens))}
    assert [(rows, read) for rows, read, _ in shapes[:1]] == [(1, n_prompt)]
    assert all(read == 1 for _, read, _ in shapes[1:])
    assert sum(rows for rows, _, _ in shapes[1:]) == len(inner)


def test_the_rows_of_a_step_are_few_enough_for_their_cache(tokenizer):
    for budget in (40, 90, 300):
        shapes = seen_shapes(tiny.model("llama"), tokenizer, PROMPTS, LABELS, token_budget=budget)
        steps = [(rows, kv_len) for rows, read, kv_len in shapes if read == 1]
        assert all(rows == 1 or rows * kv_len <= budget for rows, kv_len in steps)


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused(tokenizer):
    prompt = "joy" + " joy" * 509 + ":"
    with pytest.raises(ValueError, match="its longest answer are more than the model's context"):
        score_options(tiny.model("llama"), tokenizer, [prompt], LABELS, label_scoring="sum")


def test_options_of_the_same_tokens_are_refused(tokenizer):
    with pytest.raises(ValueError, match="'good' and 'good' are the same tokens"):
        option_tokens(tokenizer, "a:", ["good", "joy", "good"])


def test_a_way_to_score_that_there_is_not_is_refused(tokenizer):
    with pytest.raises(ValueError, match="label_scoring must be one of first, sum, mean"):
        TaskSpec("toy", "far", "{text}:", ("joy", "dull"), label_scoring="median")


def test_an_option_that_begins_with_a_bare_space_is_scored_by_all_its_tokens(tokenizer):
    model = tiny.model("llama")
    options = ["joy", "weak"]
    whole = score_options(model, tokenizer, PROMPTS, options, label_scoring="sum")
    assert (whole - slow_sums(model, tokenizer, PROMPTS, options)).abs().max() < CLOSE


def test_scoring_leaves_the_kept_context_as_it_was(tokenizer):
    model = tiny.model("llama")
    kept = {}
    prompts = [Prompt("a film: joy\n", "the plot:"), Prompt("a film: joy\n", "a plot:")]
    score_options(model, tokenizer, prompts, LABELS, label_scoring="sum", kept=kept)
    (context,) = kept.values()
    before = [layer.keys.clone() for layer in context.cache.layers]
    score_options(model, tokenizer, prompts, LABELS, label_scoring="sum", kept=kept)
    after = [layer.keys for layer in context.cache.layers]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
