import copy

import pytest
import torch

import tiny
from icrouting.config import FitConfig
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.identity import base_weights, difference, fingerprint, read_weight
from icrouting.icr import InContextRouter

HALVES = (torch.float16, torch.bfloat16)
# Every way from float32 to a dtype, also with a stop at another.
ROUNDINGS = [(), *[(half,) for half in HALVES], HALVES, HALVES[::-1]]


def rounded(model, dtypes):
    """A copy in the last dtype, which has gone through all of them."""
    model = copy.deepcopy(model)
    for dtype in dtypes:
        model.to(dtype)
    return model


@pytest.fixture(scope="module")
def model():
    return tiny.model("llama")


def names(dtypes):
    return "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes) or "as it was"


EVERY_ROUNDING = pytest.mark.parametrize("here", ROUNDINGS, ids=names)


@EVERY_ROUNDING
@pytest.mark.parametrize("fitted_in", ROUNDINGS, ids=names)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_model_is_the_same_however_it_was_rounded(family, fitted_in, here):
    model = tiny.model(family)
    kept = base_weights(rounded(model, fitted_in))
    assert difference(rounded(model, here), kept) is None
    # Widened again, it stays as coarse.
    assert difference(rounded(model, (*here, torch.float32)), kept) is None


@EVERY_ROUNDING
@pytest.mark.parametrize("share", [1e-2, 1e-3])
def test_a_model_that_was_trained_further_is_another(model, share, here):
    """By a hundredth or a thousandth of its weights' size, in one kind of weight."""
    tuned = copy.deepcopy(model)
    torch.manual_seed(0)
    for layer in tuned.model.layers:
        weight = layer.mlp.up_proj.weight.data
        weight += share * weight.std() * torch.randn_like(weight)
    reason = difference(rounded(tuned, here), base_weights(model))
    assert reason is not None
    assert "of its 48 weights hold other numbers, model.layers.0.mlp.up_proj.weight" in reason


def test_a_model_with_a_step_of_training_in_float32_is_another(model):
    tuned = copy.deepcopy(model)
    tuned.model.layers[2].mlp.up_proj.weight.data += 1e-6
    assert "1 of its 48 weights" in str(difference(tuned, base_weights(model)))


@pytest.mark.parametrize("seed", [1, 2])
def test_a_model_of_other_numbers_is_another(model, seed):
    reason = difference(tiny.model("llama", seed=seed), base_weights(model))
    assert "48 of its 48 weights hold other numbers" in str(reason)


def test_a_model_of_other_sizes_is_another_and_the_weight_is_named(model):
    reason = difference(tiny.model("qwen2"), base_weights(model))
    assert reason == "it has model.layers.0.self_attn.k_proj.bias beside"
    wider = copy.deepcopy(model)
    wider.model.layers[1].mlp.up_proj.weight.data = torch.ones(53, 42)
    reason = difference(wider, base_weights(model))
    assert reason == "its model.layers.1.mlp.up_proj.weight is of shape (53, 42), not (52, 42)"


@pytest.mark.parametrize("n_tokens", [tiny.VOCAB + 1, tiny.VOCAB + 64, tiny.VOCAB - 3])
@pytest.mark.parametrize("family", ["llama", "phi", "opt"])
def test_rows_at_the_end_of_the_vocabulary_make_no_other_model(family, n_tokens):
    model = tiny.model(family)
    resized = copy.deepcopy(model)
    resized.resize_token_embeddings(n_tokens, mean_resizing=False)
    assert fingerprint(resized) != fingerprint(model)
    assert difference(resized, base_weights(model)) is None
    assert difference(rounded(resized, HALVES), base_weights(model)) is None


def test_other_embeddings_are_another_model_whatever_their_number(model):
    resized = copy.deepcopy(model)
    resized.resize_token_embeddings(tiny.VOCAB + 1, mean_resizing=False)
    resized.model.embed_tokens.weight.data.mul_(1.01)
    reason = difference(resized, base_weights(model))
    assert "1 of its 48 weights hold other numbers, model.embed_tokens.weight" in str(reason)


def test_a_head_that_was_untied_makes_no_other_model():
    config = type(tiny.CONFIGS["llama"])(**tiny.SIZES, tie_word_embeddings=True)
    tied = tiny.sharp(config)
    untied = tiny.model("llama")
    untied.load_state_dict(tied.state_dict())
    assert difference(untied, base_weights(tied)) is None
    assert difference(tied, base_weights(untied)) is None
    untied.lm_head.weight.data += 1
    assert "lm_head.weight" in str(difference(untied, base_weights(tied)))
    assert "lm_head.weight" in str(difference(tied, base_weights(untied)))


@pytest.mark.parametrize("text", ["", "3", "x", "2x3 ?", "2x3 AAA", "-2 AAAA", "2 " + "AAAA" * 99])
def test_what_describes_no_weight_is_refused(text):
    with pytest.raises(ValueError, match="expected shape and numbers of a weight"):
        read_weight(text)


@pytest.fixture(scope="module")
def fitted(model, tokenizer):
    config = FitConfig(
        rank=3, n_prompts=8, n_queries=8, epochs=1, min_steps=0, patience=0, encoder="hidden"
    )
    return InContextRouter.fit(model, tokenizer, [tiny.task()], config)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: rounded(model, (torch.bfloat16, torch.float16)),
        lambda model: rounded(model, (torch.float16, torch.bfloat16)),
        lambda model: rounded(model, (torch.float16,)),
    ],
)
def test_a_router_is_attached_to_its_model_in_another_dtype(fitted, model, tokenizer, change):
    with fitted.attached(change(model), tokenizer) as routed:
        scores = routed.score(["a dull film:"], ["good", "bad"])
    with fitted.attached(model, tokenizer) as routed:
        expected = routed.score(["a dull film:"], ["good", "bad"])
    assert (scores - expected).abs().max() < 0.2


def test_a_router_is_attached_to_its_model_with_one_more_token(fitted, model, tokenizer, tmp_path):
    fitted.save_pretrained(tmp_path)
    resized = copy.deepcopy(model)
    resized.resize_token_embeddings(tiny.VOCAB + 1, mean_resizing=False)
    loaded = InContextRouter.from_pretrained(tmp_path)
    with loaded.attached(resized, tokenizer) as routed:
        scores = routed.score(["a dull film:"], ["good", "bad"])
    with fitted.attached(model, tokenizer) as routed:
        expected = routed.score(["a dull film:"], ["good", "bad"])
    # Products of other sizes round otherwise.
    assert torch.allclose(scores, expected, atol=1e-5)


def test_a_router_of_a_model_that_was_trained_further_names_a_weight(fitted, model, tokenizer):
    tuned = copy.deepcopy(model)
    tuned.model.layers[2].mlp.up_proj.weight.data.mul_(1.01)
    with (
        pytest.raises(ValueError, match=r"another one: 1 of .* model.layers.2.mlp.up_proj.weight"),
        fitted.attached(tuned, tokenizer),
    ):
        pass


def test_the_fingerprint_alone_is_asked_of_a_model_that_has_it(model, tokenizer):
    damaged = {"model.norm.weight": "1 AAAAAA=="}
    Decoder.of(model, tokenizer).check_fitted_on("it", "x", fingerprint(model), damaged)
