"""Generation under methods that edit prompts' last tokens.

It is held beside plain calls, token by token, of the same model.
"""

import types
from contextlib import nullcontext

import pytest
import torch
from transformers import StoppingCriteria

import tiny
from fitted import fit_method
from icrouting.decoder.batches import attended
from icrouting.decoder.families import CACHE
from icrouting.decoder.hold import hooked, replaced
from icrouting.decoder.scoring import option_ids
from icrouting.methods import Settings
from icrouting.methods.elicit import Elicit
from icrouting.methods.function_vectors import FunctionVectors
from icrouting.methods.iterative_vectors import IterativeVectors
from icrouting.methods.task_vectors import TaskVectors

TASK = tiny.task("toy", n_test=30)
NEW = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
KINDS = pytest.mark.parametrize("kind", [TaskVectors, FunctionVectors, Elicit, IterativeVectors])


def fitted(kind, model, tokenizer, encoder_folder):
    settings = Settings(demos_per_class=2, tries=1, train_rows=8, encoder=str(encoder_folder))
    method = kind(settings)
    return fit_method(method, model, tokenizer, [TASK])


def ids_of(tokenizer, text):
    return tokenizer(text, return_tensors="pt").input_ids


def slowly(model, ids, cache=None, n=5):
    """Greedy tokens by plain calls: the prompt, then one token at a time."""
    tokens = []
    for _ in range(n):
        output = model(input_ids=ids, use_cache=True, **{CACHE: cache})
        cache, ids = output[CACHE], output.logits[:, -1:].argmax(-1)
        tokens.append(ids)
    return torch.cat(tokens, 1)


def stepped(model, ids):
    """The logits of one token behind a prompt's cache."""
    cache = model(input_ids=ids, use_cache=True)[CACHE]
    return model(input_ids=torch.tensor([[7]]), use_cache=True, **{CACHE: cache}).logits


@KINDS
@pytest.mark.parametrize("text", ["Review: good\nSentiment:", " bad"])
@pytest.mark.slow
def test_a_prompt_behind_a_cache_may_be_given_without_what_is_in_it(
    kind, text, tokenizer, encoder_folder
):
    model, before, new = (
        tiny.model("llama"),
        ids_of(tokenizer, "Review: a long and bad one"),
        ids_of(tokenizer, text),
    )
    method, found = fitted(kind, model, tokenizer, encoder_folder), []
    with torch.no_grad():
        for give in ("slowly", "new ids", "all ids"):
            cache, n = model(before, use_cache=True)[CACHE], before.shape[1] + new.shape[1]
            with method.attached(model, tokenizer, TASK):
                if give == "slowly":
                    found.append(slowly(model, new, cache))
                    continue
                ids, mask = (
                    new if give == "new ids" else torch.cat([before, new], 1),
                    torch.ones(1, n).long(),
                )
                output = model.generate(ids, attention_mask=mask, **NEW, **{CACHE: cache})
                found.append(output[:, ids.shape[1] :])
    if new.shape[1] > 1:  # in a plain call one token behind a cache counts as generated
        assert torch.equal(found[0], found[1])
    if kind is not Elicit:  # it retrieves by what it is given
        assert torch.equal(found[1], found[2])


