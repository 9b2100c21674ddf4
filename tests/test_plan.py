import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tiny
from icrouting import PAPER, FitConfig, InContextRouter
from icrouting.cli import fit as fit_command
from icrouting.cli import main, reading
from icrouting.decoder.backbone import Backbone
from icrouting.decoder.families import dims_of, family_of, stack_of
from icrouting.decoder.loading import load_skeleton
from icrouting.fitting import plan
from icrouting.fitting.lengths import Texts
from icrouting.fitting.pca import QKMoments
from icrouting.fitting.reckoning import Sizes, pass_flops
from icrouting.routing.pids import late_third

RECIPES = Path(__file__).parents[1] / "benchmarks" / "recipes"
# In billions, as their makers publish them.
PUBLISHED = {
    "llama-2-7b": 6.74,
    "llama-3.1-8b": 8.03,
    "qwen2.5-7b": 7.62,
    "qwen3-32b": 32.8,
    "llama-3.1-70b": 70.6,
}
SPREAD = ("qwen3-32b", "llama-3.1-70b")  # larger than one device
HUB = {
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B",
}
SMALL = FitConfig(
    n_prompts=12,
    demos_per_class=2,
    n_queries=500,
    rank=2,
    encoder="hidden",
    max_tokens=11,
    epochs=2,
    min_steps=0,
    patience=0,
)
TASKS = (tiny.task("toy"), tiny.task("other", n_train=7))


def planned(model, tokenizer=None, config=SMALL, **how):
    return plan.plan_fit(model, tokenizer, TASKS, config, torch.float32, **how)


