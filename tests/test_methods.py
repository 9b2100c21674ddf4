"""What the methods promise, over the family table (the laws of their papers' readers)."""

from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import FalconH1Config

import tiny
from fitted import fit_method
from icrouting.decoder.answering import answering
from icrouting.decoder.batches import pad, tokenize
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import CACHE, FAMILIES, branches_of, layers_of
from icrouting.decoder.hooks import added, edited, recorded
from icrouting.decoder.passes import next_token_logits
from icrouting.decoder.scoring import option_ids, score, score_options
from icrouting.decoder.states import last_of, last_token_variants
from icrouting.evaluation import records
from icrouting.evaluation.evaluate import Evaluation
from icrouting.methods import Settings, make
from icrouting.methods.i2cl import I2CL
from icrouting.methods.lora import LoraBlock
from icrouting.methods.task_vectors import TaskVectors, sweep
from icrouting.tasks.prompts import Prompt
from icrouting.tasks.task import Example, Task, TaskSpec

TASK, OTHER = tiny.task("toy", n_test=30), tiny.task("other", n_test=30)
LAW_FAMILIES = ("llama", "qwen3", "gemma3", "gpt_neox")


def prompts_of(task, n=7):
    # of mixed lengths
    return [
        task.prompt(example) + "." * (3 * i % 7) + ":" for i, example in enumerate(task.test[:n])
    ]


def fitted(kind, model, tokenizer, tasks=(TASK,), **changes):
    method = kind(Settings(**{"demos_per_class": 2, "i2cl_epochs": 1, "tries": 1, **changes}))
    return fit_method(method, model, tokenizer, tasks)


def scores_under(method, model, tokenizer, prompts, task=TASK):
    method.decoder = Decoder.of(model, tokenizer)
    wrapped = [Prompt("", prompt) for prompt in prompts]
    with method.applied(task):
        return score_options(model, tokenizer, wrapped, task.spec.options)


def batch_of(tokenizer, prompts):
    return pad(tokenize(tokenizer, prompts), 1)


@pytest.mark.parametrize("family", tiny.ALL_CONFIGS)
def test_branches_are_what_is_added_to_the_residual_stream(family, tokenizer):
    """A layer's output less its input is the sum of its branches, up to a family's own factor."""
    model, batch = (
        tiny.model(family, "eager" if family == "gemma2" else "sdpa"),
        batch_of(tokenizer, prompts_of(TASK)),
    )
    layer = layers_of(model)[2]
    entered = []
    handle = layer.register_forward_pre_hook(
        lambda module, args, kwargs: entered.append((args or (kwargs["hidden_states"],))[0]),
        with_kwargs=True,
    )
    with recorded([layer, *branches_of(model, 2)]) as outputs, torch.no_grad():
        next_token_logits(model, batch)
    handle.remove()
    factor = getattr(model.config, "residual_multiplier", 1.0)
    left, attention, mlp = (output.reshape(entered[0].shape) for output in outputs)
    assert torch.allclose(left - entered[0], factor * (attention + mlp), atol=1e-5)


@pytest.mark.parametrize("family", LAW_FAMILIES)
def test_a_task_vector_that_is_the_prompts_own_state_changes_nothing(family, tokenizer):
    model, prompt = (
        tiny.model(family, "eager" if family == "gemma2" else "sdpa"),
        TASK.prompt(TASK.test[0]),
    )
    method, batch = TaskVectors(Settings()), batch_of(tokenizer, [prompt])
    method.decoder = Decoder.of(model, tokenizer)
    with recorded(list(layers_of(model))) as outputs, torch.no_grad():
        plain = next_token_logits(model, batch)
        own = torch.stack([output[0, -1] for output in outputs])
    method.vectors = own
    for layer in range(len(own)):
        method.accuracies = torch.eye(len(own))[layer]
        with method.applied(TASK), torch.no_grad():
            assert torch.allclose(next_token_logits(model, batch), plain, atol=1e-6)
    # any other vector changes the logits: the hook is no silent no-op
    method.vectors = own.flip(-1)
    with method.applied(TASK), torch.no_grad():
        assert not torch.allclose(next_token_logits(model, batch), plain, atol=1e-3)


