"""Spread: the paper's uniform ablations of a fitted router, its magnitude kept."""

import numpy as np
import pytest
import torch

import tiny
from bench import CLOSE, Bench
from icrouting.config import HIDDEN
from icrouting.methods.registry import make
from icrouting.methods.settings import Settings
from icrouting.routing.router import Routing, check_spread
from reference import reference_routed

SPREADS = ["alpha", "gates"]


@pytest.fixture(scope="module", params=tiny.CONFIGS)
def bench(request):
    return Bench(HIDDEN, request.param)


@pytest.fixture(scope="module")
def llama():
    return Bench(HIDDEN)


def slowly_spread(routing, what):
    """One query, one layer, one number at a time."""
    alpha = routing.routing_vector.clone()
    gates = routing.head_gates.clone()
    spread = alpha if what == "alpha" else gates
    for query in range(spread.shape[0]):
        for layer in range(spread.shape[1]):
            numbers = [abs(float(number)) for number in spread[query, layer]]
            for place in range(len(numbers)):
                spread[query, layer, place] = sum(numbers) / len(numbers)
    return Routing(alpha, gates)


@pytest.mark.parametrize("what", SPREADS)
def test_every_direction_or_head_of_a_layer_gets_the_mean_magnitude(what, llama):
    routing = tiny.routing(llama.model, 4)
    spread = routing.spread(what)
    slow = slowly_spread(routing, what)
    torch.testing.assert_close(spread.routing_vector, slow.routing_vector)
    torch.testing.assert_close(spread.head_gates, slow.head_gates)


@pytest.mark.parametrize("what", SPREADS)
def test_the_magnitude_of_every_layer_and_query_is_kept(what, llama):
    routing = tiny.routing(llama.model, 4)
    spread = routing.spread(what)
    for name in ("routing_vector", "head_gates"):
        before = getattr(routing, name).abs().sum(-1)
        torch.testing.assert_close(getattr(spread, name).abs().sum(-1), before)
    untouched = "head_gates" if what == "alpha" else "routing_vector"
    assert torch.equal(getattr(spread, untouched), getattr(routing, untouched))


@pytest.mark.parametrize("what", SPREADS)
def test_what_is_spread_already_stays(what, llama):
    once = tiny.routing(llama.model, 4).spread(what)
    twice = once.spread(what)
    torch.testing.assert_close(twice.routing_vector, once.routing_vector)
    torch.testing.assert_close(twice.head_gates, once.head_gates)


@pytest.mark.parametrize("what", SPREADS)
def test_a_spread_router_equals_the_dense_reference(what, bench):
    model = bench.model
    inputs = bench.inputs(0, 1, 2)
    real = inputs["attention_mask"].bool()
    with bench.icr.attached(model, bench.tokenizer, spread=what):
        logits = model(**inputs).logits
        tokens = bench.tokens(model, inputs)
    with bench.attached():
        as_it_is = model(**inputs).logits
    spread = slowly_spread(bench.routing, what)
    dense = bench.fresh("eager")
    with reference_routed(dense, bench.icr.pids, spread):
        expected = dense(**inputs, use_cache=False).logits
        expected_tokens = bench.tokens(dense, inputs, use_cache=False)
    assert (logits - expected)[real].abs().max() <= CLOSE
    assert torch.equal(tokens, expected_tokens)
    assert (logits - as_it_is)[real].abs().max() > 0.01, "spreading must matter"


def test_a_strength_keeps_its_sign(llama):
    """Alpha's own signs are lost: those of a negative strength are not."""
    with llama.icr.attached(llama.model, llama.tokenizer, spread="alpha") as routed:
        plus = routed.routing(llama.texts)
    with llama.icr.attached(llama.model, llama.tokenizer, spread="alpha", strength=-2.0) as routed:
        minus = routed.routing(llama.texts)
    assert (plus.routing_vector > 0).all()
    torch.testing.assert_close(minus.routing_vector, -2 * plus.routing_vector)


def test_what_gives_the_scores_is_said(llama):
    """A prior of a spread router is not the router's."""
    with llama.icr.attached(llama.model, llama.tokenizer, spread="gates") as routed:
        assert "gates spread evenly" in repr(routed)
        assert routed.made_of.endswith("with no gate, gates spread evenly")
    with llama.attached() as routed:
        assert "spread" not in repr(routed) + routed.made_of


def test_a_spread_of_nothing_known_is_refused():
    check_spread(None)
    with pytest.raises(ValueError, match="spread must be 'alpha', 'gates' or None, got 'heads'"):
        check_spread("heads")


@pytest.mark.parametrize("what", SPREADS)
def test_a_method_spreads_a_router_that_was_fitted_before(what, llama, tmp_path):
    llama.icr.save_pretrained(tmp_path)
    (method,) = make([f"icr-spread-{what}"], Settings(router=str(tmp_path)))
    task = tiny.task()
    method.fit(llama.model, llama.tokenizer, [task], np.random.default_rng(0))
    options = task.spec.options
    with method.applied(task) as routed:
        scores = routed.score(llama.texts, options)
    with llama.icr.attached(llama.model, llama.tokenizer, spread=what) as routed:
        expected = routed.score(llama.texts, options)
    with llama.attached() as routed:
        as_it_is = routed.score(llama.texts, options)
    assert torch.equal(scores, expected)
    assert not torch.allclose(scores, as_it_is)