@KINDS
@pytest.mark.slow
def test_other_prompts_that_run_meanwhile_are_read_as_themselves(kind, tokenizer, encoder_folder):
    model = tiny.model("llama")
    prompt, other = (
        ids_of(tokenizer, text) for text in ("Review: good good good\nSentiment:", "bad")
    )

    class Asks(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen.append((model(other).logits, model.generate(other, **NEW), stepped(model, other)))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    seen = []
    with (
        torch.no_grad(),
        fitted(kind, model, tokenizer, encoder_folder).attached(model, tokenizer, TASK),
    ):
        expected = model(other).logits, model.generate(other, **NEW), stepped(model, other)
        alone = model.generate(prompt, **NEW)
        assert torch.equal(model.generate(prompt, **NEW, stopping_criteria=[Asks()]), alone)
        assert torch.equal(slowly(model, prompt), alone[:, prompt.shape[1] :])
    assert len(seen) == 5
    for found in seen:
        assert all(torch.equal(one, same) for one, same in zip(found, expected, strict=True))


@KINDS
@pytest.mark.slow
def test_guidance_reads_its_other_prompt_as_one(kind, tokenizer, encoder_folder):
    model = tiny.model("llama")
    prompt, other = (ids_of(tokenizer, text) for text in ("Review: good\nSentiment:", "bad , bad"))
    with (
        torch.no_grad(),
        fitted(kind, model, tokenizer, encoder_folder).attached(model, tokenizer, TASK),
    ):
        found = model.generate(prompt, negative_prompt_ids=other, guidance_scale=2.0, **NEW)[
            :, prompt.shape[1] :
        ]
        outputs = [model(input_ids=ids, use_cache=True) for ids in (prompt, other)]
        for step in range(5):
            wanted, unwanted = (output.logits[:, -1].log_softmax(-1) for output in outputs)
            token = (2.0 * (wanted - unwanted) + unwanted).argmax(-1)[:, None]
            assert token.item() == found[0, step].item()
            outputs = [
                model(input_ids=token, use_cache=True, **{CACHE: output[CACHE]})
                for output in outputs
            ]


@pytest.mark.parametrize("family", ["mistral", "gemma3", "llama"])
@pytest.mark.parametrize("more", [{}, {"prefill_chunk_size": 4}], ids=str)
@pytest.mark.slow
def test_a_static_cache_is_edited_beyond_a_window_too(family, more, tokenizer, encoder_folder):
    model, prompt = (
        tiny.model(family),
        ids_of(tokenizer, "Review: a long and bad one , and good , and bad\nSentiment:"),
    )
    for kind in (FunctionVectors, TaskVectors):
        with (
            torch.no_grad(),
            fitted(kind, model, tokenizer, encoder_folder).attached(model, tokenizer, TASK),
        ):
            expected = model.generate(prompt, **NEW)
            assert torch.equal(
                model.generate(prompt, **NEW, cache_implementation="static", **more), expected
            )


def test_a_mask_of_a_window_s_width_hides_no_token_of_the_pass():
    assert attended(torch.zeros(2, 1), torch.ones(2, 1, 1, 7, dtype=torch.bool), n_seen=19).all()
    assert attended(
        torch.zeros(2, 1), torch.ones(2, 1, 1, 20, dtype=torch.bool), n_seen=19
    ).shape == (2, 1)


@pytest.mark.slow
def test_a_model_gets_back_what_stood_in_place_of_its_methods(tokenizer, encoder_folder):
    model = tiny.model("llama")
    own = model.generate = types.MethodType(lambda self, *args, **kwargs: "own", model)
    with fitted(TaskVectors, model, tokenizer, encoder_folder).attached(model, tokenizer, TASK):
        assert model.generate(torch.tensor([[5]])) == "own"
    assert vars(model)["generate"] is own
    inner = hooked(model, "icr", nullcontext())
    with hooked(model, "icr-gated", inner), replaced(model, generate=len):
        pass
    assert vars(model)["generate"] is own
    assert "init_continuous_batching" not in vars(model)
    with pytest.raises(RuntimeError), replaced(model, generate=len), nullcontext():
        raise RuntimeError
    assert vars(model)["generate"] is own


def test_continuous_batching_is_refused_under_a_rival(tokenizer, encoder_folder):
    model = tiny.model("llama")
    method = fitted(TaskVectors, model, tokenizer, encoder_folder)
    with (
        method.attached(model, tokenizer, TASK),
        pytest.raises(ValueError, match="cannot batch continuously"),
    ):
        model.init_continuous_batching()


def test_an_option_of_several_tokens_is_named_once(tokenizer, caplog):
    option = next(
        word for word in ("good , good", "good and") if len(tokenizer(f" {word}").input_ids) > 2
    )
    for _ in range(2):
        option_ids(tokenizer, "Review: good\nSentiment:", [option, "bad"])
    assert (
        sum(
            f"option {option!r} is several tokens" in record.getMessage()
            for record in caplog.records
        )
        == 1
    )
