import contextlib
import io
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

import tiny
from commands import EVALUATE, evaluate, fit, on
from fake_run import fake_config
from icrouting.cli import loading, main
from icrouting.decoder.loading import load_model
from icrouting.evaluation import evaluate as evaluate_module
from icrouting.fitting.training import Trainer
from icrouting.fitting.trunk import TRUNK_FILE
from icrouting.icr import InContextRouter
from icrouting.routing import artifact


@pytest.fixture
def in_float32(monkeypatch):
    """A tiny router trained for seconds moves less than bfloat16 rounds, of which we warn."""
    monkeypatch.setattr("icrouting.decoder.loading.default_dtype", lambda: torch.float32)


SST2, SOURCE = "--tasks sst2 --sources sst2", "--sources sst2"


def failure(capsys, *arguments):
    """The one line on standard error of a command that must end with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        main.main(list(arguments))
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.slow
def test_fit_eval_and_report_leave_a_whole_run(world, tmp_path, capsys):
    evaluate(world, tmp_path / "run")
    shown = capsys.readouterr().out
    assert "report.html" in shown
    assert "ICR" in shown
    files = {file.name for file in (tmp_path / "run").iterdir()}
    assert files >= {
        "config.json",
        "records.jsonl",
        "summary.json",
        "report.html",
        "report.md",
        "report.csv",
    }
    assert {"routing.json", "training.jsonl"} <= files
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert {row["method"] for row in config["timing"]["ratios"]} == {
        *(
            "few-shot",
            "few-shot, context kept",
            "multi-task-few-shot",
            "multi-task-few-shot, context kept",
        ),
        *("calibration", "icr"),
    }
    page = (tmp_path / "run" / "report.html").read_text()
    (tmp_path / "run" / "report.html").unlink()
    main.main(["report", str(tmp_path / "run")])
    assert (tmp_path / "run" / "report.html").read_text() == page


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """A small run of a world, only to be read."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    evaluate(world, folder, "--methods", "zero-shot", "icr", "--n-test", "3")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
@pytest.mark.parametrize(
    "arguments",
    [
        "--help",
        "fit --help",
        "demo --help",
        "fit --dry-run --out {out} {model} --tasks sst2 --encoder hidden",
        "eval {where} --out {run} --tasks sst2 mr --sources sst2 --demos-per-class 1 --n-test 3"
        " --methods zero-shot icr",
        "report {run}",
        "report {run} --leads",
        "generate {base} --prompt \N{BULLET}\N{SNOWMAN} --max-new-tokens 2",
        "inspect {base} --prompt \N{BULLET}\N{SNOWMAN} --out {out}/page.html",
    ],
)
def test_what_an_encoding_lacks_is_replaced_in_the_output(
    world, run, tmp_path, monkeypatch, encoding, arguments
):
    base = f"--model {world / 'model'} --router {world / 'router'}"
    model = f"--model {world / 'model'} --data {world / 'data'}"
    where = f"{base} --data {world / 'data'}"
    written = io.BytesIO()
    if arguments.startswith("generate"):
        # In bfloat16 a tiny router does nothing, of which we warn.
        monkeypatch.setattr("icrouting.decoder.loading.default_dtype", lambda: torch.float32)
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding=encoding))
    words = arguments.format(base=base, model=model, where=where, run=run, out=tmp_path)
    # Help ends by itself, and well.
    with contextlib.suppress(SystemExit) if "--help" in words else contextlib.nullcontext():
        main.main(words.split())
    sys.stdout.flush()
    assert written.getvalue().decode(encoding).strip()


@pytest.mark.slow
def test_the_made_up_run_of_other_tests_has_no_key_that_a_real_one_lacks(world, tmp_path):
    methods = ["--methods", "zero-shot", "few-shot", "icr", "icr-refit-once", "--n-test", "3"]
    evaluate(world, tmp_path / "run", *methods)
    real = json.loads((tmp_path / "run" / "config.json").read_text())
    made_up = fake_config()
    assert made_up.keys() <= real.keys()
    pairs = (
        (made_up["tasks"][0], real["tasks"][0]),
        (made_up["timing"], real["timing"]),
        (made_up["timing"]["ratios"][0], real["timing"]["ratios"][0]),
        (made_up["fits"][0], real["fits"][0]),
    )
    for made_up_part, real_part in pairs:
        assert made_up_part.keys() == real_part.keys()
    # The router's fit is reckoned; fitted anew, it takes the same.
    fits = {fit["method"]: fit for fit in real["fits"]}
    refit = {**fits["icr-refit-once"], "method": "icr", "seconds": None}
    assert fits["icr"] == refit
    assert real["tasks"][0]["options"] == ["negative", "positive"]
    assert "9 prompts, 9 queries a task at most" in real["notes"][-1]


