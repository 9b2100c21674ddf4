"""Stages are found by what they depend on: whatever changes them asks for others, and no more."""

import dataclasses
import json
import shutil
import threading

import pytest
import torch
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing

import tiny
from fitted import small_fit
from icrouting.decoder.decoder import Decoder
from icrouting.fitting import extraction, stages, trunk
from icrouting.fitting.shelf import (
    EXTRACTION,
    EXTRACTION_SETTINGS,
    TRUNK,
    TRUNK_SETTINGS,
    Shelf,
    delete_trunks,
)
from icrouting.fitting.training import Trainer
from icrouting.icr import InContextRouter
from icrouting.runtime.locks import locked
from icrouting.runtime.storage import load_tensors, save_tensors

LAYERS = (3, 4)
CONFIG = small_fit(layers=LAYERS, hidden_width=5)


@pytest.fixture(scope="module")
def model():
    return tiny.model("llama")


@pytest.fixture
def ran(monkeypatch):
    """The stages that ran, in order."""
    names = []
    capture, fill = extraction.capture_last_tokens, trunk._fill
    monkeypatch.setattr(
        extraction,
        "capture_last_tokens",
        lambda *args, **kwargs: names.append("extraction") or capture(*args, **kwargs),
    )
    monkeypatch.setattr(trunk, "_fill", lambda *args: names.append("trunk") or fill(*args))
    return names


def fit(model, tokenizer, folder=None, shelf=None, tasks=None, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return InContextRouter.fit(
        model, tokenizer, tasks or [tiny.task()], config, folder=folder, stages=shelf
    )


def places(model, tokenizer, root, tasks=None, layers=LAYERS, **changes):
    decoder = Decoder.of(model, tokenizer)
    config = dataclasses.replace(CONFIG, **changes)
    shelf = Shelf.of(root, decoder, tasks or [tiny.task()], layers, config)
    return shelf.extraction, shelf.trunk


@pytest.mark.parametrize(
    ("changes", "is_extraction_kept", "is_trunk_kept"),
    [
        ({"lr": 0.5}, True, True),
        ({"epochs": 3}, True, True),
        ({"w_gate": 1.0}, True, True),
        ({"rank": 2}, True, True),
        ({"basis": "random"}, True, True),
        ({"basis": "learned"}, True, True),
        ({"hidden_width": 9}, True, True),
        ({"n_queries": 7}, True, False),
        ({"max_tokens": 9}, True, False),
        ({"n_prompts": 9}, False, True),
        ({"demos_per_class": 2}, False, True),
        ({"queries_per_context": 2}, False, True),
        ({"extract_from": "zero-shot"}, False, True),
        ({"extract_from": "shuffled"}, False, True),
        ({"pooling": "last-4"}, False, True),
        ({"demo_selection": "random"}, False, True),
        ({"skip_nan": True}, False, True),
        ({"layers": (3,)}, False, True),
        ({"layers": (2, 3)}, False, False),
        ({"seed": 1}, False, False),
        ({"tasks": [tiny.task(n_train=41)]}, False, False),
        ({"tasks": [tiny.task(n_test=13)]}, True, True),
    ],
)
def test_a_stage_is_kept_where_nothing_changes_it(
    changes, is_extraction_kept, is_trunk_kept, model, tokenizer, tmp_path
):
    before = places(model, tokenizer, tmp_path)
    after = places(model, tokenizer, tmp_path, **changes)
    assert (before[0] == after[0], before[1] == after[1]) == (is_extraction_kept, is_trunk_kept)


def test_every_setting_of_a_fit_is_either_of_a_stage_or_of_none():
    """A setting that is added to the fit must be decided on here."""
    of_no_stage = {"rank", "basis", "encoder", "hidden_width", "ce_scope", "w_conf", "w_spar"}
    of_no_stage |= {"w_gate", "deepest_weight", "final_alpha_scale", "lr", "batch_size", "epochs"}
    of_no_stage |= {"grad_clip", "layers", "min_steps", "patience", "bias_rows"}
    of_a_stage = {*EXTRACTION_SETTINGS, *TRUNK_SETTINGS}
    assert set(vars(CONFIG)) == of_a_stage | of_no_stage


def test_a_stage_is_found_by_what_earlier_versions_knew_of(model, tokenizer, tmp_path):
    """A setting that they lacked is named where it is not what they did."""
    decoder = Decoder.of(model, tokenizer)
    about = Shelf.of(tmp_path, decoder, [tiny.task()], LAYERS, CONFIG).about
    common = {"model", "dtype", "context_length", "tokens", "rows"}
    of_prompts = {"n_prompts", "demos_per_class", "queries_per_context", "skip_nan", "seed"}
    assert about[EXTRACTION].keys() == common | of_prompts | {"layers"}
    of_queries = {"n_queries", "max_tokens", "seed"}
    assert about[TRUNK].keys() == common | of_queries | {"first_layer"}


def test_nearest_demonstrations_are_those_of_one_encoder(
    model, tokenizer, tmp_path, encoder_folder
):
    """Whose weights count, wherever they lie."""
    nearest = {"demo_selection": "nearest"}
    first = places(model, tokenizer, tmp_path, **nearest, encoder=str(encoder_folder))
    assert first[0] != places(model, tokenizer, tmp_path)[0]
    shutil.copytree(encoder_folder, tmp_path / "copy")
    copied = places(model, tokenizer, tmp_path, **nearest, encoder=str(tmp_path / "copy"))
    assert copied == first
    weights = tmp_path / "copy" / "model.safetensors"
    tensors, _ = load_tensors(weights)
    changed = {name: value + 1.0 for name, value in tensors.items()}
    save_file(changed, weights, {"format": "pt"})
    shutil.move(tmp_path / "copy", tmp_path / "other")
    other = places(model, tokenizer, tmp_path, **nearest, encoder=str(tmp_path / "other"))
    assert other[0] != first[0]
    assert other[1] == first[1]


def test_another_model_or_dtype_finds_nothing(model, tokenizer, tmp_path):
    before = places(model, tokenizer, tmp_path)
    for other in (tiny.model("llama", seed=1), tiny.model("llama").bfloat16()):
        after = places(other, tokenizer, tmp_path)
        assert before[0] != after[0]
        assert before[1] != after[1]


def beginning_tokenizer():
    """The tiny tokenizer, which puts a token before every text."""
    tokenizer = tiny.tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 0)]
    )
    return tokenizer


