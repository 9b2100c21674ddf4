import copy
import dataclasses
import errno
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock

import tiny
from fitted import strict
from icrouting.cli import main
from icrouting.decoder.backbone import Backbone
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import layers_of
from icrouting.decoder.hooks import edited
from icrouting.evaluation import evaluate, records, runs
from icrouting.evaluation.config import EvalConfig
from icrouting.evaluation.evaluate import Evaluation
from icrouting.evaluation.folder import RunFolder
from icrouting.evaluation.items import draw_items
from icrouting.evaluation.outcome import outcome_of
from icrouting.evaluation.timing import time_ratios
from icrouting.methods import METHODS, Settings, make
from icrouting.methods.prompting import ZeroShot
from icrouting.methods.regimes import regimes
from icrouting.runtime.storage import load_json, save_json
from icrouting.tasks.catalogue import SPECS
from icrouting.tasks.prompts import Prompt
from icrouting.tasks.task import Task

TASKS = [tiny.task("toy", n_test=30), tiny.task("other", n_test=30)]


@pytest.fixture
def methods():
    return make(["zero-shot", "few-shot"], Settings(demos_per_class=2))


def run(methods, file, tokenizer, seeds=(0, 1), fits=None):
    Evaluation(Decoder.of(tiny.model("llama"), tokenizer), methods, TASKS[:1], file, fits).run(
        TASKS, seeds, 13
    )
    return sorted(records.read(file), key=lambda r: r.key)


def without_times(found):
    return [(r.key, r.label, r.prediction, r.option_logits, r.n_tokens) for r in found]


def test_every_method_task_seed_and_item_has_one_record(methods, tmp_path, tokenizer):
    found = run(methods, tmp_path / "records.jsonl", tokenizer)
    assert len({r.key for r in found}) == len(found) == 2 * 2 * 2 * 13
    for record in found:
        task = next(task for task in TASKS if task.name == record.task)
        assert record.label == task.test[record.index].label
        assert record.prediction == int(np.argmax(record.option_logits))


