import pytest
import torch

import tiny
from icrouting.models import fingerprint, load_model


def test_a_saved_model_loads_frozen_with_a_padding_token(tmp_path):
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    tokenizer.pad_token = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, with_pad = load_model(tmp_path, dtype=torch.float32)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training
    assert with_pad.pad_token_id is not None
    assert with_pad.padding_side == "left"
    assert fingerprint(loaded) == fingerprint(model)


def test_the_fingerprint_survives_a_change_of_dtype_and_no_change_of_weights():
    model = tiny.model("llama").bfloat16()
    digest = fingerprint(model)
    assert fingerprint(model.float()) == digest
    model.model.layers[4].self_attn.q_proj.weight.data[0, 0] += 1
    assert fingerprint(model) != digest
    assert fingerprint(tiny.model("llama", seed=1)) != digest


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pinned:smollm", "known are pinned:smollm2-135m"),
        ("nowhere.gguf", "no such file"),
        ("./no-such-folder", "expected a hub id, a folder with config.json"),
    ],
)
def test_what_cannot_be_loaded_is_said(name, said):
    with pytest.raises(ValueError, match=said):
        load_model(name)
