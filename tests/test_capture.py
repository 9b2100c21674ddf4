import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPTJConfig

import tiny
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import attention_of, dims_of
from icrouting.fitting.capture import capture_last_tokens, captured
from icrouting.tasks.prompts import Prompt, extraction_prompts

LAYERS = (2, 4)


def keep(entering, layer):
    return lambda module, args, kwargs: entering.update({layer: kwargs["hidden_states"]})


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_captured_states_are_the_projections_of_the_last_token(family, tokenizer):
    model, task = tiny.model(family), tiny.task()
    decoder = Decoder.of(model, tokenizer)
    texts = [task.prompt(example) for example in task.test]
    texts += ["joy", "a longer text of the film and its plot :"]
    prompts = [Prompt("", text) for text in texts]
    batches = list(capture_last_tokens(decoder, prompts, LAYERS, token_budget=70))
    assert len(batches) > 2, "several batches"
    query, key = (torch.cat(side, dim=1) for side in zip(*batches, strict=True))
    # Prompt by prompt, from what enters the attention.
    slow = []
    for text in texts:
        entering = {}
        hooks = [
            attention_of(model, layer).register_forward_pre_hook(
                keep(entering, layer), with_kwargs=True
            )
            for layer in LAYERS
        ]
        model(**tokenizer(text, return_tensors="pt"))
        for hook in hooks:
            hook.remove()
        attention = attention_of(model, LAYERS[1])
        hidden = entering[LAYERS[1]][0, -1]
        if family == "gemma3":
            heads = attention.q_proj(hidden).unflatten(-1, (-1, attention.head_dim))
            slow.append(attention.q_norm(heads).flatten())
        else:
            slow.append(attention.q_proj(hidden))
    dims = dims_of(model)
    assert query.shape == (2, len(texts), dims.n_heads * dims.head_dim)
    assert key.shape == (2, len(texts), dims.n_kv_heads * dims.head_dim)
    by_value = torch.cdist(query[1], torch.stack(slow)).min(1).values
    assert by_value.max() < 1e-4, "every captured row is one of the slow ones"
    assert torch.cdist(torch.stack(slow), query[1]).min(1).values.max() < 1e-4


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_a_shared_context_computed_once_gives_the_same_states(family, tokenizer):
    model, task = tiny.model(family), tiny.task()
    decoder = Decoder.of(model, tokenizer)
    prompts = list(extraction_prompts(task, 9, 1, np.random.default_rng(0), per_context=4))
    n_read = []

    def count(module, args, kwargs):
        n_read.append(kwargs["input_ids"].numel())

    with model.register_forward_pre_hook(count, with_kwargs=True):
        shared = list(capture_last_tokens(decoder, prompts, LAYERS, token_budget=70))
    n_cached = min(len(tokenizer(prompt.context).input_ids) for prompt in prompts)
    for query, _ in shared:
        assert query.shape[1] <= max(1, 70 // n_cached), "what a row has cached counts too"
    alone = []
    for prompt in prompts:
        alone += capture_last_tokens(decoder, [prompt], LAYERS)
    for side in (0, 1):
        together = torch.cat([batch[side][1] for batch in shared])
        expected = torch.cat([batch[side][1] for batch in alone])
        assert torch.cdist(together, expected).min(1).values.max() < 1e-3
        assert torch.cdist(expected, together).min(1).values.max() < 1e-3
    # Two contexts of four prompts each; the ninth has one to itself.
    token_lists = tokenizer([prompt.text for prompt in prompts[:8]]).input_ids
    assert 0 < sum(n_read) < sum(len(tokens) for tokens in token_lists)


def test_a_prompt_that_is_not_finite_is_named_and_left_out_only_if_asked(tokenizer, caplog):
    model, task = tiny.model("llama"), tiny.task()
    decoder = Decoder.of(model, tokenizer)
    prompts = [Prompt("", task.prompt(example)) for example in task.test]
    with torch.no_grad():
        token = tokenizer(prompts[2].text).input_ids[4]
        model.get_input_embeddings().weight[token] = torch.nan
    odd = [prompt for prompt in prompts if token in tokenizer(prompt.text).input_ids]
    assert 0 < len(odd) < len(prompts)
    refusal = r"NaN or infinity in the queries or keys of .* leave such prompts out"
    with pytest.raises(ValueError, match=refusal):
        list(capture_last_tokens(decoder, prompts, LAYERS))
    batches = list(capture_last_tokens(decoder, prompts, LAYERS, skip_nan=True))
    assert sum(query.shape[1] for query, _ in batches) == len(prompts) - len(odd)
    assert all(query.isfinite().all() for query, _ in batches)
    assert any(repr(prompt.query[-60:]) in caplog.text for prompt in odd)


def test_leaving_removes_the_hooks_after_an_exception_too():
    model = tiny.model("llama")
    with pytest.raises(RuntimeError), captured(model, LAYERS):
        raise RuntimeError
    assert all(not module._forward_hooks for module in model.modules())


def test_a_family_that_cannot_be_routed_is_refused_by_name(tokenizer):
    config = GPTJConfig(
        vocab_size=tiny.VOCAB,
        n_embd=16,
        n_layer=1,
        n_head=2,
        rotary_dim=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    decoder = Decoder.of(AutoModelForCausalLM.from_config(config), tokenizer)
    refusal = "'gptj' models cannot be routed: looked for queries and keys"
    with pytest.raises(ValueError, match=refusal):
        list(capture_last_tokens(decoder, [Prompt("", "a")], (0,)))
