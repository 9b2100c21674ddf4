"""The laws of routed attention for every row of the family table."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

import tiny
from icrouting.decoder.families import CACHE, FAMILIES, stack_of
from icrouting.routing.attach import attach
from icrouting.routing.router import Routing
from plain_and_routed import CLOSE, MATTERS, logits_of, no_routing, routed_logits, state_of
from reference import reference_routed

ALL = list(tiny.ALL_CONFIGS)
SIDES = ["left", "right"]


def strong_routing(model):
    drawn = tiny.routing(model, 3)
    return Routing(3 * drawn.routing_vector, drawn.head_gates)


def test_every_row_has_a_tiny_model():
    assert {config.model_type for config in tiny.ALL_CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", ALL)
def test_zero_gates_leave_logits_unchanged(family, side):
    model = tiny.model_of(family)
    inputs = tiny.prompts(side=side)
    plain = logits_of(model, inputs)
    routed = routed_logits(model, inputs, tiny.pids(model), no_routing(model, 3))
    assert (routed - plain).abs().max() == 0.0


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", ALL)
def test_routed_attention_equals_the_dense_reference(family, side):
    model = tiny.model_of(family)
    dense = tiny.model(family, "eager")
    inputs = tiny.prompts(side=side)
    pids = tiny.pids(model)
    routing = strong_routing(model)
    plain = logits_of(model, inputs)
    with reference_routed(dense, pids, no_routing(model, 3)):
        assert (logits_of(dense, inputs) - plain).abs().max() <= CLOSE
    with reference_routed(dense, pids, routing):
        expected = logits_of(dense, inputs)
    assert (routed_logits(model, inputs, pids, routing) - expected).abs().max() <= CLOSE
    assert (expected - plain).abs().max() > MATTERS


@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", ALL)
def test_prefill_and_decoding_equal_one_pass(family, side, cache_kind):
    model = tiny.model_of(family)
    inputs = tiny.prompts(side=side)
    is_real = inputs["attention_mask"].bool()
    n_tokens = inputs["input_ids"].shape[1]
    with attach(model, tiny.pids(model)) as attachment:
        attachment.routing = strong_routing(model)
        expected = model(**inputs).logits
        if cache_kind == "dynamic":
            cache = DynamicCache(config=model.config)
        else:
            cache = StaticCache(config=model.config, max_cache_len=20)
        # Two pieces of a prefill, then one token after the other.
        steps = [(token, token + 1) for token in range(12, n_tokens)]
        pieces = []
        for start, stop in [(0, 9), (9, 12), *steps]:
            step = {
                "input_ids": inputs["input_ids"][:, start:stop],
                "position_ids": inputs["position_ids"][:, start:stop],
                "attention_mask": inputs["attention_mask"][:, :stop],
            }
            pieces.append(model(**step, use_cache=True, **{CACHE: cache}).logits)
    assert (torch.cat(pieces, 1) - expected)[is_real].abs().max() <= CLOSE


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", ALL)
def test_a_batch_equals_its_rows_one_by_one(family, side):
    model = tiny.model_of(family)
    lengths = (11, 5, 17)
    inputs = tiny.prompts(lengths, side)
    pids = tiny.pids(model)
    routing = strong_routing(model)
    together = routed_logits(model, inputs, pids, routing).split(lengths)
    for row, length in enumerate(lengths):
        columns = slice(-length, None) if side == "left" else slice(0, length)
        row_inputs = {name: tensor[row : row + 1, columns] for name, tensor in inputs.items()}
        row_routing = Routing(
            routing.routing_vector[row : row + 1], routing.head_gates[row : row + 1]
        )
        alone = routed_logits(model, row_inputs, pids, row_routing)
        assert (alone - together[row]).abs().max() <= CLOSE


@pytest.mark.parametrize("family", ALL)
def test_padding_on_the_left_without_position_ids_is_sound_but_for_one_family(family):
    """GPT-2 has learned positions, and a plain call counts padding among them."""
    model = tiny.model_of(family)
    inputs = tiny.prompts(side="left")
    routing = strong_routing(model)
    expected = routed_logits(model, inputs, tiny.pids(model), routing)
    del inputs["position_ids"]
    routed = routed_logits(model, inputs, tiny.pids(model), routing)
    is_sound = bool((routed - expected).abs().max() <= CLOSE)
    assert is_sound == (family != "gpt2")


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
@pytest.mark.parametrize("family", ALL)
@pytest.mark.slow
def test_generation_with_a_cache_equals_generation_without(family, settings):
    model = tiny.model_of(family)
    inputs = tiny.prompts(side="left")
    del inputs["position_ids"]
    settings = {"max_new_tokens": 7, "do_sample": False, **settings}
    plain = model.generate(**inputs, **settings)
    with attach(model, tiny.pids(model)) as attachment:
        attachment.routing = strong_routing(model)
        expected = model.generate(**inputs, **settings, use_cache=False)
        assert torch.equal(model.generate(**inputs, **settings), expected)
    assert not torch.equal(expected, plain), "the routing must matter"
    assert torch.equal(model.generate(**inputs, **settings), plain)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", ALL)
def test_leaving_restores_the_model_after_an_exception_in_generation(family, training):
    model = tiny.model_of(family)
    inputs = tiny.prompts(side="left")
    del inputs["position_ids"]
    plain = logits_of(model, inputs)
    before = [state_of(model.train(training)), [m.training for m in model.modules()]]

    def explode(step, scores):
        if step.shape[1] > inputs["input_ids"].shape[1] + 2:
            raise RuntimeError("boom")
        return scores

    with pytest.raises(RuntimeError, match="boom"), attach(model, tiny.pids(model)) as attachment:
        attachment.routing = strong_routing(model)
        model.generate(**inputs, max_new_tokens=5, do_sample=False, logits_processor=[explode])
    assert [state_of(model), [m.training for m in model.modules()]] == before
    assert torch.equal(logits_of(model.eval(), inputs), plain)
    assert stack_of(model).config._attn_implementation == model.config._attn_implementation
