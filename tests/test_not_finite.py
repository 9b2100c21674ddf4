"""Scores that are NaN or infinite are named, or left out where that is asked for."""

import numpy as np
import pytest
import torch

import tiny
from icrouting.cli import main
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.scoring import score, score_options
from icrouting.evaluation import records
from icrouting.evaluation.evaluate import Evaluation
from icrouting.methods import Settings, make
from icrouting.methods.base import Method
from icrouting.methods.prompting import ZeroShot
from icrouting.methods.task_vectors import sweep
from icrouting.routing.inspection import inspect_prompt
from icrouting.runtime.storage import load_json
from inspected import sharp_router

TASK = tiny.task()
OPTIONS = list(TASK.spec.options)
NAMED = r"NaN or infinity in the option scores of \d+ of \d+ prompts \(one ends .*Sentiment:"
PLAIN = ("zero-shot", "few-shot", "calibration")


def overflowing():
    """A model that overflows in float16 in layer 4, whatever it reads."""
    model = tiny.model("llama")
    model.model.layers[4].mlp.down_proj.weight *= 1e6
    return model.half()


def spoiled(tokenizer):
    """A model that knows one word as NaN, with the test rows that hold it."""
    model = tiny.model("llama")
    token = tokenizer(TASK.prompt(TASK.test[0])).input_ids[4]
    model.get_input_embeddings().weight[token] = torch.nan
    odd_rows = []
    for index, example in enumerate(TASK.test):
        if token in tokenizer(TASK.prompt(example)).input_ids:
            odd_rows.append(index)
    assert 0 < len(odd_rows) < len(TASK.test)
    return model, odd_rows


def run(model, tokenizer, file, name, **wish):
    methods = make([name], Settings(demos_per_class=1))
    evaluation = Evaluation(Decoder.of(model, tokenizer), methods, [TASK], file, **wish)
    evaluation.run([TASK], (0, 1), 50)
    return evaluation, records.read(file)


@pytest.mark.parametrize("name", PLAIN)
def test_a_model_that_overflows_leaves_no_record_and_is_named(name, tokenizer, tmp_path):
    evaluation, found = run(overflowing(), tokenizer, tmp_path / "records.jsonl", name)
    assert not found
    assert "NaN or infinity in the option scores of" in evaluation.refused[name, TASK.name]


def test_items_that_are_not_finite_are_left_out_only_if_asked(tokenizer, tmp_path):
    model, odd_rows = spoiled(tokenizer)
    evaluation, found = run(model, tokenizer, tmp_path / "plain", "zero-shot")
    assert not found
    assert not evaluation.skipped
    assert "or leave such prompts out (skip_nan)" in evaluation.refused["zero-shot", TASK.name]
    evaluation, found = run(model, tokenizer, tmp_path / "skip", "zero-shot", skip_nan=True)
    assert evaluation.skipped == {("zero-shot", TASK.name): set(odd_rows)}
    assert not evaluation.refused
    _, whole = run(tiny.model("llama"), tokenizer, tmp_path / "whole", "zero-shot")
    expected = {record.key: record for record in whole if record.index not in odd_rows}
    assert {record.key for record in found} == expected.keys()
    for record in found:
        assert record.prediction == expected[record.key].prediction
        assert record.option_logits == pytest.approx(expected[record.key].option_logits, abs=1e-4)


def test_a_task_of_which_nothing_is_left_is_refused(tokenizer, tmp_path):
    evaluation, found = run(overflowing(), tokenizer, tmp_path / "r", "zero-shot", skip_nan=True)
    assert not found
    assert evaluation.refused == {("zero-shot", TASK.name): "its scores are finite on no test item"}


def test_what_the_content_free_inputs_give_must_be_finite(tokenizer, tmp_path):
    model = tiny.model("llama")
    token = tokenizer("N/A").input_ids[1]
    assert not any(token in tokenizer(TASK.prompt(row)).input_ids for row in TASK.test)
    model.get_input_embeddings().weight[token] = torch.nan
    evaluation, found = run(model, tokenizer, tmp_path / "r", "calibration", skip_nan=True)
    assert not found
    assert "NaN or infinity" in evaluation.refused["calibration", TASK.name]