@pytest.fixture(scope="module")
def five_tasks(tmp_path_factory):
    """A data folder with a few rows of each of the paper's source tasks."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("agnews", "sst2", "trec", "csqa", "piqa"):
        (folder / name).mkdir()
        for split in ("train", "test"):
            rows = [{"text": f"{split} words {i}", "label": i % 2} for i in range(40)]
            if name in ("csqa", "piqa"):
                choices = ["a", "b", "c", "d", "e"][: 5 if name == "csqa" else 2]
                rows = [
                    {"question": row["text"], "choices": choices, "label": row["label"]}
                    for row in rows
                ]
            (folder / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize("family", tiny.ALL_CONFIGS)
def test_parameters_are_those_of_the_real_model_though_no_weight_is_there(family, tmp_path):
    tiny.ALL_CONFIGS[family].save_pretrained(tmp_path)
    skeleton, tokenizer = load_skeleton(tmp_path)
    assert tokenizer is None
    assert planned(skeleton).n_parameters == sum(
        weight.numel() for weight in tiny.model(family, "eager").parameters()
    )


@pytest.mark.parametrize("layers", [None, (1, 3)])
@pytest.mark.slow
def test_a_real_fit_runs_the_tokens_and_leaves_the_bytes_that_were_planned(
    layers, tokenizer, tmp_path
):
    model = tiny.model("llama")
    config = FitConfig(**vars(SMALL) | {"layers": layers})
    expected = planned(model, tokenizer, config, sample=500)
    n_tokens = []

    def count(module, args, kwargs):
        n_tokens.append(int(kwargs["attention_mask"].sum()))

    # The probe's passes are none of the fit's.
    family_of(model)
    with stack_of(model).register_forward_pre_hook(count, with_kwargs=True):
        icr = InContextRouter.fit(model, tokenizer, TASKS, config)
    extraction = sum(texts.tokens for texts in expected.prompts.values())
    queries = sum(texts.tokens for texts in expected.queries.values())
    assert sum(n_tokens) == extraction + (1 + config.epochs) * queries
    icr.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size == pytest.approx(
        expected.disk["router"], rel=0.05
    )
    assert expected.n_router == sum(weight.numel() for weight in icr.router.parameters())
    assert expected.layers == icr.pids.layers


def test_prompts_are_counted_as_the_rows_allow_and_a_sample_stands_for_all(tokenizer):
    model = tiny.model("llama")
    whole = planned(model, tokenizer)
    sampled = planned(model, tokenizer, sample=5)
    guessed = planned(model)
    assert {name: texts.count for name, texts in whole.prompts.items()} == {"toy": 12, "other": 7}
    assert {name: texts.count for name, texts in whole.queries.items()} == {"toy": 40, "other": 7}
    assert max(texts.longest for texts in guessed.queries.values()) <= SMALL.max_tokens
    for kind in ("prompts", "queries"):
        counts, tokens = [], []
        for plan_of_fit in (whole, sampled, guessed):
            by_task = getattr(plan_of_fit, kind)
            counts.append({name: texts.count for name, texts in by_task.items()})
            tokens.append(sum(texts.tokens for texts in by_task.values()))
        assert counts[0] == counts[1] == counts[2]
        assert tokens[1] == pytest.approx(tokens[0], rel=0.2)


def test_without_a_tokenizer_tokens_are_reckoned_from_characters():
    config = replace(SMALL, max_tokens=1000)
    queries = planned(tiny.model("llama"), config=config, sample=100).queries
    for task in TASKS:
        n_chars = sum(len(task.prompt(row)) for row in task.train)
        assert queries[task.name].tokens == pytest.approx(n_chars / 3.8, abs=0.5)


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_moments_take_the_bytes_of_the_real_ones(family):
    model = tiny.model(family)
    dims = dims_of(model)
    n_routed = len(late_third(5))
    moments = QKMoments(n_routed, dims.n_heads * dims.head_dim, dims.n_kv_heads * dims.head_dim)
    n_bytes = sum(value.nbytes for name, value in moments.tensors().items() if name != "count")
    plan_of_fit = planned(model)
    assert plan_of_fit.memory["moments"] == n_bytes
    assert plan_of_fit.disk["moments"] == n_bytes


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2", "opt", "phi3"])
def test_the_work_of_a_pass_is_what_torch_counts(family):
    model, batch, length = tiny.model(family, "eager"), 3, 29
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        stack_of(model)(input_ids=torch.ones(batch, length, dtype=torch.long), use_cache=False)
    texts = Texts(batch, batch * length, batch * length**2, length)
    # biases and norms are weights that multiply no matrix: more of these models than of real ones
    assert pass_flops(Sizes.of(model), [texts], 5) == pytest.approx(
        counter.get_total_flops(), rel=0.1
    )


def test_a_third_of_the_layers_is_a_third_of_the_work():
    model = tiny.model("llama")
    sizes = Sizes.of(model)
    texts = [Texts(2, 20, 200, 10)]
    two_layers = pass_flops(sizes, texts, 2)
    all_layers = pass_flops(sizes, texts, 5)
    assert 5 * two_layers == pytest.approx(2 * all_layers)
    slow, fast = planned(model).seconds(1e9), planned(model).seconds(1e10)
    assert slow["training"] == pytest.approx(10 * fast["training"])


def test_what_just_fits_is_let_through_and_a_byte_less_is_refused_with_advice():
    plan_of_fit = planned(tiny.model("llama"))
    weights = plan_of_fit.memory["weights"]
    moments = plan_of_fit.memory["moments"]
    disk = sum(plan_of_fit.disk.values())
    plan_of_fit.check(weights + moments, disk, None)
    plan_of_fit.check(moments, disk, weights)
    for room, advice in (
        ((weights + moments - 1, disk, None), "--layers"),
        ((moments - 1, disk, weights), "of memory"),
        ((moments, disk - 1, weights), "--out"),
        ((moments, disk, weights - 1), "accelerator"),
    ):
        with pytest.raises(ValueError, match=advice) as caught:
            plan_of_fit.check(*room)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_quantised_checkpoints_weights_are_left_out_and_that_is_said(
    five_tasks, tmp_path, capsys
):
    model = tiny.model("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    model.config.save_pretrained(tmp_path)
    of, whole = planned(load_skeleton(tmp_path)[0]), planned(tiny.model("llama"))
    assert of.n_parameters == whole.n_parameters
    assert {**of.memory, "weights": whole.memory["weights"]} == whole.memory
    of.check(of.memory["moments"], sum(of.disk.values()), 0)
    for folder, said in (
        (tmp_path, "weights not reckoned, being quantised"),
        (RECIPES / "llama-2-7b", "weights 13.5 GB"),
    ):
        main.main(
            [
                "fit",
                "--dry-run",
                "--model",
                str(folder),
                "--data",
                str(five_tasks),
                "--out",
                str(tmp_path / "r"),
            ]
        )
        assert said in " ".join(capsys.readouterr().out.split())


def test_free_room_is_that_of_the_nearest_folder_with_what_a_fit_has_written(tmp_path):
    memory, disk, _ = plan.room_of(tmp_path / "a" / "b")
    assert memory > 0
    (tmp_path / "extraction-0").mkdir()
    (tmp_path / "extraction-0" / "moments.safetensors").write_bytes(bytes(2**24))
    assert plan.room_of(tmp_path)[1] == pytest.approx(disk, abs=2**30)


def test_holes_in_a_file_are_no_room_that_it_takes(tmp_path):
    disk, file = plan.room_of(tmp_path)[1], tmp_path / "trunk-0" / "trunk.bin"
    file.parent.mkdir()
    file.write_bytes(bytes(2**24))
    os.truncate(file, 2**40)
    assert plan.room_of(tmp_path)[1] == pytest.approx(disk, abs=2**30)


def arguments_of(recipe, tmp_path, **environment):
    """What a recipe's run.sh starts, from programs of the same names that print their arguments."""
    for name in ("icr", "python", "accelerate"):
        (tmp_path / name).write_text('#!/bin/sh\nfor word in "$0" "$@"; do echo "$word"; done\n')
        (tmp_path / name).chmod(0o755)
    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **environment}
    command = ["bash", str(RECIPES / recipe / "run.sh"), str(tmp_path / "router")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **path}
    )
    program, *arguments = done.stdout.splitlines()
    return Path(program).name, arguments


