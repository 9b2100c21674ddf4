"""Several routers on one model: each row of a batch is its lone run."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

import tiny
from fitted import small_fit
from icrouting import InContextRouter, score_options
from icrouting.decoder.families import CACHE
from icrouting.several import attach, left_padded

TASK = tiny.task("toy")
PROMPTS = [
    "Review: good good bad plot\nSentiment:",
    "Review: bad\nSentiment:",
    "Review: a moving scene of the boring film\nSentiment:",
    "ball goal",
]
OPTIONS = ["negative", "positive"]
NAMES = ("base", "tickets", "reviews")


@pytest.fixture(scope="module")
def model():
    return tiny.model("llama")


@pytest.fixture(scope="module")
def routers(model, tokenizer):
    # Other ranks, layers, strengths of training: nothing fits by chance.
    big = small_fit(lr=0.05, epochs=6)
    small = small_fit(lr=0.05, epochs=6, rank=2, layers=(3,), seed=3)
    return {
        "tickets": InContextRouter.fit(model, tokenizer, [TASK], big, gate=False),
        "reviews": InContextRouter.fit(model, tokenizer, [tiny.task("other")], small, gate=False),
    }


@pytest.fixture(scope="module")
def lone_logits(model, tokenizer, routers):
    """Each prompt's logits by each name, alone."""
    logits = {}
    for name in NAMES:
        for place, prompt in enumerate(PROMPTS):
            inputs = tokenizer(prompt, return_tensors="pt")
            with torch.no_grad():
                if name == "base":
                    logits[name, place] = model(**inputs).logits[0, -1]
                    continue
                with routers[name].attached(model, tokenizer):
                    logits[name, place] = model(**inputs).logits[0, -1]
    return logits


def batch_of(tokenizer, places, side="left"):
    token_lists = [tokenizer(PROMPTS[place]).input_ids for place in places]
    if side == "left":
        return left_padded(token_lists, tokenizer.pad_token_id, torch.device("cpu"))
    longest = max(map(len, token_lists))
    ids = torch.full((len(places), longest), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(token_lists):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return ids, mask


@given(
    rows=st.lists(
        st.tuples(st.sampled_from(NAMES), st.integers(0, len(PROMPTS) - 1)), min_size=1, max_size=6
    ),
    side=st.sampled_from(["left", "right"]),
    cache=st.sampled_from([None, "dynamic", "static"]),
    cut=st.integers(0, 3),
)
@examples(max_examples=40, deadline=None)
@pytest.mark.slow
def test_every_row_of_a_batch_is_its_lone_run(
    rows, side, cache, cut, model, tokenizer, routers, lone_logits
):
    ids, mask = batch_of(tokenizer, [place for _, place in rows], side)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    kinds = {"dynamic": DynamicCache, "static": lambda: StaticCache(model.config, max_cache_len=64)}
    how = {"position_ids": positions}
    if cache is not None:
        how[CACHE] = kinds[cache]()
    names = [name for name, _ in rows]
    with attach(routers, model, tokenizer) as several, several.rows(names), torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, **how).logits
    for row, (name, place) in enumerate(rows):
        last = int(mask[row].nonzero().max())
        assert torch.allclose(logits[row, last], lone_logits[name, place], atol=1e-4)


def test_the_routers_differ_from_one_another_and_from_the_base(lone_logits):
    for place in range(len(PROMPTS)):
        by_name = [lone_logits[name, place] for name in NAMES]
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert (by_name[one] - by_name[other]).abs().max() > 0.01


def generated_alone(name, prompt, model, tokenizer, routers, **how):
    ids = tokenizer(prompt, return_tensors="pt")
    n_prompt = ids["input_ids"].shape[1]
    if name == "base":
        tokens = model.generate(**ids, **how)
    else:
        with routers[name].attached(model, tokenizer):
            tokens = model.generate(**ids, **how)
    return tokenizer.decode(tokens[0, n_prompt:], skip_special_tokens=True)


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_a_batch_generates_what_each_row_generates_alone(how, model, tokenizer, routers):
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **how}
    names = ["reviews", "base", "tickets", "tickets"]
    with attach(routers, model, tokenizer) as several:
        texts = several.generate(PROMPTS, names, **how)
    for name, prompt, text in zip(names, PROMPTS, texts, strict=True):
        assert text == generated_alone(name, prompt, model, tokenizer, routers, **how)


