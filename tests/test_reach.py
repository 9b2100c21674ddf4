import json
from types import SimpleNamespace

import pytest
import torch

import tiny
from benchmarks import reach
from benchmarks.reach_parts import few_shot_prompts, scores_of, traced
from benchmarks.reach_summary import padded, records_of
from benchmarks.reach_training import Diagnosed
from icrouting.config import FitConfig
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.partial import late_entry
from icrouting.decoder.scoring import score
from icrouting.fitting import queries as reading
from icrouting.routing.features import features_of

ROWS = ["--rows", "20", "--held", "6", "--items", "7", "--sharing", "5", "--steps", "4"]


@pytest.fixture
def decoder(tokenizer):
    return Decoder.of(tiny.model("qwen2"), tokenizer)


@pytest.fixture
def arguments(tmp_path, tokenizer, encoder_folder):
    tiny.model("llama").save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    files = []
    for name in ("one", "two"):
        for split in ("train", "test"):
            rows = getattr(tiny.task(name), split)
            lines = [json.dumps({"text": row.fields["text"], "label": row.label}) for row in rows]
            (tmp_path / f"{name}-{split}.jsonl").write_text("\n".join(lines))
        spec = (
            'template = "Review: {text}\\nSentiment:"\noptions = ["negative", "positive"]\n'
            f'[splits]\ntrain = "{name}-train.jsonl"\ntest = "{name}-test.jsonl"'
        )
        (tmp_path / f"{name}.toml").write_text(spec)
        files.append(str(tmp_path / f"{name}.toml"))
    places = ["--model", str(tmp_path / "tiny"), "--encoder", str(encoder_folder)]
    return [*places, "--out", str(tmp_path / "out"), "--every", "2", *ROWS, "--tasks", *files]


@pytest.mark.slow
def test_every_variant_is_fitted_once_and_stands_in_the_table(arguments, tmp_path, capsys):
    variants = list(reach.VARIANTS)
    reach.main([*arguments, "--variants", *variants[:5]])
    records = tmp_path / "out" / "records.jsonl"
    # As a kill would leave it, in the midst of what was to come.
    before = records.read_text()
    reach.main([*arguments, "--variants", *variants])
    assert records.read_text().startswith(before)
    lines = records_of(records)
    assert len(lines) == 2 * (2 + len(variants))
    reach.main([*arguments, "--variants", *variants])
    assert records_of(records) == lines
    reach.main([*arguments, "--summary"])
    table = capsys.readouterr().out
    assert all(f"| {name}, stopped |" in table for name in variants)
    reach.main([*arguments, "--prediction"])
    assert "| hidden | mean |" in capsys.readouterr().out


@pytest.mark.slow
def test_before_its_first_step_a_fit_answers_as_the_model_does(arguments, tmp_path):
    reach.main([*arguments, "--variants", "default", "all-layers"])
    lines = records_of(tmp_path / "out" / "records.jsonl")
    for task in ("one", "two"):
        looks = {line["variant"]: line["looks"]["0"] for line in lines if line["task"] == task}
        plain = padded(looks["zero-shot"]["test"])
        for name in ("default", "all-layers"):
            assert abs(padded(looks[name]["test"]) - plain).max() < 1e-3


@pytest.mark.slow
def test_a_folder_of_other_sizes_is_refused(arguments):
    reach.main([*arguments, "--variants"])
    with pytest.raises(ValueError, match="choose another --out"):
        reach.main([*arguments, "--rows", "19"])


def test_scores_from_the_trunk_are_those_of_whole_prompts(decoder, encoder_folder):
    task = tiny.task()
    config = FitConfig(encoder=str(encoder_folder))
    features = features_of(config.encoder, decoder, "cpu")
    examples = [(task, row) for row in task.test]
    read = reading._read(decoder, examples, features, 3, config, None)
    scale = features.scale(read.vectors)
    queries = reading._queries(examples, read, range(len(examples)), scale)
    with late_entry(decoder.model, 3) as entry:
        found = scores_of(queries, decoder, entry)
    whole = score(decoder, [task.prompt(row) for row in task.test], task.spec.options)
    assert torch.allclose(found, whole, atol=1e-4)


