import pytest
import torch

import tiny
from icrouting.attach import attach
from icrouting.losses import entropy
from icrouting.scoring import next_token_logits
from icrouting.trunk import late_entry, pad_states, run_trunk

FIRST = 3


def token_lists():
    inputs = tiny.prompts((11, 5, 17, 8), "right")
    return [row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


@pytest.mark.parametrize("first", [0, 1, FIRST])
@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_a_pass_from_the_trunk_equals_a_whole_pass(family, first):
    model = tiny.model(family)
    states = run_trunk(model, token_lists(), first, 1, token_budget=40)
    batch, hidden = pad_states(states, 1)
    pids, routing = tiny.pids(model), tiny.routing(model, 4)
    with attach(model, pids) as attachment:
        attachment.routing = routing
        expected = next_token_logits(model, batch)
        with late_entry(model, first) as entry:
            got = entry.next_token_logits(batch, hidden)
    assert (got - expected).abs().max() <= 1e-4


def test_the_trunk_keeps_the_plain_entropy():
    model = tiny.model("llama")
    for tokens, state in zip(token_lists(), run_trunk(model, token_lists(), FIRST, 1), strict=True):
        logits = model(input_ids=torch.tensor([tokens])).logits[0, -1:]
        assert state.entropy == pytest.approx(entropy(logits).item(), abs=1e-4)
        assert state.tokens == tokens


def test_only_the_layers_from_the_first_routed_one_run():
    model = tiny.model("llama")
    batch, hidden = pad_states(run_trunk(model, token_lists(), FIRST, 1), 1)
    ran = []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda module, args, index=index: ran.append(index))
    with late_entry(model, FIRST) as entry:
        entry.next_token_logits(batch, hidden)
    assert ran == [3, 4]


def test_leaving_puts_the_layers_back_after_an_exception_too():
    model = tiny.model("llama")
    before = list(model.model.layers)
    with pytest.raises(RuntimeError), late_entry(model, FIRST):
        raise RuntimeError
    assert list(model.model.layers) == before
