import json
import random
import shutil

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

import tiny
from icrouting import artifact
from icrouting.config import FitConfig
from icrouting.features import features_of
from icrouting.icr import InContextRouter
from icrouting.router import Router


@pytest.fixture(scope="module")
def folder(tmp_path_factory, encoder_folder):
    where = tmp_path_factory.mktemp("artifact")
    model = tiny.model("qwen2")
    fit = FitConfig(layers=(3, 4), rank=3, hidden_width=5, basis="pca")
    description = artifact.describe(
        model, [tiny.task()], fit, (3, 4), features_of(str(encoder_folder), model, tiny.tokenizer(), "cpu")
    )
    router = Router(12, 2, 6, 3, 5, torch.Generator().manual_seed(0))
    artifact.save(where, description, tiny.pids(model), router)
    return where


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def edit(folder, sign=True, **changes):
    """Changes config.json and, with `sign`, puts the checksums right, as a careful forger would."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    config = {key: value for key, value in config.items() if value is not None}
    if sign:
        config["checksum"] = artifact._checksum(config)
    file.write_text(json.dumps(config))


def swap_weights(folder, change):
    import hashlib

    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    edit(folder, weights_sha256=hashlib.sha256(file.read_bytes()).hexdigest())


def test_the_folder_explains_itself(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["format_version"] == 1
    assert config["layers"] == [3, 4]
    assert config["fit"]["rank"] == 3
    assert "before rotary" in config["site"]
    card = (folder / "README.md").read_text()
    assert "toy (40)" in card
    assert "{" not in card.replace("{base_model}", "{")
    assert {file.suffix for file in folder.iterdir()} == {".json", ".safetensors", ".md"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format_version": 2}, "is of format 2, this version reads 1: update icrouting"),
        ({"method": "lora"}, "does not describe an icrouting artifact"),
        ({"colour": "red"}, r"keys \['colour'\] are unknown or missing"),
        ({"n_heads": None}, r"keys \['n_heads'\] are unknown or missing"),
        ({"n_heads": 5}, "should be"),
        ({"layers": [3]}, "should be"),
        ({"fit": {"rank": 3}}, "unknown or missing"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(copy, changes, said):
    edit(copy, **changes)
    with pytest.raises(ValueError, match=said):
        InContextRouter.from_pretrained(copy)


def test_an_edited_config_is_refused(copy):
    edit(copy, sign=False, base_model="another")
    with pytest.raises(ValueError, match="checksum does not match"):
        InContextRouter.from_pretrained(copy)


def test_weights_with_nan_or_wrong_shapes_are_refused(copy):
    swap_weights(copy, lambda tensors: tensors["pids.key_pids"].fill_(torch.nan))
    with pytest.raises(ValueError, match=r"pids\.key_pids holds NaN"):
        InContextRouter.from_pretrained(copy)
    swap_weights(copy, lambda tensors: tensors.update({"pids.key_pids": torch.zeros(2, 2, 2)}))
    with pytest.raises(ValueError, match=r"key_pids should be \(2, 16, 3\), is \(2, 2, 2\)"):
        InContextRouter.from_pretrained(copy)
    swap_weights(copy, lambda tensors: tensors.pop("pids.key_pids"))
    with pytest.raises(ValueError, match="is None"):
        InContextRouter.from_pretrained(copy)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        InContextRouter.from_pretrained(copy)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_no_damaged_file_is_accepted(copy, name):
    whole, rng = (copy / name).read_bytes(), random.Random(0)
    for _ in range(150):
        damaged = bytearray(whole)
        if rng.random() < 0.3:
            damaged = damaged[: rng.randrange(len(damaged))]
        else:
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        (copy / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged|format|describe|keys"):
            InContextRouter.from_pretrained(copy)


def test_what_is_neither_folder_nor_hub_id_is_refused(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network\nand more")

    monkeypatch.setattr(artifact, "snapshot_download", offline)
    with pytest.raises(
        ValueError, match=r"no router at 'someone/some-router': expected a folder or a hub id; no network$"
    ):
        InContextRouter.from_pretrained("someone/some-router")


def test_a_router_goes_to_the_hub_and_comes_back(folder, tmp_path, monkeypatch):
    hub = tmp_path / "hub"

    class Url(str):
        repo_id = "someone/some-router"

    def upload(self, repo_id, folder_path, allow_patterns):
        assert repo_id == "someone/some-router"
        for pattern in allow_patterns:
            hub.mkdir(exist_ok=True)
            shutil.copy(f"{folder_path}/{pattern}", hub)

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, private, exist_ok: Url("address"))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr(artifact, "snapshot_download", lambda name, revision, allow_patterns: str(hub))
    icr = InContextRouter.from_pretrained(folder)
    assert icr.push_to_hub("someone/some-router") == "address"
    assert InContextRouter.from_pretrained("someone/some-router", revision="main").digest() == icr.digest()