@pytest.mark.slow
def test_rows_longer_than_the_context_are_left_out_and_said_so(world, tmp_path, capsys):
    shutil.copytree(world / "data" / "sst2", tmp_path / "data" / "sst2")
    for split, n in (("train", 1), ("test", 2)):
        with (tmp_path / "data" / "sst2" / f"{split}.jsonl").open("a") as file:
            file.writelines(
                "\n" + json.dumps({"text": f"{split} {i} so long" * 600, "label": 1})
                for i in range(n)
            )
    methods = ["--methods", "zero-shot", "icv", "--n-test", "99", "--train-rows", "99"]
    where = ["--model", str(world / "model"), "--data", str(tmp_path / "data"), *SST2.split()]
    main.main(["eval", "--out", str(tmp_path / "run"), *where, *methods, "--demos-per-class", "1"])
    said = "longer than 488 tokens: 1 train, 2 test rows of sst2."
    assert said in " ".join(capsys.readouterr().out.split())
    assert said in (tmp_path / "run" / "report.md").read_text()
    assert len((tmp_path / "run" / "records.jsonl").read_text().splitlines()) == 2 * 3 * 20


@pytest.mark.slow
def test_a_report_goes_to_the_card_of_the_router_that_was_measured_and_no_other(
    world, tmp_path, encoder_folder, capsys
):
    fit(world, encoder_folder, tmp_path / "router")
    where = ["--router", str(tmp_path / "router"), "--methods", "zero-shot", "icr", "--n-test", "3"]
    evaluate(world, tmp_path / "run", *where)
    run, card = str(tmp_path / "run"), tmp_path / "router" / "README.md"
    before = card.read_text()
    for _ in range(2):
        main.main(["report", run, "--card", str(tmp_path / "router")])
        report = (tmp_path / "run" / "report.md").read_text()
        assert card.read_text() == before[: before.index("## Results")] + f"## Results\n\n{report}"
    fit(world, encoder_folder, tmp_path / "other", "--seed", "7")
    before = (tmp_path / "other" / "README.md").read_text()
    assert "nothing is recorded" in failure(
        capsys, "report", run, "--card", str(tmp_path / "other")
    )
    assert (tmp_path / "other" / "README.md").read_text() == before
    assert "does not describe an icrouting artifact" in failure(
        capsys, "report", run, "--card", run
    )


@pytest.mark.slow
def test_a_second_run_into_the_folder_adds_nothing_and_another_one_is_refused(
    world, tmp_path, capsys
):
    evaluate(world, tmp_path / "run", "--methods", "zero-shot", "icr")
    lines = (tmp_path / "run" / "records.jsonl").read_text()
    evaluate(world, tmp_path / "run", "--methods", "zero-shot", "icr")
    assert (tmp_path / "run" / "records.jsonl").read_text() == lines
    capsys.readouterr()
    with pytest.raises(SystemExit):
        evaluate(world, tmp_path / "run", "--n-test", "6")
    assert "n_test was 7, is 6" in capsys.readouterr().err


@pytest.mark.slow
def test_a_second_eval_into_a_live_run_is_refused_in_one_line(world, tmp_path, capsys, monkeypatch):
    run, how, refused = (
        evaluate_module.Evaluation.run,
        ("--methods", "zero-shot", "--n-test", "3"),
        [],
    )

    def run_twice(self, *args):
        with pytest.raises(SystemExit):
            evaluate(world, tmp_path / "run", *how)
        refused.append(capsys.readouterr().err)
        run(self, *args)

    monkeypatch.setattr(evaluate_module.Evaluation, "run", run_twice)
    evaluate(world, tmp_path / "run", *how)
    (line,) = refused[0].strip().splitlines()
    assert f"another run is writing to {tmp_path / 'run'}" in line
    assert len((tmp_path / "run" / "records.jsonl").read_text().splitlines()) == 3 * 2 * 3
    monkeypatch.setattr(evaluate_module.Evaluation, "run", run)
    evaluate(world, tmp_path / "run", *how)