def test_a_folder_s_training_does_not_go_on_with_another_tokenizer(
    model, tokenizer, tmp_path, caplog
):
    fit(model, tokenizer, tmp_path)
    assert fit(model, beginning_tokenizer(), tmp_path) == fit(model, beginning_tokenizer())
    assert "tokens was" in caplog.text
    assert (tmp_path / "former-1" / "training.safetensors").exists()


def test_a_folder_that_does_not_tell_its_tokenizer_goes_on(model, tokenizer, tmp_path, caplog):
    fit(model, tokenizer, tmp_path)
    file = tmp_path / "fit.json"
    settings = json.loads(file.read_text())
    # As earlier versions wrote it.
    del settings["tokens"]
    file.write_text(json.dumps(settings))
    fit(model, tokenizer, tmp_path)
    assert "it is set aside" not in caplog.text
    assert not (tmp_path / "former-1").exists()


def test_another_tokenizer_of_the_same_vocabulary_finds_nothing(model, tokenizer, tmp_path):
    before = places(model, tokenizer, tmp_path)
    after = places(model, beginning_tokenizer(), tmp_path)
    assert before[0] != after[0]
    assert before[1] != after[1]
    # Loaded anew it is the same one.
    assert places(model, tiny.tokenizer(), tmp_path) == before


