import pytest
import torch
from transformers import AutoModelForCausalLM, GPTJConfig

import tiny
from icrouting.capture import capture_last_tokens, captured
from icrouting.families import attention_of, dims_of, late_third

LAYERS = (2, 4)


def keep(entering, layer):
    return lambda module, args, kwargs: entering.update({layer: kwargs["hidden_states"]})


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_captured_states_are_the_projections_of_the_last_token(family, tokenizer):
    model, task = tiny.model(family), tiny.task()
    texts = [task.prompt(example) for example in task.test] + ["joy", "a longer text of the film and its plot :"]
    pieces = list(capture_last_tokens(model, tokenizer, texts, LAYERS, token_budget=70))
    assert len(pieces) > 2, "several batches"
    query, key = (torch.cat(side, dim=1) for side in zip(*pieces, strict=True))
    slow = []
    for text in texts:
        entering = {}
        hooks = [
            attention_of(model, layer).register_forward_pre_hook(keep(entering, layer), with_kwargs=True)
            for layer in LAYERS
        ]
        model(**tokenizer(text, return_tensors="pt"))
        for hook in hooks:
            hook.remove()
        attention, hidden = attention_of(model, LAYERS[1]), entering[LAYERS[1]][0, -1]
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


def test_prompts_done_before_are_left_out(tokenizer):
    model, texts = tiny.model("llama"), [tiny.task().prompt(example) for example in tiny.task().test]
    pieces = list(capture_last_tokens(model, tokenizer, texts, LAYERS, token_budget=70))
    n_first = pieces[0][0].shape[1]
    rest = list(capture_last_tokens(model, tokenizer, texts, LAYERS, n_done=n_first, token_budget=70))
    assert len(rest) == len(pieces) - 1
    assert torch.equal(rest[0][1], pieces[1][1])


def test_leaving_removes_the_hooks_after_an_exception_too():
    model = tiny.model("llama")
    with pytest.raises(RuntimeError), captured(model, LAYERS):
        raise RuntimeError
    assert all(not module._forward_hooks for module in model.modules())


def test_a_family_that_cannot_be_routed_is_refused_by_name(tokenizer):
    config = GPTJConfig(vocab_size=31, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, bos_token_id=0, eos_token_id=0)
    with pytest.raises(ValueError, match="'gptj' models cannot be routed: looked for queries and keys"):
        list(capture_last_tokens(AutoModelForCausalLM.from_config(config), tokenizer, ["a"], (0,)))


def test_the_last_third_is_that_of_the_paper():
    assert late_third(30) == tuple(range(20, 30))
    assert late_third(32) == tuple(range(20, 32))  # L/3*2+1 .. L counted from one, integer division
