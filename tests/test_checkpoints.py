import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaForSequenceClassification,
    LlamaModel,
)

import commands
import tiny
from icrouting.cli import main
from icrouting.decoder.identity import fingerprint
from icrouting.decoder.loading import load_model
from icrouting.routing.encoder import SentenceEncoder

DEPRECATED_BY_PEFT = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
ATTENTION = "model.layers.1.self_attn."


def rewrite(folder, change):
    """Changes the weights that a folder holds."""
    (file,) = folder.glob("*model.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def drop(start):
    """A change that takes away the weights whose names begin so."""

    def change(tensors):
        for name in [name for name in tensors if name.startswith(start)]:
            del tensors[name]

    return change


def configure(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def saved(tmp_path):
    tiny.save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("places", [{}, {"device_map": "auto"}, {"device_map": {"": "disk"}}])
def test_a_folder_that_lacks_weights_is_refused_with_their_names(
    saved, places, tmp_path, monkeypatch
):
    monkeypatch.setenv("ICROUTING_CACHE", str(tmp_path / "cache"))
    rewrite(saved, drop(ATTENTION))
    with pytest.raises(
        ValueError,
        match=rf"lack 4 weights \({ATTENTION}k_proj.weight, .* and 1 more\), which Llama",
    ):
        load_model(saved, **places)
    assert not list(tmp_path.glob("cache/off-loaded/*"))


@pytest.mark.slow
def test_an_evaluation_of_a_model_that_lacks_weights_ends_with_an_error(
    saved, world, tmp_path, capsys
):
    rewrite(saved, drop(ATTENTION))
    with pytest.raises(SystemExit) as exit_of:
        asked = ["--model", str(saved), "--data", str(world / "data"), "--methods", "zero-shot"]
        main.main(["eval", "--out", str(tmp_path / "run"), *asked, *commands.EVALUATE.split()])
    assert exit_of.value.code == 2
    assert f"lack 4 weights ({ATTENTION}k_proj.weight" in capsys.readouterr().err


def test_a_weight_of_another_shape_is_refused_with_both_shapes(saved):
    rewrite(saved, lambda tensors: tensors.update({"lm_head.weight": torch.ones(7, 42)}))
    with pytest.raises(
        ValueError, match=r"1 weight \(lm_head.weight of shape \(7, 42\), not \(311, 42\)\)"
    ):
        load_model(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 6}, r"lack 9 weights \(model.layers.5."),
        ({"num_hidden_layers": 4}, r"hold 9 weights \(model.layers.4."),
        ({"vocab_size": 310}, r"hold 2 weights \(lm_head.weight of shape .311, 42., not .310, 42."),
    ],
)
def test_a_config_of_another_model_is_refused(saved, changes, message):
    configure(saved, **changes)
    with pytest.raises(ValueError, match=message):
        load_model(saved)


@pytest.mark.parametrize("name", [f"{ATTENTION}q_proj.bias", "lm_head.bias", "model.norm.bias"])
def test_a_weight_that_a_part_does_not_read_is_refused(saved, name):
    rewrite(saved, lambda tensors: tensors.update({name: torch.ones(60)}))
    with pytest.raises(ValueError, match=rf"hold 1 weight \({name}\) of parts that LlamaForCausal"):
        load_model(saved)


@pytest.mark.parametrize("name", ["v_head.weight", "model.vision_tower.weight", "mtp.0.weight"])
def test_weights_of_parts_that_the_model_does_not_have_are_named_in_a_warning(saved, name):
    digest = fingerprint(load_model(saved)[0])
    rewrite(saved, lambda tensors: tensors.update({name: torch.ones(60)}))
    with pytest.warns(UserWarning, match=rf"no such parts: 1 weight \({name}\)"):
        model, _ = load_model(saved)
    assert fingerprint(model) == digest


def test_a_classifier_is_no_model_that_predicts_tokens(tmp_path):
    LlamaForSequenceClassification(tiny.CONFIGS["llama"]).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lack 1 weight \(lm_head.weight\)"):
        load_model(tmp_path)


def test_a_sentence_encoder_is_no_model_that_predicts_tokens(encoder_folder):
    with pytest.raises(ValueError, match=r"lack \d weights \(cls.predictions"):
        load_model(encoder_folder)


def test_a_router_is_no_model_and_names_its_own(saved_router):
    with pytest.raises(
        ValueError, match=r"this is a router: expected the model .* 'Qwen2ForCausal"
    ):
        load_model(saved_router)


def test_the_stack_of_a_tied_model_alone_is_a_whole_one(tmp_path):
    config = type(tiny.CONFIGS["llama"])(**tiny.SIZES, tie_word_embeddings=True)
    stack = LlamaModel(config)
    stack.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(tmp_path, dtype=torch.float32)
    assert torch.equal(model.lm_head.weight, stack.embed_tokens.weight)


def test_a_model_of_text_and_images_is_a_whole_one(tmp_path):
    text = {**tiny.SIZES, "sliding_window": 7}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = Gemma3Config(text_config=text, vision_config=vision)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(tmp_path)
    assert type(model) is Gemma3ForConditionalGeneration


@pytest.mark.parametrize("family", sorted(tiny.ALL_CONFIGS))
def test_every_family_is_loaded_whole(family, tmp_path):
    saved_model = tiny.model_of(family)
    saved_model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(tmp_path, dtype=torch.float32)
    assert fingerprint(model) == fingerprint(saved_model)


@pytest.fixture
def adapted(saved):
    """A folder with a LoRA of the saved model."""
    model, tokenizer = load_model(saved)
    adapter = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    folder = saved.parent / "adapter"
    adapter.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@DEPRECATED_BY_PEFT
def test_an_adapter_that_lacks_weights_is_refused_with_their_names(adapted):
    load_model(adapted)
    rewrite(adapted, drop(f"base_model.model.{ATTENTION}"))
    with pytest.raises(ValueError, match=rf"lack 2 weights \({ATTENTION}q_proj.lora_A"):
        load_model(adapted)


@DEPRECATED_BY_PEFT
def test_the_model_under_an_adapter_is_looked_at_too(adapted, saved):
    rewrite(saved, drop(f"{ATTENTION}k_proj"))
    with pytest.raises(ValueError, match=rf"lack 1 weight \({ATTENTION}k_proj.weight\)"):
        load_model(adapted)


def test_an_encoder_that_lacks_weights_is_refused_with_their_names(encoder_folder, tmp_path):
    folder = shutil.copytree(encoder_folder, tmp_path / "encoder")
    rewrite(folder, drop("encoder.layer.0.attention.self.query"))
    with pytest.raises(
        ValueError, match=r"sentence encoder .* lack 2 weights \(encoder.layer.0.attention.self.q"
    ):
        SentenceEncoder(str(folder))


def test_an_encoder_without_its_pooler_is_the_same_at_every_load(encoder_folder, tmp_path):
    folder = shutil.copytree(encoder_folder, tmp_path / "encoder")
    whole = SentenceEncoder(str(folder))
    rewrite(folder, drop("pooler."))
    first = SentenceEncoder(str(folder))
    assert SentenceEncoder(str(folder)).fingerprint == first.fingerprint
    assert torch.equal(first(["a dull film"]), whole(["a dull film"]))
