"""The shared matrix: fit, apply, leave, save, load, same result.

For every method that learns, over the family table.
"""

import functools
import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

import tiny
from fitted import fit_method
from icrouting.config import FitConfig
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import CACHE
from icrouting.decoder.scoring import score_options
from icrouting.evaluation.costs import fit_costs
from icrouting.fitting import stages
from icrouting.methods import Method, Settings, controls, make
from icrouting.methods.batch_calibration import BatchCalibration
from icrouting.methods.controls import Refit
from icrouting.methods.elicit import Elicit
from icrouting.methods.function_vectors import FunctionVectors
from icrouting.methods.iterative_vectors import IterativeVectors
from icrouting.methods.probes import ProbeEncoder
from icrouting.methods.regimes import ONCE
from icrouting.methods.registry import LEARNING
from icrouting.methods.residual_probe import ProbeResidual
from icrouting.methods.saved import load_method, save_method
from icrouting.methods.soft_prompts import PromptTuning
from icrouting.methods.task_vectors import TaskVectors
from icrouting.routing.attach import attach
from icrouting.runtime.storage import load_tensors, save_tensors
from icrouting.tasks.prompts import Prompt
from icrouting.tasks.task import Task

TASK = tiny.task("toy", n_test=30)
FAMILIES = ("llama", "qwen3", "gemma3", "gpt_neox")
EVERY = pytest.mark.parametrize("kind", LEARNING, ids=lambda kind: kind.name)


def fitted(kind, model, tokenizer, settings, task=TASK, seed=0):
    method = kind(settings)
    return fit_method(method, model, tokenizer, [task], seed)


def prompts():
    # of mixed lengths
    return [
        TASK.prompt(example) + "." * (3 * i % 7) + ":" for i, example in enumerate(TASK.test[:7])
    ]


def scores(model, tokenizer, texts):
    return score_options(model, tokenizer, [Prompt("", text) for text in texts], TASK.spec.options)