def test_scores_are_those_of_each_router_attached_alone(model, tokenizer, routers):
    names = ["reviews", "base", "tickets", "base"]
    with attach(routers, model, tokenizer) as several:
        scores = several.score(PROMPTS, OPTIONS, names)
        whole = several.score(PROMPTS, OPTIONS, names, label_scoring="sum")
    for label_scoring, batch in (("first", scores), ("sum", whole)):
        for name, prompt, row in zip(names, PROMPTS, batch, strict=True):
            if name == "base":
                how = {"label_scoring": label_scoring}
                expected = score_options(model, tokenizer, [prompt], OPTIONS, **how)
            else:
                with routers[name].attached(model, tokenizer) as routed:
                    expected = routed.score([prompt], OPTIONS, label_scoring=label_scoring)
            assert torch.allclose(row, expected[0], atol=1e-4)


def test_a_batch_of_the_base_alone_is_the_model_to_the_bit(model, tokenizer, routers):
    plain = score_options(model, tokenizer, PROMPTS, OPTIONS)
    with attach(routers, model, tokenizer) as several:
        assert torch.equal(several.score(PROMPTS, OPTIONS, ["base"] * len(PROMPTS)), plain)


def test_predictions_are_those_of_the_router_alone(model, tokenizer, routers):
    rows = [dict(example.fields) for example in TASK.test[:3]]
    with routers["tickets"].attached(model, tokenizer) as routed:
        expected = routed.predict(rows)
    with attach(routers, model, tokenizer) as several:
        predictions = several.predict(rows, "tickets")
    assert [each.label for each in predictions] == [each.label for each in expected]
    assert [each.status for each in predictions] == [each.status for each in expected]


def test_what_a_gate_does_not_know_is_the_base_models(model, tokenizer, routers):
    task = tiny.task("toy", n_train=90)
    config = small_fit(lr=0.05, epochs=3, n_queries=60)
    gated = InContextRouter.fit(model, tokenizer, [task], config)
    knows_none = replace(gated.gate, numbers=replace(gated.gate.numbers, limits=(1e-9,)))
    strict = replace(gated, gate=knows_none)
    with attach({"strict": strict, **routers}, model, tokenizer) as several:
        scores = several.score(PROMPTS, OPTIONS, ["strict", "tickets", "strict", "base"])
        rows = [dict(example.fields) for example in TASK.test[:3]]
        assert {each.status for each in several.predict(rows, "strict")} == {"left alone"}
        # In one batch with rows that are routed, its own are the base model's too.
        ids, mask = batch_of(tokenizer, [0, 0, 0])
        with several.rows(["strict", "base", "tickets"]), torch.no_grad():
            strict_row, base_row, tickets_row = model(input_ids=ids, attention_mask=mask).logits
    plain = score_options(model, tokenizer, PROMPTS, OPTIONS)
    assert torch.allclose(scores[[0, 2, 3]], plain[[0, 2, 3]], atol=1e-6)
    assert torch.allclose(strict_row, base_row, atol=1e-5)
    assert not torch.allclose(tickets_row[-1], base_row[-1], atol=1e-2)


def test_a_strength_is_one_routers_own(model, tokenizer, routers):
    with routers["reviews"].attached(model, tokenizer, strength=0.5) as routed:
        half = routed.score(PROMPTS[:1], OPTIONS)
    with routers["tickets"].attached(model, tokenizer) as routed:
        whole = routed.score(PROMPTS[:1], OPTIONS)
    with attach(routers, model, tokenizer, strengths={"reviews": 0.5}) as several:
        scores = several.score([PROMPTS[0]] * 2, OPTIONS, ["reviews", "tickets"])
    assert torch.allclose(scores, torch.cat([half, whole]), atol=1e-4)


def test_a_cache_keeps_its_rows_routing_behind_the_block(model, tokenizer, routers, lone_logits):
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    with attach(routers, model, tokenizer) as several, torch.no_grad():
        with several.rows(["reviews"]):
            cache = model(input_ids=ids[:, :-1], **{CACHE: DynamicCache()})[CACHE]
        # Routed by its beginning, whatever other rows are named meanwhile.
        with several.rows(["tickets"]):
            model(input_ids=ids)
            step = model(input_ids=ids[:, -1:], **{CACHE: cache}).logits[0, -1]
    with routers["reviews"].attached(model, tokenizer), torch.no_grad():
        cache = model(input_ids=ids[:, :-1], **{CACHE: DynamicCache()})[CACHE]
        expected = model(input_ids=ids[:, -1:], **{CACHE: cache}).logits[0, -1]
    assert torch.allclose(step, expected, atol=1e-4)