@pytest.mark.parametrize("family", tiny.ALL_CONFIGS)
@pytest.mark.slow
def test_the_cached_sweep_equals_the_naive_one(family, tokenizer):
    model, method = (
        tiny.model(family, "eager" if family == "gemma2" else "sdpa"),
        TaskVectors(Settings()),
    )
    items = [(TASK, example) for example in TASK.train[:11]]
    generator = torch.Generator().manual_seed(5)
    n_layers, width = len(layers_of(model)), model.config.hidden_size
    method.vectors = torch.randn(n_layers, width, generator=generator)
    naive = torch.zeros(n_layers)
    for layer in range(n_layers):
        method.accuracies = torch.eye(n_layers)[layer]
        for task, example in items:
            scores = scores_under(method, model, tokenizer, [task.prompt(example)])
            naive[layer] += int(scores[0].argmax()) == example.label
    assert torch.equal(
        sweep(Decoder.of(model, tokenizer), items, method.vectors), naive / len(items)
    )


def test_the_cached_sweep_takes_a_prompt_of_one_token(tokenizer):
    model, n_layers = tiny.model("llama"), 5
    spec = TaskSpec("one", "far", "{text}", TASK.spec.options)
    task, example = Task(spec, TASK.train, TASK.test), Example({"text": ":"}, (), 0)
    assert len(tokenizer(task.prompt(example)).input_ids) == 1
    vectors = torch.randn(
        n_layers, model.config.hidden_size, generator=torch.Generator().manual_seed(5)
    )
    method, naive = TaskVectors(Settings()), []
    method.vectors = vectors
    for layer in range(n_layers):
        method.accuracies = torch.eye(n_layers)[layer]
        naive.append(int(scores_under(method, model, tokenizer, [":"], task)[0].argmax()) == 0)
    assert sweep(Decoder.of(model, tokenizer), [(task, example)], vectors).tolist() == naive


def test_a_cache_that_holds_more_than_keys_and_values_is_never_swept_wrongly():
    """Falcon-H1's other half is a recurrent state.

    It would run through variants that stand side by side.
    """
    sizes = {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    }
    model = tiny.sharp(FalconH1Config(**tiny.SIZES, **sizes, mamba_chunk_size=4))
    ids = torch.arange(5, 16)[None]

    def edit(these, place, states):  # what each variant is, in this test, is the same
        return states

    plain = model(ids).logits[0, -1]
    with suppress(RuntimeError):  # transformers cannot repeat its cache for a row each
        for logits in last_token_variants(model, ids[0].tolist(), 3, list(layers_of(model)), edit):
            assert torch.allclose(logits, plain.expand_as(logits), atol=1e-4)


def test_the_layer_is_the_best_on_validation_and_the_earliest_of_equals():
    method = TaskVectors(Settings())
    method.accuracies = torch.tensor([0.1, 0.7, 0.3, 0.7])
    assert method.layer == 1