class Spoiling(ZeroShot):
    """Adjusts the scores of the first item to something else."""

    name = "spoiling"
    value = torch.nan

    def adjusted(self, task, examples, scores):
        scores = scores.clone()
        scores[0, 1] = self.value
        return scores


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_method_s_own_scores_must_be_finite(value, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(Spoiling, "value", value)
    decoder = Decoder.of(tiny.model("llama"), tokenizer)
    evaluation = Evaluation(decoder, [Spoiling(Settings())], [TASK], tmp_path / "r")
    evaluation.fit(0)
    with pytest.raises(ValueError, match=NAMED):
        evaluation.predict(evaluation.methods[0], TASK, range(4), 0)


def test_a_method_may_rule_an_option_out(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(Spoiling, "value", -torch.inf)
    decoder = Decoder.of(tiny.model("llama"), tokenizer)
    evaluation = Evaluation(decoder, [Spoiling(Settings())], [TASK], tmp_path / "r")
    evaluation.fit(0)
    assert evaluation.predict(evaluation.methods[0], TASK, range(4), 0)[0].prediction == 0


def test_scoring_names_the_prompt_and_leaves_out_none(tokenizer):
    model, odd_rows = spoiled(tokenizer)
    prompts = [TASK.prompt(row) for row in TASK.test]
    with pytest.raises(ValueError, match=f"{NAMED}.*float32 or bfloat16$") as error:
        score_options(model, tokenizer, prompts, OPTIONS)
    assert repr(prompts[odd_rows[0]][-60:]) in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_is_not_finite_spoils_none_beside_it(dtype, tokenizer):
    """Kernels in bfloat16 carry its NaN into others."""
    model, odd_rows = spoiled(tokenizer)
    prompts = [TASK.prompt(row) for row in TASK.test]
    decoder = Decoder.of(model.to(dtype), tokenizer)
    scores = score(decoder, prompts, OPTIONS, finite_only=False)
    assert (~scores.isfinite().all(1)).nonzero()[:, 0].tolist() == odd_rows


def test_options_that_some_prompts_lack_are_no_lack_of_scores(tokenizer):
    prompts = [TASK.prompt(row) for row in TASK.test[:2]]
    ragged = [OPTIONS, [*OPTIONS, "good"]]
    assert score_options(tiny.model("llama"), tokenizer, prompts, ragged)[0, 2] == -torch.inf


def test_a_routed_model_that_overflows_is_named_by_all_that_reads_it(
    tokenizer, encoder_folder, monkeypatch
):
    icr = sharp_router(tiny.model("llama"), tokenizer, encoder_folder, monkeypatch)
    model, odd_rows = spoiled(tokenizer)
    prompt = TASK.prompt(TASK.test[odd_rows[0]])
    monkeypatch.setattr(Decoder, "check_fitted_on", lambda self, *told: None)
    with icr.attached(model, tokenizer) as routed:
        for ask in (
            lambda: routed.score([prompt], OPTIONS),
            lambda: routed.effect([prompt]),
            lambda: inspect_prompt(routed, prompt, OPTIONS),
        ):
            with pytest.raises(ValueError, match="NaN or infinity"):
                ask()


def test_a_setting_that_overflows_is_right_on_no_validation_row(tokenizer):
    model = tiny.model("llama")
    decoder = Decoder.of(model, tokenizer)
    # All rows have the answer that NaN would be taken for.
    items = [(TASK, row) for row in TASK.train if row.label == 0]
    vectors = torch.zeros(5, model.config.hidden_size)
    vectors[2] = torch.nan
    accuracies = sweep(decoder, items, vectors, kept=1.0)
    assert accuracies[2] == 0
    method = ZeroShot(Settings())
    method.fit(model, tokenizer, [TASK], np.random.default_rng(0))
    assert method.validated() > 0
    method.fit(overflowing(), tokenizer, [TASK], np.random.default_rng(0))
    assert method.validated() == 0


class Learner(Method):
    """Learns what is no number."""

    name = "learner"
    learned = ("vector",)

    def learn(self, rng):
        self.vector = torch.tensor([1.0, torch.nan])


def test_what_was_learned_as_nan_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"learner learned NaN \(vector\)"):
        Learner(Settings()).fit(tiny.model("llama"), tokenizer, [TASK], np.random.default_rng(0))


@pytest.fixture
def spoiled_world(world, tokenizer, tmp_path):
    """The world with a word that the model knows as NaN, in some test rows of each task."""
    model = tiny.model("llama")
    (token,) = set(tokenizer(" weak").input_ids[-1:])
    model.get_input_embeddings().weight[token] = torch.nan
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return ["--model", str(tmp_path / "model"), "--data", str(world / "data")]


@pytest.mark.slow
def test_a_run_says_what_it_skipped_and_takes_the_wish_later(spoiled_world, tmp_path, capsys):
    where = [*spoiled_world, "--tasks", "sst2", "mr", "--sources", "sst2", "--n-test", "20"]
    command = ["eval", "--out", str(tmp_path / "run"), *where, "--methods", "zero-shot"]
    with pytest.raises(SystemExit):
        main.main(command)
    said = " ".join(capsys.readouterr().out.split())
    assert "zero-shot does not fit sst2: NaN or infinity in the option scores" in said
    main.main([*command, "--skip-nan"])
    config = load_json(tmp_path / "run" / "config.json")
    n_skipped = {task: n_items for _, task, n_items in config["skipped"]}
    found = records.read(tmp_path / "run" / "records.jsonl")
    for task, n_items in n_skipped.items():
        assert 0 < n_items < 20
        assert sum(record.task == task for record in found) == 3 * (20 - n_items)
        note = f"scores are not finite there: {n_items} test items of {task} (zero-shot)"
        assert note in (tmp_path / "run" / "report.md").read_text()
    assert config["skip_nan"]