def test_leaving_restores_the_model_after_an_exception_too(model, tokenizer, routers):
    plain = score_options(model, tokenizer, PROMPTS, OPTIONS)
    with (
        pytest.raises(RuntimeError, match="thrown"),
        attach(routers, model, tokenizer) as several,
        several.rows(["base"]),
    ):
        raise RuntimeError("thrown inside")
    assert torch.equal(score_options(model, tokenizer, PROMPTS, OPTIONS), plain)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_threads_that_name_other_rows_get_their_own_answers(model, tokenizer, routers):
    expected = {}
    with attach(routers, model, tokenizer) as several:
        for name in NAMES:
            expected[name] = several.score(PROMPTS, OPTIONS, [name] * len(PROMPTS))
        wrong = []

        def ask(seed):
            rng = np.random.default_rng(seed)
            for _ in range(6):
                names = rng.choice(NAMES, size=len(PROMPTS)).tolist()
                scores = several.score(PROMPTS, OPTIONS, names)
                for row, name in enumerate(names):
                    if not torch.allclose(scores[row], expected[name][row], atol=1e-4):
                        wrong.append((seed, name))

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["tickets"], "4 prompts have 1 names: give one a prompt"),
        (["tickets", "ticket", "base", "base"], "did you mean tickets"),
    ],
)
def test_wrong_names_are_refused(names, why, model, tokenizer, routers):
    with attach(routers, model, tokenizer) as several, pytest.raises(ValueError, match=why):
        several.score(PROMPTS, OPTIONS, names)


def test_a_call_that_names_no_rows_is_refused(model, tokenizer, routers):
    ids, mask = batch_of(tokenizer, [0, 1])
    with attach(routers, model, tokenizer) as several:
        with pytest.raises(ValueError, match="nothing says whose these rows are"):
            model(input_ids=ids, attention_mask=mask)
        refused = pytest.raises(ValueError, match="`rows` named 3 rows, and the call has 2")
        with several.rows(["base", "tickets", "reviews"]), refused:
            model(input_ids=ids, attention_mask=mask)


def refused(routers, model, tokenizer, why):
    with pytest.raises(ValueError, match=why), attach(routers, model, tokenizer):
        pass


def test_routers_that_cannot_share_a_batch_are_refused(model, tokenizer, routers):
    refused({}, model, tokenizer, "one router or more")
    refused({"base": routers["tickets"]}, model, tokenizer, "other than 'base'")
    early = InContextRouter.fit(model, tokenizer, [TASK], small_fit(layers=(1, 2)), gate=False)
    refused({**routers, "early": early}, model, tokenizer, "begin at different layers")
    last = InContextRouter.fit(model, tokenizer, [TASK], small_fit(bias_rows="last"), gate=False)
    refused({**routers, "last": last}, model, tokenizer, "bias rows differ")
    other = tiny.model("llama", seed=1)
    foreign = InContextRouter.fit(other, tokenizer, [TASK], small_fit(), gate=False)
    refused({**routers, "foreign": foreign}, model, tokenizer, "load the base model")


def test_whitened_directions_are_used_as_they_are_alone(model, tokenizer, routers):
    config = small_fit(lr=0.05, epochs=3, basis="whitened")
    whitened = InContextRouter.fit(model, tokenizer, [TASK], config, gate=False)
    with whitened.attached(model, tokenizer) as routed:
        expected = routed.score(PROMPTS, OPTIONS)
    with attach({"w": whitened, **routers}, model, tokenizer) as several:
        scores = several.score(PROMPTS, OPTIONS, ["w"] * len(PROMPTS))
    assert torch.allclose(scores, expected, atol=1e-4)


def test_a_router_by_a_sentence_encoder_shares_a_batch_with_one_by_states(
    model, tokenizer, routers, encoder_folder
):
    config = replace(small_fit(lr=0.05, epochs=3), encoder=str(encoder_folder))
    by_text = InContextRouter.fit(model, tokenizer, [TASK], config, gate=False)
    with by_text.attached(model, tokenizer) as routed:
        expected = routed.score(PROMPTS, OPTIONS)
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with attach({"text": by_text, **routers}, model, tokenizer) as several:
        assert torch.allclose(
            several.score(PROMPTS, OPTIONS, ["text"] * len(PROMPTS)), expected, atol=1e-4
        )
        texts = several.generate(PROMPTS, ["text", "reviews", "base", "text"], **how)
    all_routers = {"text": by_text, **routers}
    for name, prompt, text in zip(["text", "reviews", "base", "text"], PROMPTS, texts, strict=True):
        assert text == generated_alone(name, prompt, model, tokenizer, all_routers, **how)