@EVERY
@pytest.mark.parametrize("family", FAMILIES)
def test_fit_apply_leave_save_load(kind, family, tokenizer, small_settings, tmp_path):
    model = tiny.model(family)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    plain = scores(model, tokenizer, prompts())
    method = fitted(kind, model, tokenizer, small_settings)
    assert torch.equal(scores(model, tokenizer, prompts()), plain)
    with method.attached(model, tokenizer, TASK):
        changed = scores(model, tokenizer, prompts())
        alone = torch.cat([scores(model, tokenizer, [prompt]) for prompt in prompts()])
    assert torch.allclose(changed, alone, atol=1e-4), (
        "a batch differs from its rows: is padding edited or read?"
    )
    save_method(method, tmp_path / "saved")
    again = load_method(tmp_path / "saved", model, tokenizer)
    with again.attached(model, tokenizer, TASK):
        assert torch.equal(scores(model, tokenizer, prompts()), changed)
    with pytest.raises(RuntimeError, match="thrown inside"), again.attached(model, tokenizer, TASK):
        raise RuntimeError("thrown inside")
    assert torch.equal(scores(model, tokenizer, prompts()), plain)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in after.items())
    assert not any(weight.requires_grad or weight.grad is not None for weight in model.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert again.cost == method.cost


@EVERY
@pytest.mark.slow
def test_a_mask_by_position_and_a_static_cache_change_nothing(kind, tokenizer, small_settings):
    model = tiny.model("llama")
    right, left = (tiny.prompts(side=side) for side in ("right", "left"))
    new = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with (
        fitted(kind, model, tokenizer, small_settings).attached(model, tokenizer, TASK),
        torch.no_grad(),
    ):
        ids, mask = right["input_ids"], right["attention_mask"]
        assert torch.equal(
            model(ids, mask).logits, model(input_ids=ids, attention_mask=mask).logits
        )
        found = model.generate(**left, **new)
        if issubclass(kind, PromptTuning):
            with pytest.raises(ValueError, match="a cache that grows"):
                model.generate(**left, **new, cache_implementation="static")
        else:
            assert torch.equal(model.generate(**left, **new, cache_implementation="static"), found)


@EVERY
@pytest.mark.parametrize(
    "way",
    [
        {"use_cache": False},
        {"prefill_chunk_size": 4},
        {"prefill_chunk_size": 1},
        {"prompt_lookup_num_tokens": 3},
        {"num_beams": 2, "use_cache": False},
    ],
    ids=str,
)
@pytest.mark.slow
def test_a_prompt_is_the_same_however_generation_runs_it(kind, way, tokenizer, small_settings):
    model = tiny.model("llama")
    given = tokenizer(
        "Review: good good good\nSentiment: good good good\nReview: good", return_tensors="pt"
    )
    new = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with (
        fitted(kind, model, tokenizer, small_settings).attached(model, tokenizer, TASK),
        torch.no_grad(),
    ):
        expected = model.generate(**given, **new, num_beams=way.get("num_beams", 1))
        assert torch.equal(model.generate(**given, **new, **way), expected)


@pytest.mark.parametrize("kind", [TaskVectors, Elicit, IterativeVectors, FunctionVectors])
@pytest.mark.slow
def test_generated_tokens_are_left_alone_but_by_function_vectors(kind, tokenizer, small_settings):
    model, token = tiny.model("llama"), torch.tensor([[7]])
    method, given = (
        fitted(kind, model, tokenizer, small_settings),
        tokenizer(prompts()[0], return_tensors="pt"),
    )
    mask, found = torch.ones(1, given.input_ids.shape[1] + 1, dtype=torch.long), []
    for context in (method.attached(model, tokenizer, TASK), nullcontext()):
        with torch.no_grad(), method.attached(model, tokenizer, TASK):
            cache = model(**given, use_cache=True)[CACHE]
        with torch.no_grad(), context:
            found.append(model(input_ids=token, attention_mask=mask, **{CACHE: cache}).logits)
    assert torch.equal(*found) == (kind is not FunctionVectors)


@pytest.mark.slow
def test_a_model_that_was_compiled_before_notices_what_is_attached(tokenizer, small_settings):
    model = tiny.model("llama")
    method, given = (
        fitted(TaskVectors, model, tokenizer, small_settings),
        tiny.prompts(side="right"),
    )
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = compiled(**given).logits
        with method.attached(model, tokenizer, TASK):
            edited = model(**given).logits
            assert torch.allclose(compiled(**given).logits, edited, atol=1e-5)
        assert not torch.allclose(edited, plain, atol=1e-3)
        assert torch.allclose(compiled(**given).logits, plain, atol=1e-5)


@pytest.mark.slow
@EVERY
def test_a_fit_is_made_by_its_seed_and_by_no_test_row(kind, tokenizer, small_settings):
    model, spoilt = (
        tiny.model("llama"),
        [replace(row, fields={"text": "?"}, label=0) for row in TASK.test],
    )
    method = fitted(kind, model, tokenizer, small_settings)
    again = fitted(kind, model, tokenizer, small_settings, replace(TASK, test=tuple(spoilt)))
    other = fitted(kind, model, tokenizer, small_settings, seed=1)
    assert_same(method, again)
    if kind.draws:
        assert any(
            not torch.equal(tensor, other.tensors()[name])
            for name, tensor in method.tensors().items()
        )
    else:
        assert_same(method, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    # The residual probes choose by cross-validation: see their own tests.
    [kind for kind in LEARNING if not issubclass(kind, ProbeResidual)],
    ids=lambda kind: kind.name,
)
def test_what_is_in_force_is_the_best_that_was_tried_and_all_of_it_is_kept(
    kind, tokenizer, small_settings, monkeypatch
):
    model, accuracies = tiny.model("llama"), iter([1.0, 0.5])
    first = fitted(kind, model, tokenizer, replace(small_settings, tries=1))
    monkeypatch.setattr(kind, "validated", lambda self: next(accuracies))  # the first is best
    method = fitted(kind, model, tokenizer, small_settings)
    assert_same(method, first)
    assert {name for name, value in vars(method).items() if isinstance(value, torch.Tensor)} <= set(
        kind.learned
    )


def assert_same(method, other):
    assert method.tensors().keys() == other.tensors().keys()
    for name, tensor in method.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]), name


