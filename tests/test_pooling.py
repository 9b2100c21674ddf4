"""Pooling: which tokens of a prompt count in what is captured of it."""

import numpy as np
import pytest
import torch

import tiny
from icrouting.decoder.batches import pad
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import attention_of
from icrouting.fitting.capture import capture_last_tokens, captured
from icrouting.fitting.pooling import last_weights, pooled
from icrouting.tasks.prompts import Prompt, extraction_prompts
from plain_and_routed import state_of

LAYERS = (2, 4)
POOLINGS = ["last", "last-4", "last-8", "rollout"]
# fp32 round-off of projections of size 10
CLOSE = 1e-4


def prompts_of(n_prompts=5, per_context=1):
    task = tiny.task()
    rng = np.random.default_rng(0)
    few_shot = list(extraction_prompts(task, n_prompts, 1, rng, per_context))
    # Fewer tokens than are pooled, and lengths of every kind in a batch.
    return [*few_shot, Prompt("", "joy"), Prompt("", "a longer text of the film :")]


def attention_weights(model, tokens):
    """A prompt's attention in every layer, [n_heads, q_len, q_len], as the model gives it."""
    return [each[0] for each in model(input_ids=tokens, output_attentions=True).attentions]


def slow_weights(family, tokens, pooling):
    """The weight of each token of one prompt, token by token."""
    n_tokens = tokens.shape[1]
    if pooling == "rollout":
        product = torch.eye(n_tokens)
        for weights in attention_weights(tiny.model(family, "eager"), tokens):
            heads = sum(weights) / len(weights)
            product = (heads + torch.eye(n_tokens)) / 2 @ product
        return product[-1]
    counted = 1 if pooling == "last" else int(pooling[-1])
    counted = min(counted, n_tokens)
    return torch.tensor([0.0] * (n_tokens - counted) + [1 / counted] * counted)


def slowly_pooled(family, tokenizer, prompts, pooling, side):
    """One prompt at a time, one token at a time."""
    model = tiny.model(family)
    rows = []
    for prompt in prompts:
        tokens = torch.tensor([tokenizer(prompt.text).input_ids])
        weights = slow_weights(family, tokens, pooling)
        with captured(model, LAYERS) as stores:
            model(input_ids=tokens)
            states = [store[side][0] for store in stores]
        row = [sum(w * state for w, state in zip(weights, each, strict=True)) for each in states]
        rows.append(torch.stack(row))
    return torch.stack(rows, 1)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_what_is_captured_is_the_weighted_mean_of_all_tokens(family, pooling, tokenizer):
    decoder = Decoder.of(tiny.model(family), tokenizer)
    prompts = prompts_of()
    batches = list(capture_last_tokens(decoder, prompts, LAYERS, token_budget=200, pooling=pooling))
    assert 1 < len(batches) < len(prompts), "some share a batch"
    for place, side in enumerate(("query", "key")):
        got = torch.cat([batch[place] for batch in batches], dim=1)
        slow = slowly_pooled(family, tokenizer, prompts, pooling, side)
        assert got.shape == slow.shape
        for layer in range(len(LAYERS)):
            distances = torch.cdist(got[layer], slow[layer])
            assert distances.min(0).values.max() < CLOSE
            assert distances.min(1).values.max() < CLOSE


@pytest.mark.parametrize("pooling", ["last-8", "rollout"])
def test_a_shared_context_s_tokens_count_too(pooling, tokenizer):
    """A context that is computed once leaves the queries of its tokens nowhere."""
    decoder = Decoder.of(tiny.model("llama"), tokenizer)
    prompts = prompts_of(per_context=5)[:5]
    assert len({prompt.context for prompt in prompts}) == 1
    shared = list(capture_last_tokens(decoder, prompts, LAYERS, pooling=pooling))
    got = torch.cat([query for query, _ in shared], dim=1)
    slow = slowly_pooled("llama", tokenizer, prompts, pooling, "query")
    assert torch.cdist(got[1], slow[1]).min(0).values.max() < CLOSE


@pytest.mark.parametrize("pooling", POOLINGS[1:])
def test_weights_of_a_prompt_sum_to_one_and_padding_has_none(pooling, tokenizer):
    decoder = Decoder.of(tiny.model("llama"), tokenizer)
    batch = pad([[5, 6, 7, 8, 9, 10, 11], [5, 6], [9, 8, 7, 6]], decoder.pad_id)
    mask = batch.attention_mask
    with pooled(decoder, pooling) as weights_of:
        decoder.stack(input_ids=batch.input_ids, attention_mask=mask.long(), use_cache=False)
        weights = weights_of(mask)
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    assert (weights[~mask] == 0).all()
    assert (weights >= 0).all()


def test_all_tokens_count_where_there_are_fewer():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    expected = torch.tensor([[0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(last_weights(mask, 8), expected)


def test_rollout_leaves_the_model_as_it_was_after_an_exception_too(tokenizer):
    model = tiny.model("llama", "sdpa")
    before = state_of(model)
    with (
        pytest.raises(RuntimeError, match="boom"),
        pooled(Decoder.of(model, tokenizer), "rollout"),
    ):
        assert attention_of(model, 0)._forward_hooks
        raise RuntimeError("boom")
    assert state_of(model) == before
