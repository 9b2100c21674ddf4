import gc

import pytest
import torch
from transformers import AutoTokenizer

import tiny
from icrouting.decoder.identity import fingerprint
from icrouting.decoder.loading import default_dtype, load_model, load_skeleton
from icrouting.decoder.scoring import score_options
from icrouting.routing.encoder import SentenceEncoder


def test_a_saved_model_loads_frozen_with_a_padding_token(tmp_path):
    model = tiny.model("llama")
    tokenizer = tiny.tokenizer()
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
    ("native", "dtype"),
    [("amx_bf16", torch.bfloat16), ("avx512_bf16", torch.bfloat16), ("avx512_f", torch.float32)],
)
def test_weights_are_in_bfloat16_where_the_hardware_multiplies_it(native, dtype, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": False, native: True})
    assert default_dtype() is dtype


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pinned:smollm", "known are pinned:smollm2-135m"),
        ("nowhere.gguf", "no such file"),
        ("./no-such-folder", "expected a hub id, a folder with config.json"),
    ],
)
def test_what_cannot_be_loaded_is_said(name, message):
    with pytest.raises(ValueError, match=message):
        load_model(name)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt2", "opt"])
def test_a_folder_without_its_tokenizer_is_refused_in_a_sentence(family, tmp_path):
    """For some families transformers makes one up, that knows no word."""
    tiny.model(family).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a model without its tokenizer: save it") as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)
    assert load_skeleton(tmp_path)[1] is None


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_a_tokenizer_that_is_made_up_is_refused_in_a_sentence(family, tmp_path):
    model = tiny.model(family)
    model.save_pretrained(tmp_path)
    made_up = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="knows none but special tokens"):
        score_options(model, made_up, ["a film:"], ["good", "bad"])


@pytest.mark.parametrize("message", ["", " \n"])
def test_what_fails_without_a_word_is_said_by_its_name(message, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(message)

    monkeypatch.setattr("icrouting.decoder.loading.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(ValueError, match=r"cannot load model 'any'.*; OSError$"):
        load_model("any")
    monkeypatch.setattr("icrouting.routing.encoder.SentenceTransformer", fail)
    with pytest.raises(ValueError, match=r"cannot load the sentence encoder 'any'.*; OSError$"):
        SentenceEncoder("any")


@pytest.fixture
def saved(tmp_path):
    """A folder with a model of experts.

    transformers joins their weights, and so has to write them anew for the disk.
    """
    tiny.save(tmp_path, "mixtral")
    return tmp_path


@pytest.mark.slow
def test_weights_on_disk_lie_in_the_cache_folder_as_long_as_their_model_lives(
    saved, tmp_path, monkeypatch
):
    monkeypatch.setenv("ICROUTING_CACHE", str(tmp_path / "cache"))
    model, tokenizer = load_model(saved, dtype=torch.float32, device_map={"": "disk"})
    assert list((tmp_path / "cache").rglob("*.safetensors"))
    assert all(weight.is_meta and not weight.requires_grad for weight in model.parameters())
    whole, _ = load_model(saved, dtype=torch.float32)
    input_ids = tokenizer(["a dull film"], return_tensors="pt").input_ids
    assert torch.equal(model(input_ids=input_ids).logits, whole(input_ids=input_ids).logits)
    del model
    gc.collect()
    assert not list((tmp_path / "cache" / "off-loaded").iterdir())


def test_a_map_that_puts_all_in_one_place_loads_an_ordinary_model(saved):
    model, _ = load_model(saved, dtype=torch.float32, device_map="auto")
    assert fingerprint(model) == fingerprint(tiny.model("mixtral"))
    assert not any(weight.is_meta for weight in model.parameters())


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"device_map": "foo"}, r"device_map that fits it, not 'foo'; .*'auto', 'balanced'"),
        (
            {"device_map": {"lm_head": "disk"}},
            r"not \{'lm_head': 'disk'\}; .* does not give any device",
        ),
        ({"device_map": {"": "gpu"}}, r"not \{'': 'gpu'\}; Expected one of cpu, cuda"),
        ({"device_map": "auto", "device": "cpu"}, "got both"),
    ],
)
def test_a_place_that_is_none_is_said_in_one_line_and_leaves_nothing(
    places, message, saved, tmp_path, monkeypatch
):
    monkeypatch.setenv("ICROUTING_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=message) as error:
        load_model(saved, **places)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
