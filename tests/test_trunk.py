import os
import resource
import shutil

import pytest
import torch

import tiny
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.partial import late_entry
from icrouting.decoder.passes import next_token_logits
from icrouting.fitting import trunk
from icrouting.fitting.losses import entropy
from icrouting.fitting.trunk import pad_states, run_trunk
from icrouting.routing.attach import attach

FIRST = 3


def token_lists():
    inputs = tiny.prompts((11, 5, 17, 8), "right")
    return [
        row[mask.bool()].tolist()
        for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]


@pytest.mark.parametrize("first", [0, 1, FIRST])
@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_a_pass_from_the_trunk_equals_a_whole_pass(family, first):
    model = tiny.model(family)
    decoder = Decoder.of(model, tiny.tokenizer())
    states = run_trunk(decoder, token_lists(), first, token_budget=40)
    batch, hidden = pad_states(states, 1)
    pids, routing = tiny.pids(model), tiny.routing(model, 4)
    with attach(model, pids) as attachment:
        attachment.routing = routing
        expected = next_token_logits(model, batch)
        with late_entry(model, first) as entry:
            got = entry(batch, hidden)
    assert (got - expected).abs().max() <= 1e-4


def test_the_trunk_keeps_the_plain_entropy():
    model = tiny.model("llama")
    decoder = Decoder.of(model, tiny.tokenizer())
    states = run_trunk(decoder, token_lists(), FIRST)
    for tokens, state in zip(token_lists(), states, strict=True):
        logits = model(input_ids=torch.tensor([tokens])).logits[0, -1:]
        assert state.entropy == pytest.approx(entropy(logits).item(), abs=1e-4)
        assert state.tokens == tokens


def test_only_the_layers_from_the_first_routed_one_run():
    model = tiny.model("llama")
    decoder = Decoder.of(model, tiny.tokenizer())
    batch, hidden = pad_states(run_trunk(decoder, token_lists(), FIRST), 1)
    ran = []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda module, args, index=index: ran.append(index))
    with late_entry(model, FIRST) as entry:
        entry(batch, hidden)
    assert ran == [3, 4]


def test_leaving_puts_the_layers_back_after_an_exception_too():
    model = tiny.model("llama")
    before = list(model.model.layers)
    with pytest.raises(RuntimeError), late_entry(model, FIRST):
        raise RuntimeError
    assert list(model.model.layers) == before


def test_a_finished_file_is_taken_up_and_another_models_is_not(tmp_path):
    model = tiny.model("llama")
    decoder = Decoder.of(model, tiny.tokenizer())
    first = run_trunk(decoder, token_lists(), FIRST, tmp_path)
    ran = []
    with model.register_forward_pre_hook(lambda *_: ran.append(1)):
        again = run_trunk(decoder, token_lists(), FIRST, tmp_path)
        assert not ran
        run_trunk(decoder, token_lists(), FIRST - 1, tmp_path)
        assert ran
    for a, b in zip(first, again, strict=True):
        assert (a.tokens, a.entropy) == (b.tokens, b.entropy)
        assert torch.equal(a.hidden, b.hidden)


@pytest.mark.parametrize("n_more", [-4, 4])  # bytes
def test_a_file_of_another_size_is_not_a_finished_one(n_more, tmp_path):
    model = tiny.model("llama")
    decoder = Decoder.of(model, tiny.tokenizer())
    # Copies, since the file under the states is about to change.
    first = [state.hidden.clone() for state in run_trunk(decoder, token_lists(), FIRST, tmp_path)]
    n_bytes = (tmp_path / trunk.TRUNK_FILE).stat().st_size
    os.truncate(tmp_path / trunk.TRUNK_FILE, n_bytes + n_more)
    again = run_trunk(decoder, token_lists(), FIRST, tmp_path)
    assert (tmp_path / trunk.TRUNK_FILE).stat().st_size == n_bytes
    for state, hidden in zip(again, first, strict=True):
        assert torch.equal(state.hidden, hidden)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_file_holds_the_very_states(dtype, tmp_path):
    model = tiny.model("llama").to(dtype)
    decoder = Decoder.of(model, tiny.tokenizer())
    seen = {}

    def keep(module, args, kwargs):
        seen["hidden"] = args[0] if args else kwargs["hidden_states"]

    with model.model.layers[FIRST].register_forward_pre_hook(keep, with_kwargs=True):
        for tokens in token_lists():
            (state,) = run_trunk(decoder, [tokens], FIRST)
            assert torch.equal(state.hidden, seen["hidden"][0])
            assert state.hidden.dtype == dtype


def test_a_disk_without_room_is_named_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    decoder = Decoder.of(tiny.model("llama"), tiny.tokenizer())
    with pytest.raises(OSError, match=r"has room for 0\.0 GB: choose a folder on another disk"):
        run_trunk(decoder, token_lists(), FIRST, tmp_path)


def test_a_disk_that_fills_while_states_are_written_leaves_a_fit_that_can_go_on(
    tmp_path, monkeypatch
):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    decoder = Decoder.of(tiny.model("llama"), tiny.tokenizer())
    allocate = trunk._allocate

    def shrink(file, n_bytes):
        allocate(file, n_bytes)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes // 2, limits[1]))

    run_trunk(decoder, token_lists(), FIRST, tmp_path)
    (tmp_path / trunk.TRUNK_FILE).unlink()  # as a finished training leaves it
    monkeypatch.setattr(trunk, "_allocate", shrink)
    try:
        with pytest.raises(OSError, match=r"cannot write .*trunk.bin .*File too large.*make room"):
            run_trunk(decoder, token_lists(), FIRST, tmp_path, token_budget=20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    assert not (tmp_path / "trunk.safetensors").exists()
    states = run_trunk(decoder, token_lists(), FIRST, tmp_path)
    assert len(states) == len(token_lists())
