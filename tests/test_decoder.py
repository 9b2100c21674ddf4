import pytest
import torch

import tiny
from icrouting.decoder import decoder as room
from icrouting.decoder.batches import context_length, pad_id_of, tokenize
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import device_of, dims_of, family_of, layers_of, stack_of
from icrouting.decoder.identity import fingerprint

TEXTS = ["the plot:", "a dull film:"]


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_its_facts_are_those_that_the_functions_find(family, tokenizer):
    model = tiny.model(family)
    decoder = Decoder.of(model, tokenizer)
    assert decoder.family == family_of(model)
    assert decoder.dims == dims_of(model)
    assert decoder.fingerprint == fingerprint(model)
    assert decoder.pad_id == pad_id_of(tokenizer)
    assert decoder.context_length == context_length(model)
    assert decoder.device == device_of(model)
    assert decoder.stack is stack_of(model)
    assert decoder.layers is layers_of(model)
    assert decoder.tokenize(TEXTS) == tokenize(tokenizer, TEXTS)
    (states,) = model.get_input_embeddings()(torch.tensor([[5]]))
    assert decoder.hidden_size == states.shape[-1]


def test_the_fingerprint_is_computed_once_a_decoder(tokenizer, monkeypatch):
    model = tiny.model("llama")
    hashed = []
    monkeypatch.setattr(room, "fingerprint", lambda model: hashed.append(model) or "abcdef")
    decoder = Decoder.of(model, tokenizer)
    assert not hashed
    for _ in range(3):
        assert decoder.fingerprint == "abcdef"
    decoder.check_fitted_on("this router", "tiny", "abcdef")
    assert hashed == [model]
    assert Decoder.of(model, tokenizer).fingerprint == "abcdef"
    assert hashed == [model, model]


def test_a_decoder_made_anew_sees_changed_weights(tokenizer):
    model = tiny.model("llama")
    before = Decoder.of(model, tokenizer).fingerprint
    model.get_output_embeddings().weight.data[0, 0] += 1
    assert Decoder.of(model, tokenizer).fingerprint != before


def test_another_model_than_the_fitted_one_is_refused_by_name(tokenizer):
    decoder = Decoder.of(tiny.model("llama"), tokenizer)
    with pytest.raises(ValueError, match=r"this router was fitted on 'other' \(fingerprint 0123\)"):
        decoder.check_fitted_on("this router", "other", "0123")


def test_a_long_text_and_a_module_that_is_no_model_are_refused(tokenizer):
    decoder = Decoder.of(tiny.model("llama"), tokenizer)
    with pytest.raises(ValueError, match="longer than the model's context of 512"):
        decoder.tokenize(["joy " * 600])
    with pytest.raises(TypeError, match="expected a transformers model, got Linear"):
        Decoder.of(torch.nn.Linear(2, 3), tokenizer)