@pytest.mark.slow
def test_icr_alone_is_timed_against_zero_shot(world, tmp_path):
    evaluate(world, tmp_path / "run", "--methods", "icr", "--n-test", "3")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (row,) = config["timing"]["ratios"]
    assert (config["timing"]["baseline"], row["method"]) == ("zero-shot", "icr")
    assert row["n_cached"] == 3 * (60 + 30) * 2


@pytest.mark.slow
def test_a_finished_fit_is_not_repeated_and_another_one_is_refused(world, encoder_folder, capsys):
    before = (world / "router" / "model.safetensors").stat().st_mtime_ns
    fit(world, encoder_folder, world / "router")
    assert "holds this router already" in " ".join(capsys.readouterr().out.split())
    assert (world / "router" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(SystemExit):
        fit(world, encoder_folder, world / "router", "--lr", "0.5")
    assert "router of other settings" in capsys.readouterr().err


@pytest.mark.slow
def test_the_trunk_is_kept_until_the_router_is_saved(
    world, encoder_folder, tmp_path, capsys, monkeypatch
):
    out, save, ran = (tmp_path / "router", artifact.save, [])

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(artifact, "save", fail)
    with pytest.raises(SystemExit):
        fit(world, encoder_folder, out)
    (trunk,) = out.rglob(TRUNK_FILE)
    monkeypatch.setattr(artifact, "save", save)
    monkeypatch.setattr("icrouting.fitting.trunk._fill", lambda *args: ran.append(1))
    fit(world, encoder_folder, out)
    assert not ran
    assert not trunk.exists()
    trunk.touch()  # as a kill right after the saving leaves it
    fit(world, encoder_folder, out)
    assert "already" in capsys.readouterr().out
    assert not trunk.exists()


@pytest.mark.usefixtures("in_float32")
def test_generate_shows_both_continuations(world, capsys):
    where = ["--model", str(world / "model"), "--router", str(world / "router")]
    main.main(["generate", *where, "--prompt", "Review: joy\\nSentiment:", "--max-new-tokens", "5"])
    shown = capsys.readouterr().out
    assert "zero-shot" in shown
    assert "routed, strength 1" in shown


@pytest.mark.usefixtures("in_float32")
@pytest.mark.slow
def test_a_model_may_be_spread_by_a_map(world, encoder_folder, capsys, monkeypatch):
    fit(world, encoder_folder, world / "router", "--device-map", "auto")
    assert "holds this router already" in " ".join(capsys.readouterr().out.split())
    where = [
        "--model",
        str(world / "model"),
        "--router",
        str(world / "router"),
        "--prompt",
        "Review: joy",
    ]
    assert "device_map that fits it, not 'foo'" in failure(
        capsys, "generate", *where, "--device-map", "foo"
    )
    # Where memory is too small, "auto" comes to this.
    monkeypatch.setattr(
        loading, "load_model", lambda name, **asked: load_model(name, device_map={"": "disk"})
    )
    main.main(["generate", *where, "--max-new-tokens", "5"])
    assert "routed, strength 1" in capsys.readouterr().out


def test_inspect_prints_the_numbers_and_writes_the_page(world, tmp_path, capsys):
    where = [
        "--model",
        str(world / "model"),
        "--router",
        str(world / "router"),
        "--out",
        str(tmp_path / "a" / "b.html"),
    ]
    main.main(
        [
            "inspect",
            *where,
            "--prompt",
            "Review: [/b] joy\\nSentiment:",
            "--options",
            "negative",
            "positive",
        ]
    )
    shown = capsys.readouterr().out
    for said in (
        "effect on 1 prompt",
        "'positive'",
        "next token",
        "gates, %",
        "attention of the last token",
        "b.html",
    ):
        assert said in shown
    assert "<svg" in (tmp_path / "a" / "b.html").read_text()
    main.main(["inspect", *where, "--prompt", "Review: joy", "--strength", "0"])
    shown = capsys.readouterr().out
    assert "numerically nothing" in shown
    assert "option" not in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            "eval --out {tmp}/run --model {model} --data {data} --tasks sst3 --router {router}",
            "did you mean sst5 or sst2",
        ),
        (
            "eval --out {tmp}/run --model {model} --data {data} --methods icr --tasks sst2",
            "needs --router",
        ),
        (
            "eval --out {tmp}/run --model {model} --data {data} --methods icrr --tasks sst2",
            "did you mean icr",
        ),
        (
            "eval --out {tmp}/run --model {tmp}/no --data {data} --tasks sst2 --sources sst2 "
            "--methods zero-shot",
            "cannot load model",
        ),
        (
            "eval --out {tmp}/run --model {model} --data {tmp} --tasks sst2 --sources sst2 "
            "--methods zero-shot",
            "expected a folder",
        ),
        (
            "fit --out {tmp}/r --model {model} --data {data} --tasks sst2 --encoder pinned:minilmm",
            "unknown pinned encoder",
        ),
        (
            "fit --out {tmp}/r --model pinned:smollm --data {data} --tasks sst2",
            "known are pinned:smollm2-135m",
        ),
        (
            "fit --out {tmp}/r --model {model} --data pinned:stick --tasks sst2",
            "unknown pinned data",
        ),
        (
            "fit --out {tmp}/r --model {model} --data {data} --tasks sst2 --rank 0",
            "rank: Input should be greater than 0",
        ),
        ("report {tmp}", "config.json"),
        ("generate --router {tmp} --model {model} --prompt a", "config.json is missing"),
        ("generate --router {router} --model {model} --prompt=", "empty text"),
        (
            "inspect --router {router} --model {model} --prompt a: --options b",
            "at least two options",
        ),
        (
            "eval --out {tmp}/run --model {model} --data {data} --n-test -1 --router {router} "
            + SST2,
            "n_test: Input",
        ),
        (
            "eval --out {tmp}/run --model {model} --data {data} --seeds -1 --router {router} "
            + SST2,
            "seeds.0: Input should be greater than or equal to 0, got -1",
        ),
        (
            "fit --out {tmp}/r --model {model} --data {data} --tasks sst2 --max-tokens 0",
            "max_tokens: Input should be greater than 0, got 0",
        ),
        ("generate --router {router} --model {tmp}/x.gguf --prompt a", "no such file"),
        (
            "eval --out {tmp}/run --model {model} --data {data} --tasks {twin} --methods zero-shot "
            + SOURCE,
            "one name",
        ),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_two(arguments, said, world, tmp_path, capsys):
    places = {
        "tmp": tmp_path,
        "model": world / "model",
        "data": world / "data",
        "router": world / "router",
    }
    places["twin"] = world / "data" / "sst2" / "sst2.toml"
    places["twin"].write_text(
        'template = "{text}:"\noptions = ["negative", "positive"]\n'
        '[splits]\ntrain = "train.jsonl"\ntest = "test.jsonl"'
    )
    assert said in failure(capsys, *(word.format(**places) for word in arguments.split()))


