"""Where a model goes, in what dtype it computes, and how many tokens a pass takes."""

import json

import pytest
import torch

import tiny
from commands import on
from fitted import small_fit
from icrouting import InContextRouter, load_model
from icrouting.cli import main
from icrouting.decoder.backbone import Backbone
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.scoring import score


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.save(folder)
    return folder


@pytest.mark.parametrize("device", ["gpu", "cuda:97", "mps:3", "xpu:8"])
def test_a_device_that_is_not_there_is_said_with_those_that_are(device, folder):
    with pytest.raises(ValueError, match=rf"no device '{device}' here: expected one of cpu"):
        load_model(folder, device=device)


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu")])
def test_a_device_that_is_there_holds_the_model(device, folder):
    model, _ = load_model(folder, device=device)
    assert model.device.type == "cpu"


def test_a_device_and_a_map_do_not_go_together():
    with pytest.raises(ValueError, match="--device or --device-map, got both"):
        Backbone(device="cpu", device_map="auto")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_command_loads_the_model_in_the_dtype_that_is_asked(dtype, folder):
    from icrouting.cli.loading import load

    model, _ = load(Backbone(str(folder), device="cpu", dtype=dtype))
    assert model.dtype == getattr(torch, dtype)


def prompts():
    task = tiny.task(n_test=30)
    return [task.prompt(row) for row in task.test], task.spec.options


def scores_and_passes(decoder, *asked):
    """How many forward passes some scores take, and the scores."""
    calls = []
    hook = decoder.model.register_forward_pre_hook(lambda *call: calls.append(1))
    with hook:
        return score(decoder, *asked), len(calls)


def test_a_smaller_budget_takes_more_passes_and_moves_scores_by_rounding_alone():
    model = tiny.model("llama")
    tokenizer = tiny.tokenizer()
    usual, n_usual = scores_and_passes(Decoder.of(model, tokenizer), *prompts())
    small, n_small = scores_and_passes(Decoder.of(model, tokenizer, 40), *prompts())
    again, _ = scores_and_passes(Decoder.of(model, tokenizer, 40).unwrapped(), *prompts())
    assert n_small > n_usual
    torch.testing.assert_close(small, usual, atol=1e-4, rtol=1e-4)
    assert small.equal(again)


def test_a_budget_of_no_token_is_refused():
    with pytest.raises(ValueError, match="token_budget must be a token or more, got 0"):
        Decoder.of(tiny.model("llama"), tiny.tokenizer(), 0)


def test_a_fit_with_a_smaller_budget_learns_the_same_but_for_rounding():
    task = tiny.task()
    config = small_fit(layers=(3,), rank=2, n_prompts=6, n_queries=6, demos_per_class=5)
    routers = []
    for budget in (None, 50):
        model = tiny.model("llama")
        routers.append(
            InContextRouter.fit(model, tiny.tokenizer(), [task], config, token_budget=budget)
        )
    usual, small = routers
    torch.testing.assert_close(small.pids.query_std, usual.pids.query_std, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_run_keeps_its_budget_goes_on_with_another_and_refuses_another_dtype(
    world, tmp_path, capsys
):
    where = [*on(world), "--router", str(world / "router"), "--out", str(tmp_path / "run")]
    how = "--tasks sst2 --n-test 3 --seeds 0 --methods zero-shot --dtype float32 --device cpu"
    main.main(["eval", *where, *how.split(), "--token-budget", "64"])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["token_budget"], config["dtype"]) == (64, "float32")
    main.main(["eval", *where, *how.split(), "--token-budget", "32"])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["token_budget"] == 32
    with pytest.raises(SystemExit):
        main.main(["eval", *where, *how.split(), "--dtype", "bfloat16"])
    assert "dtype was" in capsys.readouterr().err
