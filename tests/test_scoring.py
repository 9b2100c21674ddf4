import numpy as np
import pytest
import torch

import tiny
from icrouting.decoder.scoring import option_ids, score_options
from icrouting.tasks.prompts import Prompt, balanced_demos, few_shot

CLOSE = 1e-4


def slow_scores(model, tokenizer, texts, options):
    rows = []
    for text in texts:
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
        firsts = [
            tokenizer(f"{text} {option}").input_ids[len(tokenizer(text).input_ids)]
            for option in options
        ]
        rows.append(logits[firsts])
    return torch.stack(rows)


def prompts_of(task, rng_seed=None):
    if rng_seed is None:
        return [Prompt("", task.prompt(example)) for example in task.test]
    demos = [(task, demo) for demo in balanced_demos(task, 3, np.random.default_rng(rng_seed))]
    return [few_shot(task, example, demos) for example in task.test]


@pytest.mark.parametrize("family", tiny.CONFIGS)
@pytest.mark.parametrize("few", [None, 0])
@pytest.mark.slow
def test_batched_scores_equal_one_prompt_at_a_time(family, few, tokenizer):
    model = tiny.model(family)
    task = tiny.task()
    prompts = prompts_of(task, few)
    options = task.spec.options
    fast = score_options(model, tokenizer, prompts, options, token_budget=90)
    slow = slow_scores(model, tokenizer, [prompt.text for prompt in prompts], options)
    assert (fast - slow).abs().max() < CLOSE


def test_a_shared_context_gives_the_scores_of_the_plain_way(tokenizer):
    model = tiny.model("llama")
    task = tiny.task()
    prompts = prompts_of(task, 1)
    shared = score_options(model, tokenizer, prompts, task.spec.options)
    plain = score_options(model, tokenizer, [prompt.text for prompt in prompts], task.spec.options)
    assert (shared - plain).abs().max() < CLOSE


@pytest.mark.parametrize("n_same", [2, 5])
def test_equal_prompts_and_one_that_begins_another_share_their_context_too(n_same, tokenizer):
    """Of what they share in tokens the last is left to each, or there would be nothing to score."""
    model = tiny.model("llama")
    task = tiny.task()
    demos = [(task, example) for example in task.train[:3]]
    first = few_shot(task, task.test[0], demos)
    options = task.spec.options
    for queries in ([first.query] * n_same, [first.query, f"{first.query} {first.query}"]):
        prompts = [Prompt(first.context, query) for query in queries]
        plain = score_options(model, tokenizer, [prompt.text for prompt in prompts], options)
        assert (score_options(model, tokenizer, prompts, options) - plain).abs().max() < CLOSE


def test_a_shared_context_runs_once(tokenizer):
    model = tiny.model("llama")
    task = tiny.task()
    prompts = prompts_of(task, 1)
    lengths = []
    hook = model.model.embed_tokens.register_forward_pre_hook(
        lambda m, args: lengths.append(args[0].numel())
    )
    score_options(model, tokenizer, prompts, task.spec.options)
    hook.remove()
    plain = sum(len(tokenizer(prompt.text).input_ids) for prompt in prompts)
    assert sum(lengths) < plain / 2


def test_the_rows_behind_a_shared_context_are_few_enough_for_its_cache(tokenizer):
    model = tiny.model("llama")
    task = tiny.task()
    shapes = []
    prompts = prompts_of(task, 1)
    plain = score_options(model, tokenizer, [prompt.text for prompt in prompts], task.spec.options)
    longest = max(len(tokenizer(prompt.text).input_ids) for prompt in prompts)
    with model.register_forward_pre_hook(
        lambda m, args, kw: shapes.append((*kw["input_ids"].shape, kw.get("attention_mask"))),
        with_kwargs=True,
    ):
        for budget in (3 * longest, longest // 2):
            shared = score_options(
                model, tokenizer, prompts, task.spec.options, token_budget=budget
            )
            assert (shared - plain).abs().max() < CLOSE
            cached = [
                (n_rows, mask.shape[1] - n_new)
                for n_rows, n_new, mask in shapes
                if mask is not None
            ]
            assert sum(n_rows for n_rows, _ in cached) == len(prompts)
            assert all(n_rows == 1 or n_rows * n_seen <= budget for n_rows, n_seen in cached)
            shapes.clear()


def test_options_may_differ_by_prompt_and_missing_ones_lose(tokenizer):
    model = tiny.model("llama")
    scores = score_options(
        model, tokenizer, ["the plot:", "a film:"], [["good", "bad"], ["joy", "dull", "bad"]]
    )
    assert scores.shape == (2, 3)
    assert scores[0, 2] == -torch.inf
    assert torch.isfinite(scores[1]).all()


def test_options_with_one_first_token_are_refused(tokenizer):
    with pytest.raises(ValueError, match="'good' and 'good ball' share their first token"):
        option_ids(tokenizer, "the plot:", ["good", "good ball"])


def test_an_option_that_begins_with_a_bare_space_is_refused(tokenizer):
    with pytest.raises(ValueError, match="option 'weak' begins with a token that is a bare space"):
        option_ids(tokenizer, "a film:", ["joy", "weak"])


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["a:"], ["good"], "at least two options"),
        (["a:", "b:"], [["good", "bad"]], r"one per prompt \(2\)"),
        ([""], ["good", "bad"], "empty text"),
        (["joy " * 600], ["good", "bad"], r"longer than the model's context of 512"),
    ],
)
def test_what_cannot_be_scored_is_said(prompts, options, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        score_options(tiny.model("llama"), tokenizer, prompts, options)


def test_scoring_leaves_no_hook(tokenizer):
    model = tiny.model("llama")
    score_options(model, tokenizer, ["the plot:"], ["good", "bad"])
    assert all(not module._forward_pre_hooks for module in model.modules())
