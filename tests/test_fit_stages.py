"""`icr fit` with other settings: what it takes up, what it says, and what it leaves alone."""

import pytest

from commands import fit
from icrouting.icr import InContextRouter


def said(capsys):
    return " ".join(capsys.readouterr().out.split())


def test_fits_that_share_stages_extract_once_and_say_so(
    world, encoder_folder, tmp_path, capsys, monkeypatch
):
    shared = ("--stages", str(tmp_path / "stages"))
    fit(world, encoder_folder, tmp_path / "a", *shared)
    assert "extraction kept" not in said(capsys)
    for place in (
        "icrouting.fitting.extraction.capture_last_tokens",
        "icrouting.fitting.trunk._fill",
    ):
        monkeypatch.setattr(place, lambda *args, **kwargs: pytest.fail("computed again"))
    fit(world, encoder_folder, tmp_path / "b", *shared, "--lr", "0.5", "--rank", "3")
    assert "extraction kept: 9 prompts trunk kept" in said(capsys)
    assert InContextRouter.from_pretrained(tmp_path / "b").pids.rank == 3


def test_a_router_of_other_settings_is_not_overwritten_and_its_stages_are_offered(
    world, encoder_folder, tmp_path, capsys
):
    before = (world / "router" / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit):
        fit(world, encoder_folder, world / "router", "--lr", "0.5")
    stages = world / "router" / "fit"
    assert f"with --stages {stages} it takes up" in " ".join(capsys.readouterr().err.split())
    fit(world, encoder_folder, tmp_path / "other", "--stages", str(stages), "--lr", "0.5")
    assert "extraction kept: 9 prompts" in said(capsys)
    assert (world / "router" / "model.safetensors").read_bytes() == before