@pytest.mark.slow
def test_a_run_cut_anywhere_goes_on_to_the_same_records(methods, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("icrouting.evaluation.evaluate.CHUNK", 4)
    whole_file = tmp_path / "whole.jsonl"
    whole, content = without_times(run(methods, whole_file, tokenizer)), whole_file.read_bytes()
    for share in (0.0, 0.3, 0.61, 0.99):
        file = tmp_path / "cut.jsonl"
        file.write_bytes(content[: int(share * len(content))])
        again = without_times(
            run(make(["zero-shot", "few-shot"], Settings(demos_per_class=2)), file, tokenizer)
        )
        assert [row[:3] for row in again] == [row[:3] for row in whole]
        for (*_, got, n_got), (*_, expected, n_expected) in zip(again, whole, strict=True):
            assert np.allclose(got, expected, atol=1e-4)
            assert n_got == n_expected


def test_a_finished_run_computes_nothing(methods, tmp_path, tokenizer, monkeypatch):
    file = tmp_path / "records.jsonl"
    run(methods, file, tokenizer)
    monkeypatch.setattr(Evaluation, "predict", lambda *args: pytest.fail("computed again"))
    run(methods, file, tokenizer)


def test_all_methods_see_the_same_seeded_items():
    task = TASKS[0]
    assert draw_items(task, 13) == draw_items(task, 13)
    assert len(set(draw_items(task, 13))) == 13
    assert set(draw_items(task, 7)) < set(draw_items(task, 13)), (
        "a larger run asks what a smaller one asked"
    )
    assert draw_items(task, 999) == list(range(30))
    assert draw_items(task, 13) != draw_items(tiny.task("other", n_test=30), 13)


def test_few_shot_demonstrations_do_not_depend_on_the_other_methods(tokenizer, tmp_path):
    contexts = []
    for names in (["few-shot"], ["zero-shot", "few-shot"]):
        methods = make(names, Settings(demos_per_class=2))
        Evaluation(
            Decoder.of(tiny.model("llama"), tokenizer), methods, TASKS, tmp_path / "none"
        ).fit(0)
        contexts.append(methods[-1].prompt(TASKS[0], TASKS[0].test[0]).context)
    assert contexts[0] == contexts[1]


def test_few_shot_demonstrations_do_not_depend_on_the_order_of_tasks(tokenizer):
    model, prompts = tiny.model("llama"), []
    for order in (TASKS, TASKS[::-1]):
        (few_shot,) = make(["few-shot"], Settings(demos_per_class=2))
        few_shot.fit(model, tokenizer, TASKS, np.random.default_rng(0))
        prompts.append({task.name: few_shot.prompt(task, task.test[0]).text for task in order})
    assert prompts[0] == prompts[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_leaves_the_model_as_found(name, tokenizer, tmp_path, encoder_folder):
    from icrouting.config import FitConfig
    from icrouting.icr import InContextRouter

    model, task = tiny.model("llama"), TASKS[0]
    config = FitConfig(
        n_prompts=9,
        demos_per_class=1,
        encoder=str(encoder_folder),
        n_queries=9,
        rank=2,
        epochs=1,
        min_steps=0,
        patience=0,
    )
    strict(InContextRouter.fit(model, tokenizer, [task], config)).save_pretrained(tmp_path)
    inputs = tokenizer(
        [task.prompt(example) for example in task.test], return_tensors="pt", padding=True
    )
    plain = model(**inputs).logits
    small = {"demos_per_class": 1, "i2cl_epochs": 2, "tries": 2, "train_rows": 8, "train_epochs": 1}
    settings = Settings(**small, router=str(tmp_path), encoder=str(encoder_folder))
    (method,) = make([name], settings)
    evaluation = Evaluation(Decoder.of(model, tokenizer), [method], [task], tmp_path / "none")
    evaluation.fit(0)
    first = evaluation.predict(method, task, [0, 1, 2], 0)
    assert without_times(evaluation.predict(method, task, [0, 1, 2], 0)) == without_times(first)
    assert method.on(task).n_cached(task) >= 0
    assert torch.equal(model(**inputs).logits, plain)


def test_a_method_that_cannot_learn_leaves_the_others_their_run(tokenizer, tmp_path):
    bare = [
        Task(task.spec, task.train, task.test) for task in TASKS
    ]  # nothing to choose a layer on
    methods = make(["zero-shot", "task-vectors-once", "task-vectors"], Settings(demos_per_class=1))
    evaluation = Evaluation(
        Decoder.of(tiny.model("llama"), tokenizer), methods, bare, tmp_path / "r"
    )
    evaluation.run(bare, (0,), 5)
    assert {record.method for record in records.read(tmp_path / "r")} == {"zero-shot"}
    assert evaluation.refused.keys() == {
        (name, task.name) for name in ("task-vectors", "task-vectors-once") for task in bare
    }
    assert all(
        "validation rows: give 5 training rows or more" in said
        for said in evaluation.refused.values()
    )


def test_the_help_names_every_method():
    named = re.findall(r"[\w-]+", main.evaluate.__doc__)
    assert {name.removesuffix("-once") for name in METHODS} <= set(named)


def test_an_unknown_method_brings_near_matches():
    with pytest.raises(ValueError, match="unknown method 'few-shots': did you mean few-shot"):
        make(["few-shots"], Settings())


def test_times_are_ratios_to_the_first_method(methods, tokenizer, tmp_path):
    model = tiny.model("llama")
    decoder = Decoder.of(model, tokenizer)
    Evaluation(decoder, methods, TASKS, tmp_path / "none").fit(0)
    plain, kept = time_ratios(decoder, methods, TASKS[0], n_items=3, n_rounds=3)
    assert [plain["method"], kept["method"]] == ["few-shot", "few-shot, context kept"]
    assert all(0 < row["low"] <= row["ratio"] <= row["high"] for row in (plain, kept))
    assert plain["n_cached"] == 0
    n_context = len(tokenizer(methods[1].prompt(TASKS[0], TASKS[0].test[0]).context).input_ids)
    numbers_per_token = 2 * 3 * 10 * 5  # keys and values, n_kv_heads, head_dim, layers
    assert kept["n_cached"] >= numbers_per_token * n_context


def test_a_method_without_a_draw_is_asked_once_for_all_seeds(tokenizer, tmp_path, monkeypatch):
    asked, predict = [], Evaluation.predict

    def counting(self, method, task, indices, seed):
        asked.append((method.name, seed))
        return predict(self, method, task, indices, seed)

    monkeypatch.setattr(Evaluation, "predict", counting)
    found = run(
        make(["zero-shot", "few-shot"], Settings(demos_per_class=2)),
        tmp_path / "r",
        tokenizer,
        (0, 1, 2),
    )
    assert {seed for name, seed in asked if name == "zero-shot"} == {0}
    assert {seed for name, seed in asked if name == "few-shot"} == {0, 1, 2}
    assert len({r.key for r in found}) == 2 * 2 * 3 * 13


def test_a_method_that_refuses_a_task_keeps_the_rest(tokenizer, tmp_path):
    class Picky(METHODS["zero-shot"]):
        name = "picky"

        def prompt(self, task, example):
            if task.name == "other":
                raise ValueError("only toys here")
            return super().prompt(task, example)

    methods = [*make(["zero-shot"], Settings()), Picky(Settings())]
    evaluation = Evaluation(
        Decoder.of(tiny.model("llama"), tokenizer), methods, TASKS, tmp_path / "r"
    )
    evaluation.run(TASKS, (0, 1), 13)
    assert evaluation.refused == {("picky", "other"): "only toys here"}
    cells = {(r.method, r.task) for r in records.read(tmp_path / "r")}
    assert cells == {("zero-shot", "toy"), ("zero-shot", "other"), ("picky", "toy")}


def test_a_context_kept_under_one_task_s_edits_is_read_anew_for_the_next(tokenizer, tmp_path):
    class Nudge(METHODS["zero-shot"]):
        name = "nudge"

        def prompt(self, task, example):
            return Prompt("Answer in one word.\n", task.prompt(example))

        def applied(self, task):
            return edited(
                [layers_of(self.model)[0]], lambda _, hidden: hidden + (task.name == "toy")
            )

    model, found = tiny.model("llama"), {}
    for name, tasks in (("both", TASKS), ("alone", TASKS[1:])):
        Evaluation(Decoder.of(model, tokenizer), [Nudge(Settings())], TASKS, tmp_path / name).run(
            tasks, (0,), 13
        )
        found[name] = [r.option_logits for r in records.read(tmp_path / name) if r.task == "other"]
    assert found["both"] == found["alone"]


@pytest.mark.slow
def test_fits_are_kept_for_a_resumed_run(tokenizer, tmp_path, monkeypatch):
    from icrouting.methods.task_vectors import TaskVectors

    settings = Settings(demos_per_class=2)
    names = ["zero-shot", "task-vectors", "task-vectors-once"]
    whole = run(make(names, settings), tmp_path / "whole", tokenizer, (0, 1), tmp_path / "fits")
    assert {file.name for file in (tmp_path / "fits").iterdir()} == {
        *(f"task-vectors-once-seed{seed}.safetensors" for seed in (0, 1)),
        *(f"task-vectors-seed{seed}-{task.name}.safetensors" for seed in (0, 1) for task in TASKS),
    }
    monkeypatch.setattr(TaskVectors, "learn", lambda *args: pytest.fail("fitted again"))
    again = run(make(names, settings), tmp_path / "again", tokenizer, (0, 1), tmp_path / "fits")
    assert without_times(again) == without_times(whole)


def config_of(**changes):
    asked = {"data": "d", "methods": ("zero-shot",), "seeds": [0], "n_test": 13}
    values = {
        "fingerprint": "f",
        "dtype": "float32",
        "rows": "r",
        "task_rows": "t",
        "router": None,
        "tasks": runs.task_entries(TASKS, ["toy"]),
        "sources": ["toy"],
        "notes": [],
    }
    for name, value in changes.items():
        (values if name in values else asked)[name] = value
    return runs.RunConfig(asked=EvalConfig(model=Backbone("m"), **asked), **values)


def begin(folder):
    """Puts something into a run's folder that binds its configuration."""
    folder.mkdir(exist_ok=True)
    (folder / "records.jsonl").write_text("an answer")


@pytest.mark.parametrize("name", ["records.jsonl", "records.1.jsonl", "answers.json", "fits/a.bin"])
def test_a_run_that_computed_nothing_binds_nobody(name, tmp_path):
    folder = RunFolder(tmp_path)
    with runs.claimed(folder, config_of()):
        pass
    with runs.claimed(folder, config_of(rows="other rows")):
        pass
    assert folder.read_config()["rows"] == "other rows"
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("computed")
    with pytest.raises(ValueError, match="rows was"), runs.claimed(folder, config_of()):
        pass


def test_a_run_folder_of_another_configuration_is_refused_with_the_difference(tmp_path):
    begin(tmp_path)
    runs.claim(RunFolder(tmp_path), config_of())
    runs.claim(RunFolder(tmp_path), config_of(methods=("zero-shot", "icr")))
    runs.claim(RunFolder(tmp_path), config_of(seeds=[1]))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["methods"] == ["zero-shot", "icr"]
    assert config["seeds"] == [0, 1]
    runs.claim(RunFolder(tmp_path), config_of(n_test=14))
    with pytest.raises(
        ValueError, match=r"another run \(n_test was 14, is 13\): choose another folder"
    ):
        runs.claim(RunFolder(tmp_path), config_of(n_test=13))
    with pytest.raises(ValueError, match="rows was"):
        runs.claim(RunFolder(tmp_path), config_of(rows="other rows"))


def test_a_run_takes_a_method_later_that_reads_the_sources(tmp_path):
    begin(tmp_path)
    folder = RunFolder(tmp_path)
    runs.claim(folder, config_of(rows="t"))
    runs.claim(folder, config_of(rows="with sources"))
    runs.claim(folder, config_of(rows="t"))
    assert folder.read_config()["rows"] == "with sources"
    with pytest.raises(ValueError, match="rows was"):
        runs.claim(folder, config_of(rows="with other sources"))
    with pytest.raises(ValueError, match="rows was"):
        runs.claim(folder, config_of(rows="u", task_rows="u"))


def test_a_run_of_an_earlier_version_goes_on_with_the_rows_of_its_sources_alone(tmp_path):
    begin(tmp_path)
    folder = RunFolder(tmp_path)
    runs.claim(folder, config_of(rows="with sources"))
    begun = folder.read_config()
    del begun["task_rows"]
    folder.write_config(begun)
    with pytest.raises(ValueError, match="sources' rows as that run did, with --sources toy"):
        runs.claim(folder, config_of(rows="t"))
    runs.claim(folder, config_of(rows="with sources"))


def test_a_run_takes_a_router_later_but_no_other_one_and_no_other_model(tmp_path):
    begin(tmp_path)
    runs.claim(RunFolder(tmp_path), config_of())
    runs.claim(RunFolder(tmp_path), config_of(router="r1"))
    runs.claim(RunFolder(tmp_path), config_of())
    assert json.loads((tmp_path / "config.json").read_text())["router"] == "r1"
    for changes in (
        {"router": "r2"},
        {"fingerprint": "g"},
        {"dtype": "bfloat16"},
        {"sources": ["other"]},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(changes))} was"):
            runs.claim(RunFolder(tmp_path), config_of(**changes))
    with pytest.raises(ValueError, match=r"another run \(i2cl_epochs was 100, is 9\)"):
        runs.claim(RunFolder(tmp_path), config_of(settings=Settings(i2cl_epochs=9)))


def test_controls_of_icr_keep_a_router_from_coming_or_going(tmp_path):
    folder = {name: tmp_path / name for name in ("default", "routed")}
    for place in folder.values():
        begin(place)
    runs.claim(RunFolder(folder["default"]), config_of(methods=("zero-shot", "icr-refit-once")))
    with pytest.raises(ValueError, match="router was null, is "):
        runs.claim(RunFolder(folder["default"]), config_of(router="r1"))
    runs.claim(
        RunFolder(folder["routed"]), config_of(router="r1", methods=("zero-shot", "icr-refit"))
    )
    runs.claim(RunFolder(folder["routed"]), config_of())
    with pytest.raises(ValueError, match="router was "):
        runs.claim(RunFolder(folder["routed"]), config_of(methods=("icr-refit",)))


def test_a_folder_of_another_kind_is_no_run(tmp_path):
    (tmp_path / "config.json").write_text('{"rank": 8}')
    with pytest.raises(
        ValueError, match=r"is no run's, it lacks command, methods, .*: choose another folder"
    ):
        runs.claim(RunFolder(tmp_path), config_of())


def test_notes_and_command_are_those_of_the_grown_run(tmp_path, monkeypatch):
    def grow(argument, **changes):
        monkeypatch.setattr(
            "sys.argv",
            ["venv/icrouting/cli/__main__.py" if argument == "b" else "venv/bin/icr", argument],
        )
        runs.claim(RunFolder(tmp_path), config_of(settings=Settings(i2cl_epochs=20), **changes))
        return json.loads((tmp_path / "config.json").read_text())

    assert grow("a")["notes"] == ["1 seed, 13 test items a task at most (paper: 3, 500)."]
    assert grow("b", seeds=[1, 2])["notes"] == [
        "3 seeds, 13 test items a task at most (paper: 3, 500)."
    ]
    config = grow("b", methods=("i2cl", "prompt-tuning-once"), n_test=500)
    assert config["notes"] == [
        "3 seeds, 30 test items a task at most (paper: 3, 500).",
        "I2CL is calibrated for 20 epochs (published: 100).",
        "Prompt tuning is trained for 10 epochs (published: 50).",
    ]
    assert config["command"] == "icr a && icr b"


def test_a_budget_smaller_than_usual_is_a_cut_that_the_report_names(tmp_path):
    runs.claim(
        RunFolder(tmp_path),
        config_of(seeds=[0, 1, 2], n_test=500, settings=Settings(tries=1, train_rows=30)),
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["notes"] == [
        "3 seeds, 30 test items a task at most (paper: 3, 500).",
        "Methods that learn are held to less, where they would take more: tries 1 (usual: 12), "
        "train_rows 30 (usual: 1000).",
    ]


def test_a_run_of_small_tasks_says_how_many_items_there_were(tmp_path):
    runs.claim(RunFolder(tmp_path), config_of(n_test=500))
    notes = json.loads((tmp_path / "config.json").read_text())["notes"]
    assert notes == ["1 seed, 30 test items a task at most (paper: 3, 500)."]


def test_a_run_keeps_the_options_of_its_tasks():
    letters = tiny.Example({"question": "where?"}, ("here", "there", "nowhere"), 2)
    fewer = tiny.Example({"question": "who?"}, ("me", "you"), 0)
    quiz = Task(SPECS["csqa"], (letters,), (fewer, letters))
    review, question = runs.task_entries([TASKS[0], quiz], [])
    assert (review["options"], review["n_test_rows"]) == (["negative", "positive"], 30)
    assert (question["options"], question["n_options"]) == (["A", "B", "C"], 3)


def test_a_run_of_an_earlier_version_is_given_the_options_when_it_is_taken_up(tmp_path):
    runs.claim(RunFolder(tmp_path), config_of())
    config = json.loads((tmp_path / "config.json").read_text())
    whole = copy.deepcopy(config["tasks"])
    for key in ("options", "n_test_rows"):
        for entry in config["tasks"]:
            del entry[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    runs.claim(RunFolder(tmp_path), config_of())
    assert json.loads((tmp_path / "config.json").read_text())["tasks"] == whole


def test_a_run_knows_source_from_unseen_tasks():
    entries = runs.task_entries(TASKS, ["toy"])
    assert [entry["role"] for entry in entries] == ["source", "unseen"]
    assert entries[0]["n_options"] == 2


def test_two_tasks_of_one_name_are_refused_before_anything_is_asked(tokenizer, tmp_path):
    decoder = Decoder.of(tiny.model("llama"), tokenizer)
    shorter = dataclasses.replace(TASKS[0], test=TASKS[0].test[:7])
    file = tmp_path / "records.jsonl"
    evaluation = Evaluation(decoder, [ZeroShot(Settings())], TASKS[:1], file)
    with pytest.raises(ValueError, match="two of the tasks are called 'toy': give each a name"):
        evaluation.run([TASKS[0], shorter], [0], 5)
    assert not file.exists()
    with pytest.raises(ValueError, match="two of the tasks are called 'toy'"):
        Evaluation(decoder, [ZeroShot(Settings())], [TASKS[0], shorter], file)


def test_a_task_of_the_name_of_one_that_was_run_before_is_refused(tokenizer, tmp_path):
    decoder = Decoder.of(tiny.model("llama"), tokenizer)
    shorter = dataclasses.replace(TASKS[0], test=TASKS[0].test[:7])
    evaluation = Evaluation(decoder, [ZeroShot(Settings())], TASKS[:1], tmp_path / "records.jsonl")
    evaluation.run(TASKS, [0], 3)
    evaluation.run(TASKS[:1], [0, 1], 5)
    with pytest.raises(ValueError, match="another task that was evaluated here is called 'toy'"):
        evaluation.run([shorter], [0], 5)


def test_the_documented_methods_run_as_written(tokenizer, tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    makers = [names["Politely"], *regimes(names["Nudge"]).values()]
    methods = [
        *make(["zero-shot"], Settings()),
        *(maker(Settings(demos_per_class=1)) for maker in makers),
    ]
    evaluation = Evaluation(
        Decoder.of(tiny.model("llama"), tokenizer), methods, TASKS, tmp_path / "none"
    )
    evaluation.fit(0)
    plain, *found = (evaluation.predict(method, TASKS[0], [0, 1], 0) for method in methods)
    assert [[record.method for record in pair] for pair in found] == [
        ["politely"] * 2,
        ["nudge"] * 2,
        ["nudge-once"] * 2,
    ]
    assert found[0][0].n_tokens > plain[0].n_tokens
    assert all(pair[0].option_logits != plain[0].option_logits for pair in found)
    assert len(methods[2].on(TASKS[0]).tried) == 3


def test_processes_share_out_what_is_fitted_once(tokenizer, tmp_path, monkeypatch):
    order = []

    class Learner(ZeroShot):
        def learn(self, rng):
            order.append(self.name)
            if self.name == "second":
                raise ValueError("it cannot")

    methods = [Learner(Settings()) for _ in range(4)]
    for method, name in zip(methods, ("first", "second", "third", "fourth"), strict=True):
        method.name = name
    monkeypatch.setattr(evaluate, "here", lambda: SimpleNamespace(num_processes=2, process_index=1))
    monkeypatch.setattr(evaluate, "mine", lambda items: items[1::2])
    monkeypatch.setattr(
        evaluate,
        "joined",
        lambda items: order.append("joined") or [*items, ("third", "nor can it")],
    )
    monkeypatch.setattr(evaluate, "wait", lambda: None)
    evaluation = Evaluation(
        Decoder.of(tiny.model("llama"), tokenizer), methods, TASKS, tmp_path / "none"
    )
    evaluation._fit_together(0, [])
    assert order == [
        "second",
        "fourth",
        "joined",
        "first",
    ]  # what another process could not fit is not tried again


def test_one_process_that_outlived_the_others_of_its_run_keeps_another_run_out(tmp_path):
    with FileLock(tmp_path / "lock.1", thread_local=False):
        with (
            pytest.raises(ValueError, match="another run is writing"),
            runs.claimed(RunFolder(tmp_path), config_of()),
        ):
            pass
        assert not (tmp_path / "config.json").exists()
    with runs.claimed(RunFolder(tmp_path), config_of()):
        assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    "error", [NotImplementedError("no flock"), OSError(errno.ENOLCK, "No locks available")]
)
def test_where_a_file_system_has_no_locks_a_run_goes_on_and_says_so(
    error, tmp_path, monkeypatch, caplog
):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(FileLock, "acquire", fail)
    with runs.claimed(RunFolder(tmp_path / "run"), config_of()):
        assert (tmp_path / "run" / "config.json").exists()
    assert f"cannot be locked against other runs ({error})" in caplog.text


def test_a_refusal_is_written_before_the_timing(methods, tokenizer, tmp_path, monkeypatch):
    """A kill while methods are timed does not lose why a cell of the table is empty."""

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("icrouting.evaluation.outcome.time_ratios", killed)
    folder = RunFolder(tmp_path)
    save_json(folder.config, {"methods": ["zero-shot", "few-shot"]})
    decoder = Decoder.of(tiny.model("llama"), tokenizer)
    evaluation = Evaluation(decoder, methods, TASKS, folder.records)
    evaluation.refused = {("few-shot", "toy"): "why"}
    with pytest.raises(KeyboardInterrupt):
        outcome_of(evaluation, TASKS, 0, folder)
    assert load_json(folder.config)["refused"] == [["few-shot", "toy", "why"]]


def test_a_method_that_loses_rows_is_refused(tokenizer, tmp_path):
    class Loses(ZeroShot):
        name = "loses"

        def adjusted(self, task, examples, scores):
            return scores[1:]

    decoder = Decoder.of(tiny.model("llama"), tokenizer)
    evaluation = Evaluation(decoder, [Loses(Settings())], TASKS[:1], tmp_path / "r")
    evaluation.run(TASKS[:1], (0,), 5)
    assert "gives scores of 4 prompts, of 5 that were asked" in evaluation.refused["loses", "toy"]
    assert records.read(tmp_path / "r") == []
