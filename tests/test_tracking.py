"""What a tracker says of the forwards of plain calls and of `generate`."""

import gc
import weakref

import pytest
import torch
from transformers import DynamicCache, StoppingCriteria

import tiny
from bench import Bench
from icrouting.config import HIDDEN
from icrouting.decoder.families import CACHE
from icrouting.decoder.tracking import tracked

PROMPT = torch.tensor([[5, 9, 17, 3, 8]])
OTHER = torch.tensor([[7, 6]])
NEW = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


@pytest.fixture
def model():
    return tiny.model("llama")


def calls_of(model, run):
    """What the tracker says of the forwards that `run` makes."""
    calls = []

    def note(call, run):
        # Both are found out when first asked for, which is to be before the forward runs.
        _ = call.n_seen, call.generation
        calls.append(call)
        return run()

    with torch.no_grad(), tracked(model, model, note):
        run()
    return calls


def shape_of(call):
    return call.n_seen, call.q_len, call.n_prompt


def test_in_a_plain_call_all_tokens_are_a_prompt_but_for_a_single_one_behind_a_cache(model):
    cache = DynamicCache(config=model.config)

    def run():
        for ids in PROMPT.split([3, 2], 1):
            model(input_ids=ids, **{CACHE: cache})
        model(input_ids=PROMPT[:, :1], **{CACHE: cache})

    calls = calls_of(model, run)
    assert [shape_of(call) for call in calls] == [(0, 3, 3), (3, 2, 5), (5, 1, 5)]
    assert all(call.generation is call.outermost is None for call in calls)


@pytest.mark.parametrize("cut", [{}, {"prefill_chunk_size": 2}], ids=str)
def test_in_generate_the_prompt_is_what_that_is_given_however_it_is_cut(cut, model):
    calls = calls_of(model, lambda: model.generate(PROMPT, **NEW, **cut))
    assert len(calls) == (5 if cut else 3)
    for call in calls:
        assert call.n_prompt == 5
        assert call.prompts().token_lists() == PROMPT.tolist()


def test_another_prompt_that_runs_meanwhile_is_told_apart_from_the_outermost(model):
    class Asks(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            model(input_ids=OTHER)
            model.generate(OTHER, **NEW | {"max_new_tokens": 1, "min_new_tokens": 1})
            return torch.zeros(len(input_ids), dtype=torch.bool)

    calls = calls_of(model, lambda: model.generate(PROMPT, **NEW, stopping_criteria=[Asks()]))
    own, plain, nested = calls[:3]
    assert own.generation is own.outermost
    assert plain.generation is None
    assert nested.generation is not own.generation
    for call in (own, plain, nested):
        assert call.outermost is own.outermost
    for call in (plain, nested):
        assert call.prompts().token_lists() == OTHER.tolist()


def test_a_call_reads_its_mask_alike_before_and_after_its_cache_is_filled(model):
    n_tokens = PROMPT.shape[1]
    mask = torch.ones(1, 1, n_tokens, n_tokens, dtype=torch.bool).tril()
    mask[..., :2] = False
    cache = DynamicCache(config=model.config)
    run = {"input_ids": PROMPT, "attention_mask": mask, CACHE: cache}
    (call,) = calls_of(model, lambda: model(**run))
    assert cache.get_seq_length() == n_tokens
    assert call.prompts().token_lists() == PROMPT[:, 2:].tolist()


@pytest.mark.slow
def test_a_routed_model_keeps_no_cache_alive_once_generate_is_left():
    bench = Bench(HIDDEN)
    with bench.attached():
        cache = DynamicCache(config=bench.model.config)
        bench.tokens(bench.model, bench.inputs(0), **{CACHE: cache})
        filled = weakref.ref(cache)
        del cache
        gc.collect()
        assert filled() is None


@pytest.mark.slow
def test_a_generate_that_fails_keeps_no_cache_alive():
    bench = Bench(HIDDEN)
    cache = DynamicCache(config=bench.model.config)
    filled = weakref.ref(cache)

    def fail(*_):
        raise RuntimeError("in the first layer")

    with bench.attached():
        # Below the first routed layer, so that the routing of this forward is still pending.
        with (
            bench.model.model.layers[0].register_forward_hook(fail),
            pytest.raises(RuntimeError, match="in the first layer"),
        ):
            bench.tokens(bench.model, bench.inputs(0), **{CACHE: cache})
        del cache
        gc.collect()
        assert filled() is None
