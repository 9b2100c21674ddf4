"""Whatever dtype and device torch is told to take by default, results are the same."""

from contextlib import contextmanager

import pytest
import torch

import tiny
from fitted import fit_method
from icrouting.config import FitConfig
from icrouting.decoder.loading import load_model
from icrouting.decoder.scoring import score_options
from icrouting.icr import InContextRouter
from icrouting.methods import make
from icrouting.methods.registry import LEARNING
from icrouting.methods.saved import load_method, save_method
from icrouting.routing.encoder import SentenceEncoder
from icrouting.runtime.defaults import usual_defaults
from icrouting.tasks.prompts import Prompt

TASK = tiny.task("toy", n_test=30)
TEXTS = [TASK.prompt(example) for example in TASK.test[:5]]
OPTIONS = TASK.spec.options
EVERY_DEFAULT = pytest.mark.parametrize(
    "default", [(torch.bfloat16, "meta"), (torch.float64, None), (torch.float16, None)], ids=str
)


@contextmanager
def as_default(default):
    dtype, device = default
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def same(one, other):
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


@pytest.fixture(scope="module")
def model():
    return tiny.model("qwen2")


@pytest.fixture(scope="module")
def hidden_router(model, tokenizer):
    config = FitConfig(
        rank=3,
        n_prompts=8,
        n_queries=8,
        epochs=1,
        min_steps=0,
        patience=0,
        encoder="hidden",
        lr=0.05,
    )
    return InContextRouter.fit(model, tokenizer, [TASK], config)


@EVERY_DEFAULT
@pytest.mark.parametrize("encoder", ["hidden", "sentence"])
@pytest.mark.slow
def test_a_loaded_router_routes_alike(default, encoder, model, tokenizer, encoder_folder, tmp_path):
    if encoder == "sentence":
        encoder = str(encoder_folder)
    config = FitConfig(
        rank=3,
        n_prompts=8,
        n_queries=8,
        epochs=1,
        min_steps=0,
        patience=0,
        encoder=encoder,
        lr=0.05,
    )
    InContextRouter.fit(model, tokenizer, [TASK], config).save_pretrained(tmp_path)
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True)
    plain_forward = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}

    def results():
        icr = InContextRouter.from_pretrained(tmp_path)
        with icr.attached(model, tokenizer) as routed, torch.no_grad():
            logits = model(**plain_forward).logits
            scores = routed.score(TEXTS, OPTIONS)
            routing = routed.routing(TEXTS)
        return logits, scores, routing.routing_vector, routing.head_gates

    usual = results()
    with as_default(default):
        found = results()
    assert all(map(same, found, usual))


@EVERY_DEFAULT
@pytest.mark.parametrize("encoder", ["hidden", "constant:hidden", "random:hidden", "sentence"])
@pytest.mark.slow
def test_a_fit_gives_the_same_router(default, encoder, model, tokenizer, encoder_folder):
    if encoder == "sentence":
        encoder = str(encoder_folder)
    config = FitConfig(
        rank=3, n_prompts=8, n_queries=8, epochs=1, min_steps=0, patience=0, encoder=encoder
    )
    digest = InContextRouter.fit(model, tokenizer, [TASK], config).digest()
    with as_default(default):
        icr = InContextRouter.fit(model, tokenizer, [TASK], config)
    assert icr.digest() == digest


@EVERY_DEFAULT
def test_what_is_looked_at_is_the_same(default, hidden_router, model, tokenizer):
    with hidden_router.attached(model, tokenizer) as routed:
        usual = routed.effect(TEXTS)
        with as_default(default):
            found = routed.effect(TEXTS)
    assert str(found) == str(usual)


@EVERY_DEFAULT
def test_a_model_and_its_encoder_are_loaded_alike(default, tokenizer, encoder_folder, tmp_path):
    tiny.save(tmp_path)
    usual_model, _ = load_model(tmp_path, dtype=torch.float32)
    usual_features = SentenceEncoder(str(encoder_folder))(TEXTS)
    with as_default(default):
        found_model, _ = load_model(tmp_path, dtype=torch.float32)
        found_features = SentenceEncoder(str(encoder_folder))(TEXTS)
    usual_state = usual_model.state_dict()
    for name, weight in found_model.state_dict().items():
        assert same(weight, usual_state[name])
    assert same(found_features, usual_features)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LEARNING, ids=lambda kind: kind.name)
def test_every_method_learns_and_answers_alike(kind, tokenizer, small_settings, tmp_path):
    model = tiny.model("llama")
    prompts = [Prompt("", text) for text in TEXTS]
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True)

    def results(folder):
        method = kind(small_settings)
        fit_method(method, model, tokenizer, [TASK])
        save_method(method, folder)
        method = load_method(folder, model, tokenizer)
        with method.attached(model, tokenizer, TASK), torch.no_grad():
            logits = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).logits
            scores = score_options(model, tokenizer, prompts, OPTIONS)
        adjusted = method.adjusted(TASK, TASK.test[:5], scores)
        return {**method.tensors(), "logits": logits, "scores": scores, "adjusted": adjusted}

    usual = results(tmp_path / "usual")
    with as_default((torch.bfloat16, "meta")):
        found = results(tmp_path / "found")
    for name, value in usual.items():
        assert same(found[name], value), name


@EVERY_DEFAULT
def test_plain_prompting_is_scored_alike(default, model, tokenizer, small_settings):
    (calibration,) = make(["calibration"], small_settings)
    fit_method(calibration, model, tokenizer, [TASK])

    def results():
        scores = score_options(model, tokenizer, [Prompt("", text) for text in TEXTS], OPTIONS)
        return calibration.adjusted(TASK, TASK.test[:5], scores)

    usual = results()
    with as_default(default):
        found = results()
    assert same(found, usual)


@EVERY_DEFAULT
def test_the_users_defaults_come_back(default):
    with as_default(default):
        before = torch.zeros(1)
        with pytest.raises(RuntimeError, match="inside"), usual_defaults():
            assert same(torch.zeros(1), torch.zeros(1, dtype=torch.float32, device="cpu"))
            raise RuntimeError("inside")
        after = torch.zeros(1)
    assert (after.dtype, after.device) == (before.dtype, before.device)