@EVERY
@pytest.mark.slow
def test_what_was_learned_on_another_model_is_refused(kind, tokenizer, small_settings, tmp_path):
    method = fitted(kind, tiny.model("llama"), tokenizer, small_settings)
    save_method(method, tmp_path)
    for model in (tiny.model("qwen3"), tiny.model("llama", seed=1)):
        with pytest.raises(ValueError, match="load the base model it was fitted on"):
            load_method(tmp_path, model, tokenizer)
        with (
            pytest.raises(ValueError, match="load the base model"),
            method.attached(model, tokenizer, TASK),
        ):
            pass


def test_what_was_learned_with_another_sentence_encoder_is_refused(
    tokenizer, small_settings, tmp_path
):
    model = tiny.model("llama")
    save_method(fitted(ProbeEncoder, model, tokenizer, small_settings), tmp_path)
    described = json.loads((tmp_path / "method.json").read_text())
    (tmp_path / "method.json").write_text(json.dumps({**described, "depends_on": "0" * 16}))
    with pytest.raises(ValueError, match="was learned with 0000000000000000, now with"):
        load_method(tmp_path, model, tokenizer)


def test_a_damaged_folder_is_refused_in_a_sentence(tokenizer, small_settings, tmp_path):
    model = tiny.model("llama")
    with pytest.raises(ValueError, match="holds no saved method"):
        load_method(tmp_path, model, tokenizer)
    (inner,) = make(["task-vectors"], small_settings)
    inner.fit(model, tokenizer, [TASK], np.random.default_rng(0))
    with pytest.raises(ValueError, match="of a method fitted on each task"):
        save_method(inner, tmp_path)
    save_method(inner.on(TASK), str(tmp_path))
    load_method(str(tmp_path), model, tokenizer)
    save_tensors(tmp_path / "method.safetensors", {"vectors": torch.zeros(3, 1)})
    with pytest.raises(ValueError, match="is damaged: its sha256"):
        load_method(tmp_path, model, tokenizer)
    (tmp_path / "method.json").write_text("{}")
    with pytest.raises(ValueError, match="unknown or missing"):
        load_method(tmp_path, model, tokenizer)
    (tmp_path / "method.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no saved method"):
        load_method(tmp_path, model, tokenizer)


def test_a_folder_saved_before_checksums_is_taken_up(tokenizer, small_settings, tmp_path):
    model = tiny.model("llama")
    method = fitted(TaskVectors, model, tokenizer, small_settings)
    save_method(method, tmp_path)
    described = json.loads((tmp_path / "method.json").read_text())
    del described["tensors_sha256"]
    (tmp_path / "method.json").write_text(json.dumps(described))
    assert_same(method, load_method(tmp_path, model, tokenizer))


