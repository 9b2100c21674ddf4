"""Folders that version 0.1 wrote are read as before: a model with its fit, router, method and run.

`tests/from-0.1` was written by commit 5989316 on a tiny model, by `icr fit`, `icr eval` and
`save_method`.
"""

import json
import shutil
from pathlib import Path

import pandas
import pytest
import torch
from _pytest.outcomes import Failed

from icrouting import InContextRouter, load_model, load_task
from icrouting.cli import main
from icrouting.decoder.scoring import score_options
from icrouting.evaluation.evaluate import Evaluation
from icrouting.fitting.training import Trainer
from icrouting.methods.saved import load_method
from icrouting.tasks.catalogue import SPECS

WRITTEN = Path(__file__).parent / "from-0.1"
WHERE = ["--model", "model", "--data", "data"]
FIT = (
    "--encoder hidden --n-prompts 9 --demos-per-class 1 --n-queries 9 --rank 2 --epochs 1 "
    "--tasks sst2 --hidden-width 5 --min-steps 0 --patience 0 --check 0"
)
EVALUATE = (
    "--router router --tasks sst2 mr --sources sst2 --n-test 7 --demos-per-class 1 --seeds 0 "
    "--i2cl-epochs 1 --methods zero-shot few-shot task-vectors-once i2cl icr"
)


# fp32 round-off between machines
CLOSE = 1e-4


def scores_of_0_1(kind):
    """What 0.1 scored on the first four test items: routed, under the method, or plain."""
    return torch.tensor(json.loads((WRITTEN / "scores.json").read_text())[kind])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of what 0.1 wrote, as the working folder; weights are loaded in float32."""
    shutil.copytree(WRITTEN, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    monkeypatch.setattr("icrouting.decoder.loading.default_dtype", lambda: torch.float32)
    return tmp_path / "world"


@pytest.fixture
def nothing_is_computed(monkeypatch):
    """Fails the test if a step is trained or an item answered."""
    monkeypatch.setattr(Trainer, "_update", lambda *args: pytest.fail("trained again"))
    monkeypatch.setattr(Evaluation, "predict", lambda *args: pytest.fail("answered again"))


def test_a_fit_is_taken_up_at_its_end(folder, nothing_is_computed):
    written = (folder / "router" / "model.safetensors").read_bytes()
    (folder / "router" / "config.json").unlink()
    (folder / "router" / "model.safetensors").unlink()
    main.main(["fit", "--out", "router", *WHERE, *FIT.split()])
    assert (folder / "router" / "model.safetensors").read_bytes() == written


def test_a_fit_with_other_settings_takes_up_the_extraction(folder, monkeypatch):
    (folder / "router" / "config.json").unlink()
    monkeypatch.setattr(
        "icrouting.fitting.extraction.capture_last_tokens",
        lambda *args, **kwargs: pytest.fail("extracted again"),
    )
    main.main(["fit", "--out", "router", *WHERE, *FIT.replace("--rank 2", "--rank 3").split()])
    assert InContextRouter.from_pretrained("router").pids.rank == 3


def test_a_fit_that_was_set_aside_is_taken_up_at_its_end(folder, nothing_is_computed):
    router = folder / "router"
    written = (router / "model.safetensors").read_bytes()
    (router / "config.json").unlink()
    with pytest.raises(Failed, match="trained again"):
        main.main(["fit", "--out", "router", *WHERE, *FIT.split(), "--lr", "0.5"])
    assert (router / "fit" / "former-1" / "training.safetensors").exists()
    main.main(["fit", "--out", "router", *WHERE, *FIT.split()])
    assert (router / "model.safetensors").read_bytes() == written


def test_a_router_routes_its_model(folder):
    model, tokenizer = load_model("model", device="cpu")
    task = load_task("sst2", "data")
    prompts = [task.prompt(example) for example in task.test[:4]]
    icr = InContextRouter.from_pretrained("router")
    with icr.attached(model, tokenizer) as routed:
        scores = routed.score(prompts, task.spec.options)
    assert torch.allclose(scores, scores_of_0_1("router"), atol=CLOSE)
    assert not torch.allclose(scores, scores_of_0_1("plain"), atol=CLOSE)


@pytest.mark.parametrize("artifact", ["router", "method"])
def test_rows_are_answered_by_a_task_file_that_says_how_they_read(artifact, folder, capsys):
    sst2 = SPECS["sst2"]
    lines = [
        f"template = {json.dumps(sst2.template)}",
        f"options = {json.dumps(list(sst2.options))}",
        'splits = {train = "none.csv", test = "none.csv"}',
    ]
    (folder / "mine.toml").write_text("\n".join(lines))
    rows = "data/sst2/test.jsonl"
    command = ["predict", artifact, rows, "--out", "a.csv", "--prefix", "p_", "--model", "model"]
    with pytest.raises(SystemExit):
        main.main(command)
    assert "--task my-task.toml" in capsys.readouterr().err
    main.main([*command, "--task", "mine.toml"])
    answers = pandas.read_csv("a.csv")["p_label"][:4]
    places = scores_of_0_1(artifact).argmax(1).tolist()
    assert list(answers) == [sst2.options[place] for place in places]


def test_a_saved_method_is_attached(folder):
    model, tokenizer = load_model("model", device="cpu")
    task = load_task("sst2", "data")
    prompts = [task.prompt(example) for example in task.test[:4]]
    method = load_method("method", model, tokenizer)
    with method.attached(model, tokenizer, task):
        scores = score_options(model, tokenizer, prompts, task.spec.options)
    assert torch.allclose(scores, scores_of_0_1("method"), atol=CLOSE)
    assert not torch.allclose(scores, scores_of_0_1("plain"), atol=CLOSE)


@pytest.mark.slow
def test_a_run_is_taken_up_and_reports_what_it_did(folder, nothing_is_computed, capsys):
    reports = ("report.md", "report.csv", "summary.json")
    written = {name: (folder / "run" / name).read_bytes() for name in reports}
    main.main(["report", "run"])
    assert {name: (folder / "run" / name).read_bytes() for name in reports} == written
    main.main(["eval", "--out", "run", *WHERE, *EVALUATE.split()])
    assert (folder / "run" / "records.jsonl").read_bytes() == (
        WRITTEN / "run" / "records.jsonl"
    ).read_bytes()


def test_a_run_of_other_settings_is_refused(folder, capsys):
    with pytest.raises(SystemExit) as ended:
        other = EVALUATE.replace("--demos-per-class 1", "--demos-per-class 2")
        main.main(["eval", "--out", "run", *WHERE, *other.split()])
    assert ended.value.code == 2
    assert "holds another run (demos_per_class was 1, is 2)" in capsys.readouterr().err