def test_a_full_disk_is_one_line_and_exit_code_two(world, encoder_folder, tmp_path, capsys):
    import resource
    import signal

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(SystemExit) as caught:
            fit(world, encoder_folder, tmp_path / "router")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.code == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.usefixtures("in_float32")
def test_generated_brackets_are_text(world, capsys, monkeypatch):
    monkeypatch.setattr(
        "transformers.PreTrainedTokenizerBase.decode",
        lambda self, *args, **kwargs: "[/INST] list[int]",
    )
    where = ["--model", str(world / "model"), "--router", str(world / "router")]
    main.main(["generate", *where, "--prompt", "Review: joy\\nSentiment:", "--max-new-tokens", "5"])
    assert "[/INST] list[int]" in capsys.readouterr().out


def test_a_fit_of_another_model_into_the_folder_is_refused(world, encoder_folder, capsys, tmp_path):
    tiny.save(tmp_path / "other", seed=9)
    with pytest.raises(SystemExit):
        fit(world, encoder_folder, world / "router", "--model", str(tmp_path / "other"))
    assert "weights hold other numbers" in capsys.readouterr().err


def interrupted(*arguments, **settings):
    """What stands for work during which a person presses ctrl-C."""
    raise KeyboardInterrupt


def last_words(capsys, command, *arguments):
    """What a command that is stopped says at its end."""
    with pytest.raises(SystemExit) as caught:
        command(*arguments)
    assert caught.value.code == 130
    return " ".join(capsys.readouterr().err.split())


def test_a_command_that_keeps_nothing_says_nothing_of_it(monkeypatch, capsys):
    from icrouting.cli import report as room

    monkeypatch.setattr(room, "show", interrupted)
    assert last_words(capsys, main.main, ["report", "anywhere"]) == "stopped"