def test_another_rank_extracts_and_runs_the_trunk_once_and_fits_the_same_router(
    model, tokenizer, tmp_path, ran
):
    fit(model, tokenizer, tmp_path)
    assert ran == ["extraction", "trunk"]
    shared = fit(model, tokenizer, tmp_path, rank=2, lr=0.01)
    assert ran == ["extraction", "trunk"]
    assert shared == fit(model, tokenizer, rank=2, lr=0.01), "and bit for bit"


def test_directions_that_are_kept_are_not_computed_again(
    model, tokenizer, tmp_path, ran, monkeypatch
):
    first = fit(model, tokenizer, shelf=tmp_path)
    monkeypatch.setattr(stages, "fit_pids", lambda *args: pytest.fail("computed again"))
    second = fit(model, tokenizer, shelf=tmp_path)
    assert second == first
    assert ran == ["extraction", "trunk"]


def test_moments_that_are_damaged_are_named_where_they_are_needed(model, tokenizer, tmp_path):
    fit(model, tokenizer, shelf=tmp_path)
    (file,) = tmp_path.rglob("moments.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"moments\.safetensors is damaged"):
        fit(model, tokenizer, shelf=tmp_path, rank=2)
    file.unlink()
    assert fit(model, tokenizer, shelf=tmp_path, rank=2) == fit(model, tokenizer, rank=2)


def test_a_shelf_says_what_is_kept(model, tokenizer, tmp_path, monkeypatch):
    decoder = Decoder.of(model, tokenizer)
    asked = (decoder, [tiny.task()], CONFIG, tmp_path)
    assert stages.kept_stages(*asked) == []
    monkeypatch.setattr(Trainer, "run", lambda self: None)
    fit(model, tokenizer, shelf=tmp_path)
    assert stages.kept_stages(*asked) == ["extraction kept: 12 prompts", "trunk kept"]
    delete_trunks(tmp_path)
    assert stages.kept_stages(*asked) == ["extraction kept: 12 prompts"]


def test_a_shelf_says_how_far_an_extraction_came(model, tokenizer, tmp_path):
    place, _ = places(model, tokenizer, tmp_path)
    place.mkdir()
    save_tensors(place / extraction.MOMENTS_FILE, {"count": torch.tensor(5)}, {"n_done": "5"})
    asked = (Decoder.of(model, tokenizer), [tiny.task()], CONFIG, tmp_path)
    assert stages.kept_stages(*asked) == ["extraction kept: 5 of 12 prompts"]


def test_stages_that_an_earlier_version_left_beside_fit_json_are_taken_up(
    model, tokenizer, tmp_path, ran
):
    """Half a fit: the stages are there, the training is not."""
    first = fit(model, tokenizer, tmp_path)
    for place in places(model, tokenizer, tmp_path):
        for file in place.glob("*.*"):
            if file.name.startswith(("moments", "trunk")):
                file.rename(tmp_path / file.name)
        shutil.rmtree(place)
    settings = json.loads((tmp_path / "fit.json").read_text())
    del settings["start"]
    (tmp_path / "fit.json").write_text(json.dumps(settings))
    for name in ("training.safetensors", "stages.json"):
        (tmp_path / name).unlink()
    ran.clear()
    assert "12 prompts of the extraction" in stages.progress_in(tmp_path)
    assert fit(model, tokenizer, tmp_path) == first
    assert not ran
    assert not (tmp_path / "moments.safetensors").exists()


def test_a_trunk_that_another_run_writes_is_not_deleted(tmp_path):
    place = tmp_path / "trunk-0"
    with locked(place):
        (place / "trunk.bin").touch()
        delete_trunks(tmp_path)
        assert (place / "trunk.bin").exists()
    delete_trunks(tmp_path)
    assert not (place / "trunk.bin").exists()


def test_who_needs_what_another_run_computes_waits_for_it(model, tokenizer, tmp_path, caplog):
    place, _ = places(model, tokenizer, tmp_path)
    shelf = Shelf(place, None, {EXTRACTION: {}})
    order = []

    def second():
        with shelf.opened(EXTRACTION):
            order.append("second")

    with locked(place):
        waiting = threading.Thread(target=second)
        waiting.start()
        waiting.join(0.3)
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]
    assert "waiting for it" in caplog.text