def test_traces_hold_the_scores_behind_demonstrations(decoder):
    task = tiny.task()
    _, prompts, _ = few_shot_prompts(decoder, task, [3, 1, 8, 2], [], 2)
    found = traced(decoder, task, prompts, [task.train[place] for place in (3, 1, 8, 2)])
    assert torch.allclose(found["scores"], score(decoder, prompts, task.spec.options), atol=1e-4)
    assert found["query"].shape[:2] == (decoder.dims.n_layers, 4)


def test_no_row_stands_among_its_own_demonstrations(decoder):
    task = tiny.task()
    places = list(range(12))
    _, prompts, _ = few_shot_prompts(decoder, task, places, [], 4)
    for place, prompt in zip(places, prompts, strict=True):
        assert task.question(task.train[place]) not in prompt.context


OFFSET = [1.5, 0.0, 0.0, -1.0]


def loss(prior, offset):
    """The loss of one batch of three rows, whose targets are labels."""
    trainer = object.__new__(Diagnosed)
    trainer.begin({}, torch.eye(3)[[0, 2, 1]], prior, 1)
    logits = torch.tensor([[0.3, 2.0, -1.0, 0.5], [1.0, 0.2, 0.1, 3.0], [0.0, 1.0, 2.0, 0.4]])
    rows = [(0, [3, 0, 1]), (1, [3, 0, 1]), (2, [3, 0, 1])]
    queries = [SimpleNamespace(row=row, option_ids=ids) for row, ids in rows]
    return trainer._cross_entropy(logits + torch.tensor(offset), queries)


def test_a_loss_with_the_mean_taken_away_does_not_see_an_option_prior():
    # On rows with the same options, an offset moves each log-probability as it moves the mean.
    assert loss("taken", [0.0] * 4) == pytest.approx(loss("taken", OFFSET).item(), abs=1e-5)


def test_the_usual_loss_sees_an_option_prior():
    assert abs(loss("kept", [0.0] * 4) - loss("kept", OFFSET)) > 0.01


def test_the_mean_taken_away_is_the_mean_of_the_log_probabilities_of_rows_with_the_option():
    trainer = object.__new__(Diagnosed)
    trainer.begin({}, torch.eye(2), "taken", 1)
    log_probs = torch.tensor([[-1.0, -2.0, -3.0], [-3.0, -4.0, -torch.inf]])
    trainer._follow_mean(log_probs, log_probs.isinf())
    assert trainer.option_prior.tolist() == [-2.0, -3.0, -3.0]
    trainer._follow_mean(log_probs + 1, log_probs.isinf())
    assert trainer.option_prior.tolist() == pytest.approx([-1.97, -2.97, -2.97])


def test_a_free_bias_moves_towards_the_labels_share():
    trainer = object.__new__(Diagnosed)
    trainer.begin({}, torch.eye(2)[[0, 0, 0, 1]], "learned", 1)
    queries = [SimpleNamespace(row=row, option_ids=[0, 1]) for row in range(4)]
    for _ in range(300):
        trainer._cross_entropy(torch.zeros(4, 2), queries)
    share = trainer.option_prior.softmax(0)[0].item()
    assert share == pytest.approx(0.75, abs=1e-3)


def test_traces_of_many_prompts_are_those_of_each_alone_in_their_order(decoder):
    task = tiny.task()
    places = [3, 1, 8, 2, 11, 5, 14, 0, 9, 7, 6]
    rows = [task.train[place] for place in places]
    _, prompts, _ = few_shot_prompts(decoder, task, places, [], 6)
    found = traced(decoder, task, prompts, rows)
    for place, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        alone = traced(decoder, task, [prompt], [row])
        for side in ("query", "key"):
            assert torch.allclose(found[side][:, place], alone[side][:, 0], atol=1e-4)
