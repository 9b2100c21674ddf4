import pytest
import torch
from transformers import DynamicCache, StaticCache

import tiny
from icrouting.decoder.families import CACHE, attention_of
from icrouting.routing.attach import attach
from icrouting.routing.router import Routing
from plain_and_routed import logits_of, no_routing, routed_logits, state_of
from reference import reference_routed

FAMILIES = list(tiny.CONFIGS)
KERNELS = ["sdpa", "eager"]
SIDES = ["left", "right"]
# fp32 round-off of logits of size 10 through five layers
CLOSE = 1e-5


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_zero_gates_leave_logits_unchanged(family, kernel, side):
    model, inputs = tiny.model(family, kernel), tiny.prompts(side=side)
    plain = logits_of(model, inputs)
    routed = routed_logits(model, inputs, tiny.pids(model), no_routing(model, 3))
    assert (routed - plain).abs().max() == 0.0


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_that_is_not_routed_stays_beside_rows_that_are(family, kernel):
    """Its heads are widened with theirs, so it may differ by rounding."""
    model, inputs = tiny.model(family, kernel), tiny.prompts((13, 13, 13))
    routing = tiny.routing(model, 3)
    routing.head_gates[1] = 0
    plain, routed = (
        logits_of(model, inputs),
        routed_logits(model, inputs, tiny.pids(model), routing),
    )
    moved = (routed - plain).abs().unflatten(0, (3, 13)).amax((1, 2))
    assert moved[1] <= CLOSE
    assert moved[[0, 2]].min() > 0.1


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_routed_attention_equals_the_dense_reference(family, kernel, side):
    inputs = tiny.prompts(side=side)
    model, dense = tiny.model(family, kernel), tiny.model(family, "eager")
    pids, routing = tiny.pids(model), tiny.routing(model, 3)
    with reference_routed(dense, pids, routing):
        expected = logits_of(dense, inputs)
    got = routed_logits(model, inputs, pids, routing)
    assert (got - expected).abs().max() <= CLOSE
    assert (got - logits_of(model, inputs)).abs().max() > 0.1, (
        "the routing must matter for this to say anything"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_without_routing_is_the_model(family):
    model, inputs = tiny.model(family, "eager"), tiny.prompts()
    plain = logits_of(model, inputs)
    with reference_routed(model, tiny.pids(model), no_routing(model, 3)):
        assert (logits_of(model, inputs) - plain).abs().max() <= CLOSE


@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decoding_equal_one_pass(family, kernel, cache_kind):
    model, inputs = tiny.model(family, kernel), tiny.prompts(side="left")
    pids, routing = tiny.pids(model), tiny.routing(model, 3)
    n_prefill, n_tokens = 9, inputs["input_ids"].shape[1]
    real = inputs["attention_mask"].bool()
    with attach(model, pids) as attachment:
        attachment.routing = routing
        expected = model(**inputs).logits
        dynamic = cache_kind == "dynamic"
        cache = (
            DynamicCache(config=model.config)
            if dynamic
            else StaticCache(config=model.config, max_cache_len=20)
        )
        pieces, spans = [], [(0, n_prefill), (n_prefill, n_prefill + 3)]
        for start, stop in [*spans, *((t, t + 1) for t in range(n_prefill + 3, n_tokens))]:
            step = {
                "input_ids": inputs["input_ids"][:, start:stop],
                "position_ids": inputs["position_ids"][:, start:stop],
                "attention_mask": inputs["attention_mask"][:, :stop],
            }
            pieces.append(model(**step, use_cache=True, **{CACHE: cache}).logits)
    assert (torch.cat(pieces, 1) - expected)[real].abs().max() <= CLOSE


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_equals_its_rows_one_by_one(family):
    model, lengths = tiny.model(family), (11, 5, 17)
    inputs, pids, routing = tiny.prompts(lengths, "left"), tiny.pids(model), tiny.routing(model, 3)
    together = routed_logits(model, inputs, pids, routing).split(lengths)
    for row, length in enumerate(lengths):
        single = {name: tensor[row : row + 1, -length:] for name, tensor in inputs.items()}
        one = Routing(routing.routing_vector[row : row + 1], routing.head_gates[row : row + 1])
        assert (routed_logits(model, single, pids, one) - together[row]).abs().max() <= CLOSE


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}]
)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_generation_equals_the_dense_reference_without_a_cache(family, settings):
    model, dense, inputs = (
        tiny.model(family),
        tiny.model(family, "eager"),
        tiny.prompts(side="left"),
    )
    del inputs["position_ids"]
    pids, routing = tiny.pids(model), tiny.routing(model, 3)
    settings = {"max_new_tokens": 9, "do_sample": False, **settings}
    with reference_routed(dense, pids, routing):
        expected = dense.generate(**inputs, **settings, use_cache=False)
    with attach(model, pids) as attachment:
        attachment.routing = routing
        got = model.generate(**inputs, **settings)
    assert torch.equal(got, expected)
    assert not torch.equal(got, model.generate(**inputs, **settings)), "the routing must matter"