def test_a_stopped_fit_of_other_settings_is_set_aside_and_goes_on(
    model, tokenizer, tmp_path, monkeypatch, caplog
):
    update, steps = Trainer._update, []

    def interrupted(self, terms):
        if len(steps) == 1:
            raise KeyboardInterrupt
        steps.append(self.config.lr)
        update(self, terms)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "_update", interrupted)
        fit(model, tokenizer, tmp_path)
    other = fit(model, tokenizer, tmp_path, lr=0.5)
    assert "other settings (lr was 0.0001, is 0.5): it is set aside" in caplog.text
    assert other == fit(model, tokenizer, lr=0.5)
    started_at = []
    monkeypatch.setattr(
        Trainer, "_update", lambda self, terms: started_at.append(self.step) or update(self, terms)
    )
    assert fit(model, tokenizer, tmp_path) == fit(model, tokenizer)
    assert started_at[0] == 1, "the step taken is not taken again"
    assert json.loads((tmp_path / "fit.json").read_text())["lr"] == CONFIG.lr


def test_a_setting_aside_that_is_killed_loses_nothing(model, tokenizer, tmp_path, monkeypatch):
    from icrouting.fitting import former

    first = fit(model, tokenizer, tmp_path)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):

        def killed(files, folder):
            for file in files:
                file.replace(folder / file.name)
            raise KeyboardInterrupt

        patched.setattr(former, "_move", killed)
        fit(model, tokenizer, tmp_path, lr=0.5)
    monkeypatch.setattr(Trainer, "_update", lambda *args: pytest.fail("trained again"))
    again = fit(model, tokenizer, tmp_path)
    assert torch.equal(again.router.alpha[0].weight, first.router.alpha[0].weight)


def test_a_fit_in_another_dtype_is_another_fit(tokenizer, tmp_path, caplog):
    halved = tiny.model("llama").bfloat16()
    fit(halved, tokenizer, tmp_path)
    anew = fit(tiny.model("llama"), tokenizer, tmp_path / "alone")
    again = fit(tiny.model("llama"), tokenizer, tmp_path)
    assert "dtype was" in caplog.text
    assert again.digest() == anew.digest()


@pytest.mark.parametrize("basis", ["pca", "random"])
def test_what_more_layers_saw_serves_fewer_bit_for_bit(basis, model, tokenizer, tmp_path, ran):
    fit(model, tokenizer, shelf=tmp_path / "shelf", layers=(2, 3, 4), rank=2)
    ran.clear()
    taken = fit(model, tokenizer, shelf=tmp_path / "shelf", layers=(2, 4), basis=basis)
    assert "extraction" not in ran
    alone = fit(model, tokenizer, layers=(2, 4), basis=basis)
    assert torch.equal(taken.pids.query_pids, alone.pids.query_pids)
    assert taken.digest() == alone.digest()


def test_what_other_prompts_or_fewer_layers_saw_serves_nobody(model, tokenizer, tmp_path, ran):
    fit(model, tokenizer, shelf=tmp_path / "shelf", layers=(3, 4))
    for changes in ({"layers": (2, 3, 4)}, {"layers": (4,), "n_prompts": 11}):
        ran.clear()
        fit(model, tokenizer, shelf=tmp_path / "shelf", **changes)
        assert "extraction" in ran


def test_fits_on_one_shelf_read_validation_rows_once(model, tokenizer, tmp_path, ran):
    watched = {"patience": 2, "min_steps": 5, "tasks": [tiny.task("sst2"), tiny.task("mr")]}
    alone = fit(model, tokenizer, folder=tmp_path / "alone", rank=2, **watched)
    ran.clear()
    for rank in (3, 2):
        shared = fit(
            model, tokenizer, tmp_path / f"{rank}", tmp_path / "shelf", rank=rank, **watched
        )
    # The training queries' and the validation rows'.
    assert ran.count("trunk") == 2
    assert shared.digest() == alone.digest()