def test_nothing_is_fitted_under_another_method(tokenizer, small_settings, tmp_path):
    model, (inner,) = tiny.model("llama"), make(["task-vectors"], small_settings)
    inner.fit(model, tokenizer, [TASK], np.random.default_rng(0), tmp_path / "fit.safetensors")
    with fitted(TaskVectors, model, tokenizer, small_settings).attached(model, tokenizer, TASK):
        for step in (
            lambda: inner.on(TASK),
            lambda: inner.attached(model, tokenizer, TASK).__enter__(),
        ):
            with pytest.raises(
                ValueError, match="task-vectors is attached to this model: leave it before"
            ):
                step()
    assert not list(tmp_path.iterdir())


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Controls of ICR that are fitted here take as few steps as their rows give."""
    few = functools.partial(FitConfig, min_steps=0, patience=0)
    monkeypatch.setattr(controls, "FitConfig", few)


def test_a_router_and_a_rival_are_never_on_one_model_at_once(tokenizer, small_settings):
    model, config = (
        tiny.model("llama"),
        FitConfig(n_prompts=6, n_queries=6, min_steps=0, encoder=small_settings.encoder),
    )
    rival, before = (
        fitted(TaskVectors, model, tokenizer, small_settings),
        scores(model, tokenizer, prompts()),
    )
    steps = (
        lambda: stages.fit(Decoder.of(model, tokenizer), [TASK], config),
        lambda: attach(model, tiny.pids(model)).__enter__(),
    )
    with rival.attached(model, tokenizer, TASK):
        under = scores(model, tokenizer, prompts())
        for step in steps:
            with pytest.raises(
                ValueError, match="task-vectors is attached to this model: leave it before icr is"
            ):
                step()
        assert torch.equal(scores(model, tokenizer, prompts()), under)
    with (
        attach(model, tiny.pids(model)),
        pytest.raises(ValueError, match="icr is attached to this model"),
    ):
        rival.attached(model, tokenizer, TASK).__enter__()
    assert torch.equal(scores(model, tokenizer, prompts()), before)
    with rival.attached(model, tokenizer, TASK):  # nothing holds the model any more
        assert torch.equal(scores(model, tokenizer, prompts()), under)


def test_a_fit_kept_before_a_setting_was_there_is_taken_up(
    tokenizer, small_settings, tmp_path, monkeypatch
):
    model, file = tiny.model("llama"), tmp_path / "fit.safetensors"
    TaskVectors(small_settings).fit(model, tokenizer, [TASK], np.random.default_rng(0), file)
    tensors, notes = load_tensors(file)
    save_tensors(file, tensors, {name: note for name, note in notes.items() if name != "tries"})
    monkeypatch.setattr(TaskVectors, "learn", lambda *args: pytest.fail("fitted again"))
    TaskVectors(small_settings).fit(model, tokenizer, [TASK], np.random.default_rng(0), file)


def test_a_method_fitted_on_each_task_is_attached_as_the_task_s_own(tokenizer, small_settings):
    model, (inner,) = tiny.model("llama"), make(["task-vectors"], small_settings)
    inner.fit(model, tokenizer, [TASK], np.random.default_rng(0))
    plain = scores(model, tokenizer, prompts())
    with inner.on(TASK).attached(model, tokenizer, TASK):
        expected = scores(model, tokenizer, prompts())
    with inner.attached(model, tokenizer, TASK) as own:
        assert torch.equal(scores(model, tokenizer, prompts()), expected)
    assert own is inner.on(TASK)
    assert not torch.allclose(plain, expected, atol=1e-3)


@EVERY
@pytest.mark.slow
def test_a_second_method_is_refused_until_the_first_is_left(kind, tokenizer, small_settings):
    model = tiny.model("llama")
    method, other = (
        fitted(kind, model, tokenizer, small_settings),
        fitted(TaskVectors, model, tokenizer, small_settings),
    )
    for second in (method, other):
        with method.attached(model, tokenizer, TASK):
            expected = scores(model, tokenizer, prompts())
            with (
                pytest.raises(ValueError, match=f"{kind.name} is attached"),
                second.attached(model, tokenizer, TASK),
            ):
                pass
            assert torch.equal(scores(model, tokenizer, prompts()), expected)
    with other.attached(model, tokenizer, TASK):
        pass


class Views(Method):
    """Learns tensors that safetensors does not take as they are."""

    name = "views"
    learned = ("one", "other")

    def learn(self, rng):
        self.one = torch.arange(6.0).reshape(2, 3).T
        self.other = self.one[0]


def test_tensors_that_share_memory_or_are_turned_are_kept(
    tokenizer, small_settings, tmp_path, monkeypatch
):
    model, file = tiny.model("llama"), tmp_path / "fit.safetensors"
    monkeypatch.setattr("icrouting.methods.saved.LEARNING", [Views])
    method = Views(small_settings)
    method.fit(model, tokenizer, [TASK], np.random.default_rng(0), file)
    save_method(method, tmp_path)
    again = Views(small_settings)
    again.fit(model, tokenizer, [TASK], np.random.default_rng(0), file)
    assert_same(method, again)
    assert_same(method, load_method(tmp_path, model, tokenizer))


@EVERY
@pytest.mark.slow
def test_a_fit_says_what_it_cost_and_what_it_tried(kind, tokenizer, small_settings, tmp_path):
    method = kind(small_settings)
    method.fit(
        tiny.model("llama"),
        tokenizer,
        [TASK],
        np.random.default_rng(0),
        tmp_path / "fit.safetensors",
    )
    assert (method.cost["labelled"] > 0) == (kind is not BatchCalibration)
    assert method.cost["seconds"] > 0
    if method.edits_model:  # a probe trains beside it
        assert method.cost["forwards"] > 0
        assert (method.cost["backwards"] > 0) == (method.cost["trained"] > 0)
    assert all(0 <= tried["accuracy"] <= 1 for tried in method.tried)
    again = kind(small_settings)
    again.fit(
        tiny.model("llama"),
        tokenizer,
        [TASK],
        np.random.default_rng(0),
        tmp_path / "fit.safetensors",
    )
    assert (again.cost, again.tried) == (method.cost, method.tried)


def test_a_kept_fit_of_another_configuration_is_refused(tokenizer, small_settings, tmp_path):
    model, file = tiny.model("llama"), tmp_path / "fit.safetensors"
    Refit(small_settings).fit(model, tokenizer, [TASK], np.random.default_rng(0), file)
    with pytest.raises(
        ValueError, match="was learned with n_queries=8, now with n_queries=9: put that back"
    ):
        Refit(replace(small_settings, train_rows=9)).fit(
            model, tokenizer, [TASK], np.random.default_rng(0), file
        )


def test_a_kept_fit_of_another_model_or_other_settings_is_refused(
    tokenizer, small_settings, tmp_path
):
    model, file = tiny.model("llama"), tmp_path / "fit.safetensors"
    TaskVectors(small_settings).fit(model, tokenizer, [TASK], np.random.default_rng(0), file)
    with pytest.raises(
        ValueError,
        match="was learned with demos_per_class=2, now with demos_per_class=1: put that back",
    ):
        TaskVectors(replace(small_settings, demos_per_class=1)).fit(
            model, tokenizer, [TASK], np.random.default_rng(0), file
        )
    with pytest.raises(
        ValueError, match=r"was learned with [0-9a-f]{16}, now with [0-9a-f]{16}: put that back"
    ):
        TaskVectors(small_settings).fit(
            tiny.model("llama", seed=1), tokenizer, [TASK], np.random.default_rng(0), file
        )


def test_the_cost_of_a_method_that_draws_nothing_is_found(tokenizer, small_settings, tmp_path):
    Refit(small_settings).fit(
        tiny.model("llama"),
        tokenizer,
        [TASK],
        np.random.default_rng(0),
        tmp_path / "icr-refit.safetensors",
    )
    (row,) = fit_costs(tmp_path, ["icr", "icr-refit"])
    assert (row["method"], row["fits"]) == ("icr-refit", 1)


def test_a_task_s_name_may_hold_a_slash(tokenizer, small_settings, tmp_path):
    task = Task(replace(TASK.spec, name="glue/toy"), TASK.train, TASK.test, TASK.validation)
    (inner,) = make(["task-vectors"], small_settings)
    inner.fit(
        tiny.model("llama"),
        tokenizer,
        [task],
        np.random.default_rng(0),
        tmp_path / "fit.safetensors",
    )
    inner.on(task)
    assert [file.name for file in tmp_path.iterdir()] == ["fit-glue%2Ftoy.safetensors"]


def test_soft_prompts_start_somewhere_where_a_template_has_no_words(tokenizer, small_settings):
    task = Task(replace(TASK.spec, template="{text}"), TASK.train, TASK.test, TASK.validation)
    PromptTuning(small_settings).fit(
        tiny.model("llama"), tokenizer, [task], np.random.default_rng(0)
    )


@EVERY
def test_a_regime_that_a_method_lacks_is_refused_with_the_reason(kind):
    for regime in ("", ONCE):
        if regime in kind.lacks:
            with pytest.raises(ValueError, match="there is no"):
                make([kind.name + regime], Settings())
        else:
            assert make([kind.name + regime], Settings())[0].name == kind.name + regime


@pytest.mark.parametrize(
    "kind",
    [kind for kind in LEARNING if not kind.name.startswith("icr-")],
    ids=lambda kind: kind.name,
)
@pytest.mark.slow
def test_a_decoder_inside_a_model_of_images_is_changed_or_refused_in_a_sentence(
    kind, tokenizer, small_settings
):
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = tiny.ALL_CONFIGS["gemma3"].to_dict()
    config = Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}
    )
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    plain = scores(model, tokenizer, prompts())
    if issubclass(kind, PromptTuning):  # one attention mask is not what it gets
        with pytest.raises(ValueError, match="one attention mask"):
            fitted(kind, model, tokenizer, small_settings).applied(TASK).__enter__()
    else:
        with fitted(kind, model, tokenizer, small_settings).attached(model, tokenizer, TASK):
            assert scores(model, tokenizer, prompts()).isfinite().all()
    assert torch.equal(scores(model, tokenizer, prompts()), plain)