def test_a_fit_that_is_stopped_before_its_first_save_says_so(
    world, encoder_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("icrouting.fitting.extraction.capture_last_tokens", interrupted)
    said = last_words(capsys, fit, world, encoder_folder, tmp_path / "router")
    assert "nothing was computed yet" in said
    assert "begins anew" in said


def test_a_fit_that_is_stopped_later_says_what_it_keeps(
    world, encoder_folder, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "router"
    with monkeypatch.context() as patched:
        patched.setattr("icrouting.fitting.stages.Trainer", interrupted)
        said = last_words(capsys, fit, world, encoder_folder, out)
    assert f"{out} keeps 9 prompts of the extraction, the trunk's states; the same" in said
    update, steps = Trainer._update, []

    def interrupted_at_the_second(self, terms):
        if steps:
            raise KeyboardInterrupt
        steps.append(1)
        update(self, terms)

    monkeypatch.setattr(Trainer, "_update", interrupted_at_the_second)
    said = last_words(capsys, fit, world, encoder_folder, out)
    assert "the trunk's states, training up to step 1; the same command goes on" in said


def test_a_run_that_is_stopped_before_its_first_answer_says_so(
    world, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(evaluate_module.Evaluation, "predict", interrupted)
    said = last_words(capsys, evaluate_without_sources, world, tmp_path / "run")
    assert "no answer was computed yet" in said
    assert "begins anew" in said


def test_a_run_that_is_stopped_later_says_what_it_keeps(world, tmp_path, monkeypatch, capsys):
    from icrouting.cli import evaluate as room

    monkeypatch.setattr(room, "finish", interrupted)
    said = last_words(capsys, evaluate_without_sources, world, tmp_path / "run")
    # Two tasks, two methods and three items.
    assert f"{tmp_path / 'run'} keeps 12 answers and 0 fits; the same command goes on" in said


@pytest.mark.parametrize(
    "command", ["fit", "eval", "sweep", "compare", "report", "generate", "inspect", "demo"]
)
def test_help_teaches_every_option(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main.main([command, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert command == "demo" or "Example: icr" in " ".join(shown.split())
    undocumented = re.findall(r"│ (--[a-z-]+)[^│]*│\s*\n│\s*\(default", shown)
    assert not undocumented


@pytest.mark.processes
def test_help_is_quick_since_nothing_heavy_is_imported():
    code = (
        "import sys; from icrouting.cli import main; "
        "print([n for n in ('torch', 'transformers', 'pandas') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def roles_of(run):
    """The role of each task of a run, by name."""
    config = json.loads((run / "config.json").read_text())
    return {task["name"]: task["role"] for task in config["tasks"]}


def evaluate_without_sources(world, out, *more):
    """Runs `icr eval` of two methods on a world's two tasks, whose router was fitted on sst2."""
    where = [*on(world), "--router", str(world / "router"), "--out", str(out)]
    how = "--tasks sst2 mr --n-test 3 --seeds 0 --methods zero-shot icr --demos-per-class 1"
    main.main(["eval", *where, *how.split(), *more])


@pytest.mark.slow
def test_what_is_unseen_is_said_by_the_router(world, tmp_path):
    evaluate_without_sources(world, tmp_path / "run")
    assert roles_of(tmp_path / "run") == {"sst2": "source", "mr": "unseen"}


def test_sources_that_the_router_was_not_fitted_on_are_refused(world, tmp_path, capsys):
    for named in ("mr", "sst2 mr"):
        with pytest.raises(SystemExit):
            evaluate_without_sources(world, tmp_path / "run", "--sources", *named.split())
        said = "the router was fitted on sst2, and --sources names " + named.replace(" ", ", ")
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_rows_of_sources_are_read_for_methods_that_learn_from_them_alone(world, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    shutil.copytree(world / "data" / "mr", tmp_path / "data" / "mr")
    run, alone = tmp_path / "run", ["--data", str(tmp_path / "data"), "--tasks", "mr"]
    evaluate_without_sources(world, run, *alone)
    assert roles_of(run) == {"mr": "unseen"}
    with pytest.raises(SystemExit):
        evaluate_without_sources(world, run, *alone, "--methods", "multi-task-few-shot")
    said = capsys.readouterr().err
    assert "fitted on sst2, and a method here reads their rows (task 'sst2': expected" in said
    assert "say with --sources where" in said
    shutil.copytree(world / "data" / "sst2", tmp_path / "data" / "sst2")
    evaluate_without_sources(world, run, *alone, "--methods", "multi-task-few-shot")
    lines = (run / "records.jsonl").read_text().splitlines()
    assert {json.loads(line)["method"] for line in lines} == {
        "zero-shot",
        "icr",
        "multi-task-few-shot",
    }


@pytest.mark.slow
def test_no_card_takes_for_unseen_what_its_router_was_fitted_on(world, tmp_path, capsys):
    """As runs of earlier versions may, which took it from --sources alone."""
    router = shutil.copytree(world / "router", tmp_path / "router")
    evaluate_without_sources(world, tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    written = file.read_text()
    card = (router / "README.md").read_text()
    for old, new in (("source", "unseen"), ("unseen", "source")):
        file.write_text(written.replace(f'"role": "{old}"', f'"role": "{new}"'))
        line = failure(capsys, "report", str(tmp_path / "run"), "--card", str(router))
        assert f"as {new}, but the router was fitted on sst2: nothing is recorded" in line
        assert (router / "README.md").read_text() == card


@pytest.mark.slow
def test_a_router_that_names_no_source_needs_sources(world, tmp_path, capsys):
    router = shutil.copytree(world / "router", tmp_path / "router")
    config = json.loads((router / "config.json").read_text())
    config["tasks"] = {}
    config["checksum"] = artifact._checksum(config)
    (router / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        evaluate_without_sources(world, tmp_path / "run", "--router", str(router))
    assert "does not say which tasks it was fitted on" in capsys.readouterr().err
    evaluate_without_sources(world, tmp_path / "run", "--router", str(router), "--sources", "mr")
    assert roles_of(tmp_path / "run") == {"sst2": "unseen", "mr": "source"}


def test_a_fit_whose_router_could_not_be_saved_is_refused_before_any_work(
    world, encoder_folder, tmp_path, capsys
):
    (tmp_path / "README.md").write_text("# My project")
    with pytest.raises(SystemExit):
        fit(world, encoder_folder, tmp_path)
    assert "README.md is not a router's and would be overwritten" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


@pytest.fixture
def no_hub(monkeypatch):
    """The hosts that were asked for meanwhile; none of them answers."""
    hosts = []

    def refuse(host, *arguments, **settings):
        hosts.append(host)
        raise OSError("no network here")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    return hosts


@pytest.mark.slow
def test_eval_without_a_model_takes_the_routers_and_its_encoder(world, tmp_path, no_hub):
    asked = ["--router", str(world / "router"), "--data", str(world / "data"), *EVALUATE.split()]
    methods = ["--methods", "zero-shot", "icr", "probe-encoder", "--seeds", "0", "--tries", "1"]
    main.main(["eval", "--out", str(tmp_path), *asked, *methods])
    config = json.loads((tmp_path / "config.json").read_text())
    description = InContextRouter.from_pretrained(world / "router").description
    assert config["model"] == description.base_model == str(world / "model")
    assert config["encoder"] == description.fit.encoder
    assert no_hub == []


@pytest.mark.slow
def test_a_run_that_was_begun_with_another_encoder_goes_on_with_it(world, tmp_path, no_hub):
    run = tmp_path / "run"
    more = ["--methods", "zero-shot", "--seeds", "0"]
    evaluate(world, run, *more, "--encoder", "sentence-transformers/all-MiniLM-L6-v2")
    evaluate(world, run, *more)
    config = json.loads((run / "config.json").read_text())
    assert config["encoder"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert no_hub == []


@pytest.mark.slow
def test_generate_and_inspect_without_a_model_take_the_routers(
    world, tmp_path, no_hub, capsys, in_float32
):
    asked = ["--router", str(world / "router"), "--prompt", "Review: a joy .\nSentiment:"]
    main.main(["generate", *asked, "--max-new-tokens", "2"])
    assert "routed, strength 1" in capsys.readouterr().out
    main.main(["inspect", *asked, "--out", str(tmp_path / "page.html")])
    assert str(world / "model") in (tmp_path / "page.html").read_text()
    assert no_hub == []


def test_a_router_that_knows_no_name_of_its_model_asks_for_one(
    saved_router, tmp_path, no_hub, capsys
):
    said = failure(capsys, "generate", "--router", str(saved_router), "--prompt", "a")
    assert "fitted on a Qwen2ForCausalLM without a name: say which model" in said
    assert no_hub == []


def test_a_fit_on_what_lies_here_asks_no_hub(world, encoder_folder, tmp_path, no_hub):
    fit(world, encoder_folder, tmp_path / "router")
    assert no_hub == []