def test_gradients_equal_those_of_the_dense_reference():
    inputs = tiny.prompts()
    model, dense = tiny.model("llama"), tiny.model("llama", "eager")
    pids, gradients = tiny.pids(model), []
    for routes in ("ours", "dense"):
        drawn = tiny.routing(model, 3)
        routing = Routing(drawn.routing_vector.requires_grad_(), drawn.head_gates.requires_grad_())
        if routes == "ours":
            logits = routed_logits(model, inputs, pids, routing)
        else:
            with reference_routed(dense, pids, routing):
                logits = logits_of(dense, inputs)
        logits.logsumexp(-1).sum().backward()
        gradients.append((routing.routing_vector.grad, routing.head_gates.grad))
    for ours, reference in zip(*gradients, strict=True):
        assert torch.allclose(ours, reference, rtol=1e-3, atol=1e-4)
        assert ours.abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_restores_the_model_after_an_exception_too(family):
    model, inputs = tiny.model(family), tiny.prompts()
    before, plain = state_of(model), logits_of(model, inputs)

    def explode(module, args):
        raise RuntimeError("boom")

    handle = model.model.norm.register_forward_pre_hook(explode)
    with pytest.raises(RuntimeError, match="boom"), attach(model, tiny.pids(model)) as attachment:
        attachment.routing = tiny.routing(model, 3)
        model(**inputs)
    handle.remove()
    assert state_of(model) == before
    assert torch.equal(logits_of(model, inputs), plain)


def test_a_second_attach_to_a_routed_model_is_refused_and_harmless():
    model = tiny.model("llama")
    with attach(model, tiny.pids(model)):
        before = state_of(model)
        with (
            pytest.raises(ValueError, match="icr is attached to this model"),
            attach(model, tiny.pids(model)),
        ):
            pass
        assert state_of(model) == before


def test_two_models_are_routed_at_once_without_mixing():
    first, second, inputs = tiny.model("llama"), tiny.model("llama", seed=5), tiny.prompts()
    pids, routing, other = tiny.pids(first), tiny.routing(first, 3), tiny.routing(first, 3, seed=9)
    alone = routed_logits(first, inputs, pids, routing), routed_logits(second, inputs, pids, other)
    with attach(first, pids) as one, attach(second, pids) as two:
        one.routing, two.routing = routing, other
        assert torch.equal(logits_of(first, inputs), alone[0])
        assert torch.equal(logits_of(second, inputs), alone[1])


def test_a_kernel_that_cannot_be_widened_is_refused():
    model = tiny.model("llama")
    model.config._attn_implementation = "flex_attention"
    with (
        pytest.raises(ValueError, match="'flex_attention' cannot be routed"),
        attach(model, tiny.pids(model)),
    ):
        pass
    assert attention_of(model, 3)._forward_hooks == {}


def test_directions_of_another_model_are_refused():
    model = tiny.model("llama")
    with (
        pytest.raises(ValueError, match="48 and 16 wide"),
        attach(model, tiny.pids(tiny.model("qwen2"))),
    ):
        pass


def test_a_batch_that_is_no_multiple_of_the_queries_is_refused():
    model = tiny.model("llama")
    with attach(model, tiny.pids(model)) as attachment:
        attachment.routing = tiny.routing(model, 2)
        with pytest.raises(ValueError, match=r"2 queries: .* got 3"):
            model(**tiny.prompts())


def test_a_routing_used_without_gradients_still_takes_them_later():
    model, inputs = tiny.model("llama"), tiny.prompts()
    routing = tiny.routing(model, 3)
    for tensor in (routing.routing_vector, routing.head_gates):
        tensor.requires_grad_()
    with attach(model, tiny.pids(model)) as attachment:
        attachment.routing = routing
        with torch.no_grad():
            logits_of(model, inputs)
        logits_of(model, inputs).square().mean().backward()
    assert routing.routing_vector.grad.abs().amax() > 0
    assert routing.head_gates.grad.abs().amax() > 0
