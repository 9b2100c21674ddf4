"""A model whose layers lie in memory and on disk does all that the same model in memory does."""

import numpy as np
import pytest
import torch

import tiny
from icrouting.config import HIDDEN, FitConfig
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.identity import fingerprint
from icrouting.decoder.loading import load_model
from icrouting.evaluation.evaluate import Evaluation
from icrouting.evaluation.records import read
from icrouting.icr import InContextRouter
from icrouting.methods import make
from icrouting.methods.settings import Settings

# fp32 round-off; the same kernels run on the same numbers
CLOSE = 1e-6
OPTIONS = ["negative", "positive"]


METHODS = ("zero-shot", "few-shot", "calibration", "task-vectors", "i2cl", "icr")
# A trunk layer and a routed one on disk, then everything.
LAYERS = {f"model.layers.{layer}": "disk" if layer in (1, 4) else "cpu" for layer in range(5)}
REST = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
MAPS = {"layers on disk": LAYERS | REST, "all on disk": {"": "disk"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.save(folder)
    return folder


@pytest.fixture(scope="module", params=MAPS)
def pair(request, folder):
    """The model in memory and off-loaded, and their tokenizer."""
    whole, tokenizer = load_model(folder, dtype=torch.float32)
    spread, _ = load_model(folder, dtype=torch.float32, device_map=MAPS[request.param])
    assert any(weight.is_meta for weight in spread.parameters())
    return whole, spread, tokenizer


def state_of(model):
    """All that attaching, fitting and scoring touch.

    Accelerate's hooks are among it, and where every weight lies.
    """
    hooks = []
    attributes = []
    for module in model.modules():
        hooks.append((*module._forward_hooks, *module._forward_pre_hooks, *module._backward_hooks))
        accelerates = vars(module).get("_hf_hook")
        attributes.append((id(accelerates), id(vars(module).get("forward")), module.training))
    weights = [
        (name, weight.is_meta, weight.requires_grad) for name, weight in model.named_parameters()
    ]
    return hooks, attributes, weights, model.config._attn_implementation, sorted(vars(model))


def fitted(model, tokenizer, encoder, folder=None):
    config = FitConfig(
        n_prompts=9,
        demos_per_class=1,
        n_queries=9,
        rank=2,
        epochs=1,
        min_steps=0,
        patience=0,
        hidden_width=5,
        encoder=encoder,
    )
    return InContextRouter.fit(model, tokenizer, [tiny.task()], config, folder=folder)


@pytest.mark.parametrize("features", ["encoder", HIDDEN])
@pytest.mark.slow
def test_a_fit_equals_that_in_memory_and_leaves_the_model_as_it_was(
    pair, features, encoder_folder, tmp_path
):
    whole, spread, tokenizer = pair
    encoder = str(encoder_folder) if features == "encoder" else features
    before = state_of(spread)
    expected = fitted(whole, tokenizer, encoder)
    got = fitted(spread, tokenizer, encoder, tmp_path)
    assert state_of(spread) == before
    assert fingerprint(spread) == fingerprint(whole)
    assert (got.pids.query_pids - expected.pids.query_pids).abs().max() <= CLOSE
    assert (got.pids.key_pids - expected.pids.key_pids).abs().max() <= CLOSE
    trained = got.router.state_dict()
    for name, weight in expected.router.state_dict().items():
        assert (trained[name] - weight).abs().max() <= CLOSE
        assert name.endswith("2.bias") or weight.any()


@pytest.mark.slow
def test_activation_checkpointing_brings_off_loaded_layers_in_again(pair):
    whole, spread, tokenizer = pair
    expected = fitted(whole, tokenizer, HIDDEN).router.state_dict()
    _, _, weights, *_ = state_of(spread)
    spread.activation_checkpointing_enable()
    got = fitted(spread, tokenizer, HIDDEN).router.state_dict()
    spread.activation_checkpointing_disable()
    # And takes the last of them out again.
    assert state_of(spread)[2] == weights
    assert max((got[name] - weight).abs().max() for name, weight in expected.items()) <= CLOSE


@pytest.fixture(scope="module")
def icr(pair, encoder_folder):
    whole, _, tokenizer = pair
    icr = fitted(whole, tokenizer, str(encoder_folder))
    # So that it matters.
    icr.router.alpha[-1].weight.normal_(generator=torch.Generator().manual_seed(0))
    return icr


@pytest.mark.slow
def test_scores_and_generation_equal_those_in_memory(pair, icr):
    whole, spread, tokenizer = pair
    texts = [tiny.task().prompt(example) for example in tiny.task().test[:3]]
    before = state_of(spread)
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    scores = []
    tokens = []
    effects = []
    for model in (whole, spread):
        with icr.attached(model, tokenizer) as routed:
            tokens.append(
                model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
            )
            scores.append(routed.score(texts, OPTIONS))
            effects.append(routed.effect(texts))
    assert (scores[0] - scores[1]).abs().max() <= CLOSE
    assert torch.equal(tokens[0], tokens[1])
    assert effects[0] == effects[1]
    assert state_of(spread) == before
    with icr.attached(whole, tokenizer, strength=0.0) as unrouted:
        plain_scores = unrouted.score(texts, OPTIONS)
    assert (plain_scores - scores[0]).abs().max() > 100 * CLOSE, "the routing must matter"


@pytest.mark.slow
def test_an_evaluation_equals_that_in_memory(pair, icr, tmp_path):
    whole, spread, tokenizer = pair
    icr.save_pretrained(tmp_path / "router")
    settings = Settings(router=str(tmp_path / "router"), demos_per_class=1, i2cl_epochs=1)
    task = tiny.task()
    before = state_of(spread)
    logits_by_model = []
    for name, model in (("whole", whole), ("spread", spread)):
        evaluation = Evaluation(
            Decoder.of(model, tokenizer),
            make(METHODS, settings),
            [task],
            tmp_path / f"{name}.jsonl",
        )
        evaluation.run([task], [0], 7)
        records = read(tmp_path / f"{name}.jsonl")
        logits_by_model.append({record.key: record.option_logits for record in records})
    expected, got = logits_by_model
    assert len(expected) == 7 * len(METHODS)
    assert got.keys() == expected.keys()
    for key, logits in expected.items():
        assert np.allclose(got[key], logits, rtol=0, atol=CLOSE), key
    assert state_of(spread) == before
