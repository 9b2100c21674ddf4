"""An artifact's gate: fitted from the states that a fit has, saved and used with the router."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch

import tiny
from fitted import small_fit
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.partial import entering_states
from icrouting.decoder.scoring import score_options
from icrouting.fitting import gating
from icrouting.icr import InContextRouter
from icrouting.routing import gate as room
from icrouting.routing.gate import Gaussian, PromptGate, distances_left_out, limit_of

TASK = tiny.task("toy", n_train=60, n_test=30)
CONFIG = small_fit(demos_per_class=2, n_queries=60, lr=0.05, w_gate=0.0, epochs=3)
KNOWN = [TASK.prompt(example) for example in TASK.train[:4]]
# Some states of a random model's other prompts may lie among the known ones.
OTHERS = [f"{row.fields['text']} quite{'!' * n}" for n, row in enumerate(TASK.test[:8], start=1)]
OPTIONS = TASK.spec.options


@pytest.fixture(scope="module")
def model():
    return tiny.model("llama")


@pytest.fixture(scope="module")
def icr(model, tokenizer):
    return InContextRouter.fit(model, tokenizer, [TASK], CONFIG)


@pytest.fixture(scope="module")
def new(icr, model, tokenizer):
    """Prompts that the gate leaves alone."""
    reader = icr.reader(Decoder.of(model, tokenizer))
    states = entering_states(reader.decoder, tokenizer(OTHERS).input_ids, 3)
    is_known = icr.gate(states)
    prompts = [text for text, known in zip(OTHERS, is_known.tolist(), strict=True) if not known]
    assert len(prompts) >= 2
    return prompts


def scores(icr, model, tokenizer, prompts, **settings):
    with icr.attached(model, tokenizer, **settings) as routed:
        return routed.score(prompts, OPTIONS)


def test_distances_of_rows_left_out_are_those_of_a_gaussian_without_them():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(29, 43, generator=generator) * torch.linspace(0.1, 3, 43)
    slow = []
    for row in range(len(states)):
        others = torch.cat([states[:row], states[row + 1 :]])
        slow.append(Gaussian.of(others).distances(states[row : row + 1]))
    # A Gaussian's ball is rounded to float32.
    assert torch.allclose(distances_left_out(states), torch.cat(slow), rtol=1e-6)


@pytest.mark.parametrize(("n_rows", "place"), [(26, 26), (98, 98), (99, 99), (200, 199)])
def test_the_limit_is_the_distance_that_a_new_row_passes_with_the_chance_it_may(n_rows, place):
    distances = torch.randperm(n_rows).double() + 1
    assert limit_of(distances) == place


def test_the_gate_is_that_of_the_states_which_enter_the_first_routed_layer(icr, model, tokenizer):
    with torch.no_grad():
        rows = [
            model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[3][0, -1]
            for tokens in tokenizer([TASK.prompt(row) for row in TASK.train]).input_ids
        ]
    slow = PromptGate.of([torch.stack(rows)])
    assert icr.gate.numbers.rows == (60,)
    assert icr.gate.numbers.limits == pytest.approx(slow.numbers.limits, rel=1e-3)


def test_a_prompt_left_alone_has_the_base_models_scores_and_another_is_routed(
    icr, new, model, tokenizer
):
    plain = score_options(model, tokenizer, KNOWN + new, OPTIONS)
    routed = scores(icr, model, tokenizer, KNOWN + new, gate=False)
    gated = scores(icr, model, tokenizer, KNOWN + new)
    assert (routed - plain).abs().amax(1).min() > 1e-3, "the test's router does nothing"
    n_known = len(KNOWN)
    assert torch.allclose(gated[:n_known], routed[:n_known], atol=1e-5)
    assert torch.allclose(gated[n_known:], plain[n_known:], atol=1e-5)


@pytest.mark.parametrize("gate", [False, None])
def test_without_its_gate_a_router_routes_everything(gate, icr, new, model, tokenizer):
    bare = replace(icr, gate=None)
    asked = scores(icr, model, tokenizer, new, gate=gate)
    assert torch.equal(asked, scores(bare, model, tokenizer, new))


def test_a_fit_without_a_gate_is_the_same_router(icr, model, tokenizer):
    bare = InContextRouter.fit(model, tokenizer, [TASK], CONFIG, gate=False)
    assert bare.gate is None
    assert bare.digest() == icr.digest()


def test_a_saved_gate_is_the_same(icr, new, model, tokenizer, tmp_path):
    icr.save_pretrained(tmp_path / "router")
    again = InContextRouter.from_pretrained(tmp_path / "router")
    assert again == icr
    assert again.gate == icr.gate
    prompts = KNOWN + new
    expected = scores(icr, model, tokenizer, prompts)
    assert torch.equal(scores(again, model, tokenizer, prompts), expected)
    again.save_pretrained(tmp_path / "copy")
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "router" / name).read_bytes()


def test_routers_that_differ_in_their_gate_are_not_equal(icr):
    assert icr != replace(icr, gate=None)


def test_a_gate_that_does_not_fit_its_sources_is_refused(icr, tmp_path):
    icr.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["gate"]["rows"] = [30, 30]
    config["checksum"] = room_checksum(config)
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="rows and a limit for each of 1 sources, has 2 and 1"):
        InContextRouter.from_pretrained(tmp_path)


def room_checksum(config):
    from icrouting.routing import artifact

    return artifact._checksum(config)


def test_a_gate_of_other_rows_than_its_tensor_has_is_refused(icr, tmp_path):
    icr.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["gate"]["rows"] = [59]
    config["checksum"] = room_checksum(config)
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"'gate.states' should be .*59"):
        InContextRouter.from_pretrained(tmp_path)


def test_a_gate_of_other_sources_than_its_routers_is_not_saved(icr, tmp_path):
    odd = replace(icr, gate=PromptGate.joined([icr.gate, icr.gate]))
    with pytest.raises(ValueError, match="rows and a limit for each of 1 sources, has 2 and 2"):
        odd.save_pretrained(tmp_path / "router")
    assert not (tmp_path / "router").exists()


def test_too_few_rows_make_a_router_without_a_gate_and_a_line_that_says_so(
    model, tokenizer, caplog
):
    few = replace(TASK, train=TASK.train[:25])
    with caplog.at_level(logging.WARNING):
        icr = InContextRouter.fit(model, tokenizer, [few], CONFIG)
    assert icr.gate is None
    assert "no gate, so it routes every prompt: it takes 26 training queries" in caplog.text
    assert "toy has 25" in caplog.text


def test_a_router_from_layer_0_on_has_no_gate(caplog):
    assert gating.fit_gate([], [TASK], 0) is None
    assert "layer 0 tells no prompts apart" in caplog.text


def test_a_gate_keeps_at_most_200_rows_of_a_source():
    states = torch.randn(230, 11, generator=torch.Generator().manual_seed(1))
    gate = PromptGate.of([states, states[:30]])
    assert gate.numbers.rows == (room.N_KNOWN, 30)


def test_each_source_has_a_limit_of_its_own():
    generator = torch.Generator().manual_seed(2)
    tight = torch.randn(60, 7, generator=generator)
    both = PromptGate.of([tight, 50 + tight * 9])
    alone = PromptGate.of([tight])
    assert both.numbers.limits[0] == alone.numbers.limits[0]


@pytest.mark.parametrize("n_rows", [50, 120])
def test_a_gate_of_few_rows_leaves_few_of_its_own_alone(n_rows):
    """A share of 1 / (n + 1), or 1 %, over draws of rows with tails that are not a Gaussian's."""
    generator = torch.Generator().manual_seed(n_rows)
    shares = []
    for _ in range(25):
        rows = torch.randn(n_rows + 200, 61, generator=generator) * torch.linspace(0.1, 3, 61)
        rows = rows / torch.rand(len(rows), 1, generator=generator).clamp_min(0.1).sqrt()
        gate = PromptGate.of([rows[:n_rows]])
        shares.append(1 - gate([row[None] for row in rows[n_rows:]]).float().mean())
    expected = max(1 / (n_rows + 1), room.SHUT_OUT)
    assert float(torch.stack(shares).mean()) == pytest.approx(expected, rel=0.5)


def test_a_router_saved_before_gates_is_saved_to_the_same_bytes(saved_router, tmp_path):
    shutil.copytree(saved_router, tmp_path / "old")
    icr = InContextRouter.from_pretrained(tmp_path / "old")
    icr.save_pretrained(tmp_path / "new")
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (tmp_path / "new" / name).read_bytes() == (saved_router / name).read_bytes()
    config = json.loads((saved_router / "config.json").read_text())
    assert "gate" not in config
    assert "words" not in config["sources"][0]


def test_the_effect_on_prompts_that_the_gate_left_alone_names_the_gate(icr, new, model, tokenizer):
    with (
        icr.attached(model, tokenizer) as routed,
        pytest.warns(UserWarning, match="the gate left the base model to answer"),
    ):
        routed.effect(new)
    bare = replace(icr, gate=None)
    with (
        bare.attached(model, tokenizer, strength=0.0) as routed,
        pytest.warns(UserWarning, match="is `strength` 0"),
    ):
        routed.effect(new)


def test_a_router_with_a_gate_is_saved_over_an_older_one_with_a_gate(icr, tmp_path):
    icr.save_pretrained(tmp_path)
    icr.save_pretrained(tmp_path)
    assert InContextRouter.from_pretrained(tmp_path) == icr
