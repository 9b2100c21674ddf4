"""Models of images and text: text alone is routed, as by the decoder inside them.

Such a model embeds its tokens itself, and hands its decoder embeddings. The oracle is the same
decoder under a vocabulary head, without the images' part.
"""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from icrouting.config import HIDDEN, FitConfig
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import stack_of
from icrouting.icr import InContextRouter
from plain_and_routed import CLOSE, MATTERS, state_of

OPTIONS = ("negative", "positive")
NEW = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
TEXTS = ["Review: joy and joy\nSentiment:", "Review: dull\nSentiment:", "Review: a\nSentiment:"]


def text_part(model):
    """The decoder of a model of images and text, under its head, as a model of text."""
    text_only = AutoModelForCausalLM.from_config(stack_of(model).config)
    text_only.model.load_state_dict(stack_of(model).state_dict())
    text_only.lm_head.load_state_dict(model.lm_head.state_dict())
    text_only.generation_config.pad_token_id = 1
    return text_only.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return tiny.vision_model()


@pytest.fixture(scope="module")
def icr(model):
    config = FitConfig(
        (3, 4),
        rank=3,
        n_prompts=8,
        n_queries=16,
        epochs=1,
        min_steps=0,
        patience=0,
        encoder=HIDDEN,
        hidden_width=5,
    )
    fitted = InContextRouter.fit(model, tiny.tokenizer(), [tiny.task()], config)
    # A router of a few steps does next to nothing.
    torch.nn.init.normal_(fitted.router.alpha[-1].weight, std=3)
    return fitted


@pytest.fixture(scope="module")
def same_for_text(icr, model):
    """The router for the text part: only the model that it names is another."""
    text_only = text_part(model)
    fingerprint = Decoder.of(text_only, tiny.tokenizer()).fingerprint
    description = dataclasses.replace(icr.description, fingerprint=fingerprint)
    return InContextRouter(description, icr.pids, icr.router), text_only


def inputs_of(texts, side="left"):
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = side
    return dict(tokenizer(texts, return_tensors="pt", padding=True))


def test_its_context_is_its_text_s(model):
    assert Decoder.of(model, tiny.tokenizer()).context_length == 512


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use", ["score", "call", "generate"])
@pytest.mark.slow
def test_text_is_routed_as_by_the_text_part(use, side, icr, model, same_for_text):
    inputs = inputs_of(TEXTS, side)
    is_real = inputs["attention_mask"].bool()

    def use_of(icr, model, strength):
        with icr.attached(model, tiny.tokenizer(), strength=strength) as routed, torch.no_grad():
            if use == "score":
                return routed.score(TEXTS, OPTIONS)
            if use == "call":
                return model(**inputs).logits[is_real]
            return model.generate(
                **inputs, **NEW, output_logits=True, return_dict_in_generate=True
            ).logits[-1]

    routed = use_of(icr, model, 1.0)
    assert (routed - use_of(*same_for_text, 1.0)).abs().max() <= CLOSE
    assert (routed - use_of(icr, model, 0.0)).abs().max() > MATTERS


def test_the_model_without_its_head_is_routed_too(icr, model):
    inputs = inputs_of(TEXTS)
    with icr.attached(model, tiny.tokenizer()):
        hidden = model.model(**inputs).last_hidden_state
        logits = model(**inputs).logits
    assert (model.lm_head(hidden) - logits).abs().max() <= CLOSE


def test_images_are_refused_in_a_sentence(icr, model):
    inputs = inputs_of(["Review:"])
    inputs["pixel_values"] = torch.zeros(1, 3, 16, 16)
    inputs["input_ids"][0, 0] = 300
    with (
        icr.attached(model, tiny.tokenizer()),
        pytest.raises(ValueError, match="reads text alone: call it without `pixel_values`"),
    ):
        model(**inputs)


def test_embeddings_alone_are_refused(icr, model):
    embeddings = model.get_input_embeddings()(inputs_of(["Review:"])["input_ids"])
    with (
        icr.attached(model, tiny.tokenizer()),
        pytest.raises(ValueError, match="needs `input_ids`"),
    ):
        model(inputs_embeds=embeddings)


def test_each_part_gets_its_own_attention_implementation_back(icr, model):
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    before = [state_of(part) for part in (model, stack_of(model), model.model.vision_tower)]
    with icr.attached(model, tiny.tokenizer()) as routed:
        routed.score(TEXTS, OPTIONS)
    after = [state_of(part) for part in (model, stack_of(model), model.model.vision_tower)]
    assert after == before
    model.set_attn_implementation("sdpa")