@pytest.mark.processes
@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_recipe_is_the_papers_fit_of_its_model(recipe, tmp_path, monkeypatch):
    program, arguments = arguments_of(recipe, tmp_path)
    started = []
    monkeypatch.setattr(reading, "load_tasks", lambda names, data, chat: [data, *names])
    monkeypatch.setattr(fit_command, "fit", lambda *given, **more: started.append((given, more)))
    main.main(arguments)
    assert program == "icr"
    model = Backbone(HUB[recipe], "auto" if recipe in SPREAD else None)
    settings = (tmp_path / "router", model, ["hub", *main.HUB_TASKS[:5]], PAPER, None)
    more = {"stages_folder": None, "beginning": fit_command.ANEW, "gate": True, "n_check": 100}
    more["asked"] = ["--data", "hub", "--tasks", *main.HUB_TASKS[:5]]
    assert started == [(settings, more)]


@pytest.mark.processes
def test_several_processes_get_the_same_arguments(tmp_path):
    program, arguments = arguments_of("llama-2-7b", tmp_path, PROCESSES="4")
    launch = ["launch", "--num_processes", "4", "-m", "icrouting.cli"]
    assert (program, arguments[:5]) == ("accelerate", launch)
    assert arguments[5:] == arguments_of("llama-2-7b", tmp_path)[1]


@pytest.mark.parametrize("recipe", PUBLISHED)
@pytest.mark.slow
def test_a_recipe_runs_dry_with_the_published_number_of_parameters(
    recipe, five_tasks, tmp_path, capsys
):
    _, arguments = arguments_of(recipe, tmp_path, DRY="1", DATA=str(five_tasks))
    main.main(arguments[2:])
    shown = " ".join(capsys.readouterr().out.split())
    n_parameters = int(
        shown.partition("base model ")[2].partition(" router")[0].strip(",").replace(",", "")
    )
    assert float(f"{n_parameters / 1e9:.3g}") == PUBLISHED[recipe]
    for said in ("no tokenizer", "moments", "trunk", "training", "at 100 TFLOP/s"):
        assert said in shown
    assert not (tmp_path / "router").exists()


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_the_papers_sizes_take_what_the_scaling_page_says(recipe):
    page = (RECIPES.parents[1] / "docs" / "scaling.md").read_text()
    model, _ = load_skeleton(RECIPES / recipe)
    moments = planned(model, config=PAPER).memory["moments"]
    assert f"| {plan.size(moments)} |" in next(
        line for line in page.splitlines() if line.startswith(f"| {recipe} |")
    )


def test_a_fit_that_cannot_fit_is_refused_before_the_weights_are_read(
    five_tasks, tmp_path, monkeypatch, capsys
):
    tiny.ALL_CONFIGS["llama"].save_pretrained(tmp_path)
    monkeypatch.setattr(plan, "room_of", lambda out: (1000, 10**12, None))
    with pytest.raises(SystemExit) as caught:
        main.main(
            [
                "fit",
                "--model",
                str(tmp_path),
                "--data",
                str(five_tasks),
                "--out",
                str(tmp_path / "router"),
            ]
        )
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "this fit needs" in line
    assert "of memory, 1 kB are free: route fewer" in line


def test_a_model_without_attention_heads_is_refused_in_a_sentence():
    from transformers import AutoModelForCausalLM, MambaConfig

    with torch.device("meta"):
        mamba = AutoModelForCausalLM.from_config(
            MambaConfig(num_hidden_layers=2, hidden_size=8, vocab_size=20)
        )
    with pytest.raises(ValueError, match="'mamba' models cannot be routed"):
        planned(mamba)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"n_prompts": 2, "rank": 4}, "4 directions need more than 4 prompts, got 4"),
        ({"rank": 4096}, "rank must lie in 1"),
    ],
)
def test_directions_that_no_extraction_could_give_are_refused_before_it_runs(
    changes, why, tokenizer, monkeypatch
):
    config = replace(SMALL, **changes)
    with pytest.raises(ValueError, match=why):
        planned(tiny.model("llama"), config=config)
    # The fit alone, as from Python, refuses too, and reads no prompt.
    monkeypatch.setattr("icrouting.fitting.extraction.capture_last_tokens", None)
    with pytest.raises(ValueError, match=why):
        InContextRouter.fit(tiny.model("llama"), tokenizer, TASKS, config)
