import pytest
import torch

import tiny
from icrouting.decoder.batches import context_length, pad, pad_id_of, tokenize
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import device_of, dims_of, family_of, layers_of, stack_of
from icrouting.decoder.identity import fingerprint
from icrouting.decoder.passes import next_token_logits

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


def test_the_fingerprint_is_that_of_the_weights_as_they_are(tokenizer):
    model = tiny.model("llama")
    decoder = Decoder.of(model, tokenizer)
    before = decoder.fingerprint
    assert decoder.fingerprint == before
    model.get_output_embeddings().weight.data[0, 0] += 1
    assert decoder.fingerprint != before


class Wrapper(torch.nn.Module):
    """A wrapper whose forward does more than that of the model inside."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.config = model.config

    def forward(self, **inputs):
        output = self.model(**inputs)
        output.logits = output.logits.flip(-1)
        return output


def test_what_is_called_is_the_model_as_it_was_given(tokenizer):
    """A compiled model stays compiled, and an adapter that works in its wrapper's forward works."""
    model = tiny.model("llama")
    decoder = Decoder.of(Wrapper(model), tokenizer)
    batch = pad(decoder.tokenize(TEXTS), decoder.pad_id)
    plain = next_token_logits(model, batch)
    assert torch.equal(next_token_logits(decoder.model, batch), plain.flip(-1))
    assert decoder.base is model
    assert decoder.unwrapped().model is model


def test_another_model_than_the_fitted_one_is_refused_by_name(tokenizer):
    decoder = Decoder.of(tiny.model("llama"), tokenizer)
    with pytest.raises(ValueError, match=r"this router was fitted on 'other' \(fingerprint 0123\)"):
        decoder.check_fitted_on("this router", "other", "0123", {})


def test_a_long_text_and_a_module_that_is_no_model_are_refused(tokenizer):
    decoder = Decoder.of(tiny.model("llama"), tokenizer)
    with pytest.raises(ValueError, match="longer than the model's context of 512"):
        decoder.tokenize(["joy " * 600])
    with pytest.raises(TypeError, match="expected a transformers model, got Linear"):
        Decoder.of(torch.nn.Linear(2, 3), tokenizer)