def test_the_state_stands_at_the_prompt_s_last_token_and_at_no_generated_one(tokenizer):
    model = tiny.model("llama")
    method = fitted(TaskVectors, model, tokenizer)
    block, given = (
        layers_of(model)[method.layer],
        tokenizer([prompts_of(TASK)[0]], return_tensors="pt"),
    )
    seen = []
    with (
        method.applied(TASK),
        block.register_forward_hook(lambda *args: seen.append(args[-1][0, -1])),
    ):
        model.generate(**given, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    vector = method.vectors[method.layer]
    assert [torch.equal(state, vector) for state in seen] == [True, False, False]


def test_task_vectors_are_mean_states_of_few_shot_prompts(tokenizer, monkeypatch):
    from icrouting.methods import task_vectors

    asked, few_shot = [], task_vectors.few_shot
    monkeypatch.setattr(
        task_vectors, "few_shot", lambda *args: asked.append(few_shot(*args)) or asked[-1]
    )
    model = tiny.model("llama")
    method = fitted(TaskVectors, model, tokenizer)
    assert len(asked) == 2
    assert asked[0].context == asked[1].context
    assert asked[0].query != asked[1].query
    assert not any(prompt.query in prompt.context for prompt in asked)
    states = []
    for prompt in asked:
        with recorded(list(layers_of(model))) as outputs, torch.no_grad():
            model(**tokenizer(prompt.text, return_tensors="pt"))
        states.append(torch.stack([output[0, -1] for output in outputs]))
    assert torch.allclose(method.vectors, (states[0] + states[1]) / 2, atol=1e-5)
    assert method.n_cached(TASK) == model.config.hidden_size


@pytest.mark.parametrize("family", tiny.ALL_CONFIGS)
def test_i2cl_at_lambda_zero_and_beta_one_changes_nothing_and_else_something(family, tokenizer):
    model = tiny.model(family, "eager" if family == "gemma2" else "sdpa")
    prompts = prompts_of(TASK)
    plain = score_options(model, tokenizer, prompts, TASK.spec.options)
    method = fitted(I2CL, model, tokenizer)
    trained = scores_under(method, model, tokenizer, prompts)
    assert not torch.allclose(trained, plain, atol=1e-4)
    method.scalars = torch.tensor([0.0, 1.0]).repeat(len(method.scalars), 1)
    assert torch.equal(scores_under(method, model, tokenizer, prompts), plain)
    assert torch.equal(score_options(model, tokenizer, prompts, TASK.spec.options), plain)


@pytest.mark.parametrize("kind", [TaskVectors, I2CL])
@pytest.mark.parametrize("family", LAW_FAMILIES)
def test_a_batch_of_mixed_lengths_scores_like_single_prompts(kind, family, tokenizer):
    model, prompts = tiny.model(family, "eager" if family == "gemma2" else "sdpa"), prompts_of(TASK)
    method = fitted(kind, model, tokenizer)
    together = scores_under(method, model, tokenizer, prompts)
    alone = torch.cat([scores_under(method, model, tokenizer, [prompt]) for prompt in prompts])
    assert torch.allclose(together, alone, atol=1e-4)
    padded = tokenizer(prompts, return_tensors="pt", padding=True)  # on the left
    positions = (padded.attention_mask.cumsum(1) - 1).clamp(min=0)
    with method.applied(TASK), torch.no_grad():
        logits = model(**padded, position_ids=positions).logits[:, -1]
    ids = torch.tensor([option_ids(tokenizer, prompt, TASK.spec.options) for prompt in prompts])
    assert torch.allclose(logits.gather(1, ids), together, atol=1e-4)


@pytest.mark.parametrize("kind", [TaskVectors, I2CL])
def test_a_fit_comes_back_from_its_tensors(kind, tokenizer):
    model, prompts = tiny.model("llama"), prompts_of(TASK)
    method, again = fitted(kind, model, tokenizer), kind(Settings())
    again.restore({name: tensor.clone() for name, tensor in method.tensors().items()})
    assert torch.equal(
        scores_under(again, model, tokenizer, prompts),
        scores_under(method, model, tokenizer, prompts),
    )


@pytest.mark.parametrize("kind", [TaskVectors, I2CL, LoraBlock])
@pytest.mark.slow
def test_a_fit_is_taken_up_by_another_method_of_its_kind(kind, tokenizer):
    if kind is LoraBlock:
        pytest.importorskip("peft")
    model, prompts = tiny.model("llama"), prompts_of(TASK)
    method, again = fitted(kind, model, tokenizer, tries=2), kind(Settings())
    again.take(method.in_force(), method.decoder, [TASK])
    assert torch.equal(
        scores_under(again, model, tokenizer, prompts),
        scores_under(method, model, tokenizer, prompts),
    )
    assert (again.tried, again.cost) == (method.tried, method.cost)


def test_a_fit_of_one_seed_is_left_as_it_was_by_the_next(tokenizer):
    model = tiny.model("llama")
    method = fitted(I2CL, model, tokenizer, tries=2)
    first = method.in_force()
    tensors, tried = dict(first.tensors), list(first.tried)
    method.fit(model, tokenizer, [TASK], np.random.default_rng(1))
    assert (first.tensors, first.tried) == (tensors, tried)
    assert not torch.equal(method.tensors()["vectors"], tensors["vectors"])


def test_attached_to_the_same_weights_in_another_object_a_method_stays_where_it_was(tokenizer):
    model, other = tiny.model("llama"), tiny.model("llama")
    prompts = prompts_of(TASK)
    method = fitted(TaskVectors, model, tokenizer)
    decoder, expected = method.decoder, scores_under(method, model, tokenizer, prompts)
    method.decoder = decoder
    with method.attached(other, tokenizer, TASK) as moved:
        assert moved.model is other
        found = score_options(other, tokenizer, prompts, TASK.spec.options)
    assert torch.allclose(found, expected, atol=1e-5)
    assert moved is not method
    assert method.decoder is decoder


def test_context_vectors_are_means_at_the_newline_of_each_demonstration(tokenizer, monkeypatch):
    from icrouting.methods import i2cl

    shown = []
    demonstration = i2cl.demonstration
    monkeypatch.setattr(
        i2cl, "demonstration", lambda *args: shown.append(demonstration(*args)) or shown[-1]
    )
    model = tiny.model("gemma3")
    method = fitted(I2CL, model, tokenizer)
    assert len(shown) == 4
    assert all(text.endswith("\n") for text in shown)
    branches = [branch for layer in range(5) for branch in branches_of(model, layer)]
    found = []
    for text in shown:
        with recorded(branches) as outputs, torch.no_grad():
            model(**tokenizer(text, return_tensors="pt"))
        found.append(torch.stack([output[0, -1] for output in outputs]))
    assert torch.allclose(method.vectors, torch.stack(found).mean(0), atol=1e-5)


@pytest.mark.slow
def test_i2cl_trains_every_scalar_and_no_weight_of_the_model(tokenizer):
    model = tiny.model("llama")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    method = fitted(I2CL, model, tokenizer, i2cl_epochs=20)
    assert len(method.losses) == 20 * 2
    assert method.losses[-8:].mean() < method.losses[:8].mean()
    assert ((method.scalars - torch.tensor([0.1, 1.0])).abs() > 1e-4).all()
    assert all(
        parameter.grad is None and parameter.requires_grad for parameter in model.parameters()
    )
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert method.n_cached(TASK) == 2 * 5 * 42 + 4 * 5


def test_i2cl_keeps_the_best_of_four_settings_and_tries_the_published_one_first(tokenizer):
    method = fitted(I2CL, tiny.model("llama"), tokenizer, tries=12)
    assert [tried | {"accuracy": 0} for tried in method.tried] == [
        {"lr": lr, "noise": noise, "accuracy": 0} for lr in (0.01, 0.003) for noise in (0.001, 0.0)
    ]
    assert method.validated() == max(tried["accuracy"] for tried in method.tried)
    assert method.n_labelled == 4 + len(TASK.validation)
    published = fitted(I2CL, tiny.model("llama"), tokenizer)
    assert (published.tried, published.n_labelled) == ([], 4)


def test_i2cl_works_with_one_demonstration(tokenizer):
    one = Task(TASK.spec, TASK.train[:1], TASK.test)
    method = fitted(I2CL, tiny.model("llama"), tokenizer, [one], tries=12)
    assert not method.tried, "nothing to choose on"
    assert torch.isfinite(method.scalars).all()


def test_the_noise_of_i2cl_is_in_training_only_and_of_the_published_size(tokenizer):
    model = tiny.model("llama")
    prompts = prompts_of(TASK)
    method = fitted(I2CL, model, tokenizer)
    assert torch.equal(
        scores_under(method, model, tokenizer, prompts),
        scores_under(method, model, tokenizer, prompts),
    )
    (branch, _) = branches_of(model, 0)
    batch = batch_of(tokenizer, prompts)
    outputs = []
    for noise in (0.0, 1e-3):
        draws = torch.Generator().manual_seed(3)
        with (
            method._edited(method.scalars, noise, draws),
            recorded([branch]) as found,
            torch.no_grad(),
        ):
            next_token_logits(model, batch)
        outputs.append(found[0])
    size = (outputs[1] - outputs[0]).norm(dim=-1) / outputs[0].norm(dim=-1)
    assert 0.8 < float(size.mean()) / (0.001 * 42**0.5) < 1.2


@pytest.mark.slow
def test_the_learning_rate_warms_up_from_nothing_and_ends_at_nothing(tokenizer, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step

    def note(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", note)
    fitted(I2CL, tiny.model("llama"), tokenizer, i2cl_epochs=40)
    assert len(rates) == 80
    assert rates[:5] == pytest.approx([0, 0.0025, 0.005, 0.0075, 0.01])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[42] == pytest.approx(0.005)
    assert rates[-1] < 1e-4


def test_calibration_divides_by_the_probabilities_on_content_free_inputs(tokenizer, tmp_path):
    model = tiny.model("llama")
    zero, calibrated = make(["zero-shot", "calibration"], Settings())
    evaluation = Evaluation(
        Decoder.of(model, tokenizer), [zero, calibrated], [OTHER], tmp_path / "none"
    )
    evaluation.fit(0)
    plain, found = (evaluation.predict(method, TASK, range(8), 0) for method in (zero, calibrated))
    shares = []
    for text in ("N/A", "[MASK]", ""):
        prompt = f"Review: {text}\nSentiment:"
        ids = option_ids(tokenizer, prompt, TASK.spec.options)
        with torch.no_grad():
            shares.append(
                model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1, ids].softmax(-1)
            )
    for before, after in zip(plain, found, strict=True):
        expected = torch.tensor(before.option_logits).softmax(-1) / torch.stack(shares).mean(0)
        got = torch.tensor(after.option_logits).exp()
        assert torch.allclose(got / got.sum(), expected / expected.sum(), atol=1e-4)
        assert after.prediction == int(expected.argmax())
    assert [record.prediction for record in plain] != [record.prediction for record in found]


def test_calibration_leaves_no_space_where_a_template_ends_in_an_empty_field(tokenizer, tmp_path):
    spec = TaskSpec("bare", "far", "Review: {text}", TASK.spec.options)
    task = Task(spec, TASK.train, TASK.test)
    (calibration,) = make(["calibration"], Settings())
    decoder = Decoder.of(tiny.model("llama"), tokenizer)
    evaluation = Evaluation(decoder, [calibration], [task], tmp_path / "none")
    evaluation.fit(0)
    evaluation.predict(calibration, task, range(2), 0)
    prompts = ["Review: N/A", "Review: [MASK]", "Review:"]
    shares = score(decoder, prompts, spec.options).softmax(-1)
    assert torch.equal(calibration._level(task, task.test[0]), shares.mean(0).log())


def test_the_untouched_model_reads_equal_prompts_once(tokenizer, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "icrouting.evaluation.predictor.score",
        lambda *a, **k: calls.append(1) or score(*a, **k),
    )
    methods = make(["zero-shot", "calibration"], Settings())
    evaluation = Evaluation(
        Decoder.of(tiny.model("llama"), tokenizer), methods, [TASK], tmp_path / "r"
    )
    evaluation.run([TASK, OTHER], (0,), 13)
    assert len(calls) == 2


def test_equal_prompts_with_other_options_are_read_anew(tokenizer, tmp_path):
    spec = TaskSpec("toy2", "far", TASK.spec.template, ("dull", "joy", "ball"))
    other = Task(spec, TASK.train, TASK.test, TASK.validation)
    evaluation = Evaluation(
        Decoder.of(tiny.model("llama"), tokenizer),
        make(["zero-shot"], Settings()),
        [TASK],
        tmp_path / "r",
    )
    evaluation.run([TASK, other], (0,), 30)  # all items, so that both tasks ask the same prompts
    found = {record.key: record for record in records.read(tmp_path / "r")}
    (alone,) = make(["zero-shot"], Settings())
    for record in Evaluation(
        Decoder.of(tiny.model("llama"), tokenizer), [alone], [], tmp_path / "n"
    ).predict(alone, other, [3], 0):
        assert len(record.option_logits) == 3
    assert {len(r.option_logits) for r in found.values() if r.task == "toy2"} == {3}


def test_task_vectors_without_a_validation_slice_say_so(tokenizer):
    bare = Task(TASK.spec, TASK.train, TASK.test)
    with pytest.raises(ValueError, match="validation rows: give 5 training rows or more"):
        fitted(TaskVectors, tiny.model("llama"), tokenizer, [bare])


@pytest.mark.parametrize("kind", [TaskVectors, I2CL])
def test_demonstrations_longer_than_the_models_context_are_refused(kind, tokenizer):
    model = tiny.model("gpt2")
    model.config.max_position_embeddings = model.config.n_positions = 20
    with pytest.raises(ValueError, match="longer than the model's context of 20"):
        fitted(kind, model, tokenizer)


def test_branches_of_a_family_without_a_row_are_refused(tokenizer, monkeypatch):
    monkeypatch.delitem(FAMILIES, "llama")
    with pytest.raises(ValueError, match="the branches of 'llama' models are not known: add a row"):
        fitted(I2CL, tiny.model("llama"), tokenizer)


def test_multi_task_prompts_hold_source_rows_only_and_are_one_for_all_tasks(tokenizer):
    method = make(["multi-task-few-shot"], Settings(demos_per_source=2))[0]
    unseen = tiny.task("unseen", n_test=30)
    method.fit(tiny.model("llama"), tokenizer, [TASK, OTHER], np.random.default_rng(0))
    contexts = {
        method.prompt(task, example).context for task in (TASK, unseen) for example in task.test[:3]
    }
    (context,) = contexts
    shown = context.strip().split("\nReview: ")
    known = {
        f"{e.fields['text']}\nSentiment: {t.answer(e)}" for t in (TASK, OTHER) for e in t.train
    }
    assert len(shown) == 4
    assert {text.removeprefix("Review: ") for text in shown} <= known


def test_a_kept_context_gives_the_scores_of_whole_prompts(tokenizer, tmp_path):
    methods = make(["zero-shot", "few-shot"], Settings(demos_per_class=2))
    evaluation = Evaluation(
        Decoder.of(tiny.model("llama"), tokenizer), methods, [TASK], tmp_path / "none"
    )
    evaluation.fit(0)
    kept = [evaluation.predict(methods[1], TASK, items, 0) for items in ([0, 1, 2], [3], [4, 5])]
    whole = score_options(
        tiny.model("llama"),
        tokenizer,
        [methods[1].prompt(TASK, e).text for e in TASK.test[:6]],
        TASK.spec.options,
    )
    found = torch.tensor([record.option_logits for records in kept for record in records])
    assert torch.allclose(found, whole, atol=1e-5)
    assert len(evaluation._predictor._kept_contexts["few-shot"][1]) == 1


def test_the_two_regimes_learn_from_the_task_itself_or_from_the_sources(tokenizer, tmp_path):
    inner, pooled = make(["task-vectors", "task-vectors-once"], Settings(demos_per_class=2))
    model = tiny.model("llama")
    evaluation = Evaluation(
        Decoder.of(model, tokenizer), [inner, pooled], [TASK], tmp_path / "none"
    )
    evaluation.fit(0)
    evaluation.predict(inner, OTHER, [0], 0)
    assert inner.on(OTHER).sources == [OTHER]
    assert pooled.sources == [TASK]
    assert (inner.name, pooled.name) == ("task-vectors", "task-vectors-once")


def test_last_tokens_are_found_under_both_paddings_and_behind_a_cache(tokenizer):
    model = tiny.model("llama")
    for mask, q_len, expected in (
        ([[1, 1, 0], [1, 1, 1]], 3, [1, 2]),
        ([[0, 0, 1], [0, 1, 1]], 3, [2, 2]),
        ([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], 2, [0, 1]),
    ):
        ids, seen = torch.full((2, q_len), 5), []
        with (
            answering(model, in_steps=False) as now,
            edited(
                [layers_of(model)[0]],
                lambda _, h, seen=seen, now=now: seen.append(now.positions) or h,
            ),
        ):
            cache = None
            if len(mask[0]) > q_len:
                n_before = len(mask[0]) - q_len
                cache = model(input_ids=torch.full((2, n_before), 5), use_cache=True)[CACHE]
            model(input_ids=ids, attention_mask=torch.tensor(mask), **{CACHE: cache})
        assert seen[-1].tolist() == expected
    assert last_of(torch.arange(12.0).reshape(2, 3, 2), torch.tensor([1, 2])).tolist() == [
        [2, 3],
        [10, 11],
    ]


def test_edits_leave_no_hook_behind_after_an_exception():
    model = tiny.model("llama")
    with (
        pytest.raises(RuntimeError),
        recorded(list(layers_of(model))),
        answering(model, in_steps=True),
    ):
        raise RuntimeError
    assert "generate" not in vars(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_vectors_are_added_in_float32_and_rounded_once():
    states, vectors = torch.full((2, 3), 256.0).bfloat16(), torch.tensor([1.001, 1.0, 3.0])
    found = added(
        states, vectors
    )  # bfloat16 steps by 2 there: 257.001 is nearer to 258, where a rounded 1 ties to 256
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [[258.0, 256.0, 260.0]] * 2
    assert added(states, vectors.expand(2, 3)).equal(found)


def flipped(task):
    """The same task, whose rows bear the other label each."""
    turned = replace(task, train=tuple(replace(row, label=1 - row.label) for row in task.train))
    validation = tuple(replace(row, label=1 - row.label) for row in task.validation)
    return replace(turned, validation=validation)


def test_two_tasks_of_one_name_have_a_fit_each(tokenizer, tmp_path):
    turned = flipped(TASK)
    (method,) = make(["probe-hidden"], Settings(tries=1))
    model = tiny.model("llama")
    method.fit(model, tokenizer, [], np.random.default_rng(0), tmp_path / "fit.safetensors")
    assert method.on(TASK).sources == [TASK]
    assert method.on(turned).sources == [turned]
    # Of rows to test on, nothing is learned.
    assert method.on(replace(TASK, test=())) is method.on(TASK)
    (later,) = make(["probe-hidden"], Settings(tries=1))
    later.fit(model, tokenizer, [], np.random.default_rng(0), tmp_path / "fit.safetensors")
    with pytest.raises(ValueError, match="rows="):
        later.on(turned)


def test_two_tasks_of_one_name_have_demonstrations_each(tokenizer):
    (method,) = make(["few-shot"], Settings(demos_per_class=1))
    method.fit(tiny.model("llama"), tokenizer, [], np.random.default_rng(0))
    prompts = [method.prompt(task, TASK.test[0]).text for task in (TASK, flipped(TASK))]
    assert prompts[0] != prompts[1]


def test_two_templates_of_one_name_are_calibrated_each(tokenizer):
    other = replace(TASK, spec=replace(TASK.spec, template="{text}\nIs it any good?"))
    levels = []
    for tasks in ([TASK, other], [other]):
        (calibration,) = make(["calibration"], Settings())
        calibration.fit(tiny.model("llama"), tokenizer, [], np.random.default_rng(0))
        levels.append([calibration._level(task, TASK.test[0]) for task in tasks])
    assert torch.equal(levels[0][1], levels[1][0])
