import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from icrouting.icr import InContextRouter
from icrouting.routing import artifact
from icrouting.routing.card import with_results
from icrouting.routing.inspection import inspect_prompt
from icrouting.routing.router import Router
from local_hub import COMMIT, local_hub


@pytest.fixture
def copy(saved_router, tmp_path):
    return shutil.copytree(saved_router, tmp_path / "copy")


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


def test_the_folder_explains_itself(saved_router):
    config = json.loads((saved_router / "config.json").read_text())
    assert config["format_version"] == 1
    assert config["layers"] == [3, 4]
    assert config["fit"]["rank"] == 3
    assert "before rotary" in config["site"]
    card = (saved_router / "README.md").read_text()
    assert "toy (40)" in card
    # What the template of the card left unfilled would show; the task's own has a slot.
    assert "{" not in card.replace("Review: {text}", "")
    assert {file.suffix for file in saved_router.iterdir()} == {".json", ".safetensors", ".md"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format_version": 2}, "is of format 2, this version reads 1: update icrouting"),
        ({"method": "lora"}, "does not describe an icrouting artifact"),
        ({"colour": "red"}, r"keys \['colour'\] are unknown or missing"),
        ({"n_heads": None}, r"keys \['n_heads'\] are unknown or missing"),
        ({"n_heads": 5}, "should be"),
        ({"layers": [3]}, "not those of the fit"),
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
    with pytest.raises(ValueError, match=r"key_pids' should be \(\(2, 16, 3\).*, is \(\(2, 2, 2\)"):
        InContextRouter.from_pretrained(copy)
    swap_weights(copy, lambda tensors: tensors.pop("pids.key_pids"))
    with pytest.raises(ValueError, match="is None"):
        InContextRouter.from_pretrained(copy)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        InContextRouter.from_pretrained(copy)


def test_what_is_neither_folder_nor_hub_id_is_refused(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network\nand more")

    monkeypatch.setattr(artifact, "snapshot_download", offline)
    with pytest.raises(
        ValueError,
        match=r"no router at 'someone/some-router': expected a folder or a hub id; no network$",
    ):
        InContextRouter.from_pretrained("someone/some-router")


def test_a_router_goes_to_the_hub_and_comes_back_with_its_results(
    saved_router, tmp_path, monkeypatch
):
    fitted = InContextRouter(*artifact.load(saved_router)[:3])
    fitted.save_pretrained(tmp_path / "router")
    card = tmp_path / "router" / "README.md"
    card.write_text(with_results(card.read_text(), "It is good.\n"))
    with local_hub(monkeypatch, tmp_path / "cache") as hub:
        icr = InContextRouter.from_pretrained(tmp_path / "router")
        address = icr.push_to_hub("someone/some-router", private=True, token="hf_secret")
        assert address.endswith(f"/someone/some-router/commit/{COMMIT}")
        assert hub.created == {
            "name": "some-router",
            "organization": "someone",
            "visibility": "private",
        }
        assert hub.tokens == {"Bearer hf_secret"}
        names = ("config.json", "model.safetensors", "README.md")
        assert hub.files == {name: (tmp_path / "router" / name).read_bytes() for name in names}
        hub.files["pytorch_model.bin"] = b"never asked for"
        again = InContextRouter.from_pretrained("someone/some-router", revision="main")
        assert not any("pytorch" in path for _, path in hub.requests)
        again.save_pretrained(tmp_path / "again")
        with pytest.raises(
            ValueError, match="no router at 'someone/another': expected a folder or a hub id; 404"
        ):
            InContextRouter.from_pretrained("someone/another")
    assert again.digest() == icr.digest()
    assert (tmp_path / "again" / "README.md").read_text() == card.read_text()


def test_a_bad_hub_id_is_refused(saved_router):
    with pytest.raises(ValueError, match="Repo id must"):
        InContextRouter.from_pretrained(saved_router).push_to_hub("a b/c")


@pytest.mark.slow
def test_saving_keeps_the_card_of_these_weights_and_no_other(saved_router, tmp_path):
    icr = InContextRouter.from_pretrained(saved_router)
    icr.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    card.write_text(card.read_text() + "By hand.")
    dataclasses.replace(icr, folder=None).save_pretrained(tmp_path)
    assert card.read_text().endswith("By hand.")
    other = Router(12, 2, 6, 3, 5, torch.Generator().manual_seed(1))
    InContextRouter(icr.description, icr.pids, other).save_pretrained(tmp_path)
    assert "By hand." not in card.read_text()
    assert InContextRouter.from_pretrained(tmp_path).generate_model_card().text in card.read_text()


@pytest.fixture
def other(saved_router):
    """Another router of the same base model."""
    icr = InContextRouter.from_pretrained(saved_router)
    router = Router(12, 2, 6, 3, 5, torch.Generator().manual_seed(1))
    return InContextRouter(icr.description, icr.pids, router)


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_saving_over_a_models_files_is_refused_and_leaves_them(other, name, tmp_path):
    tiny.save(tmp_path / "model")
    folder = tmp_path / "target"
    folder.mkdir()
    shutil.copy(tmp_path / "model" / name, folder / name)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"{name} is not a router's and would be overwritten"):
        other.save_pretrained(folder)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("beside", [(), ("config.json",), ("config.json", "model.safetensors")])
def test_saving_over_a_readme_by_hand_is_refused_and_leaves_it(
    other, saved_router, beside, tmp_path
):
    for name in beside:
        shutil.copy(saved_router / name, tmp_path / name)
    (tmp_path / "README.md").write_text("# My project")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"README\.md is not a router's and would be"):
        other.save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_saving_to_a_file_is_refused(other, tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="notes is a file: expected a folder"):
        other.save_pretrained(tmp_path / "notes")


def test_saving_over_a_router_leaves_what_lies_beside_it(other, copy):
    (copy / "fit").mkdir()
    (copy / "fit" / "fit.json").write_text("{}")
    other.save_pretrained(copy)
    assert InContextRouter.from_pretrained(copy).digest() == other.digest()
    assert (copy / "fit" / "fit.json").exists()


def test_a_damaged_router_is_written_anew(other, copy):
    (copy / "model.safetensors").write_bytes(b"cut")
    other.save_pretrained(copy)
    assert InContextRouter.from_pretrained(copy).digest() == other.digest()


@pytest.mark.parametrize("is_new", [True, False])
def test_saving_that_is_killed_leaves_a_router_or_none_and_can_be_done_again(
    other, saved_router, is_new, tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    old = InContextRouter.from_pretrained(saved_router)
    for n_steps in range(20):
        folder = tmp_path / f"killed after {n_steps}"
        if not is_new:
            shutil.copytree(saved_router, folder)
        steps_left = [n_steps]

        def limited(step, steps_left=steps_left):
            def done(*arguments, **settings):
                if not steps_left[0]:
                    raise Killed
                steps_left[0] -= 1
                return step(*arguments, **settings)

            return done

        with monkeypatch.context() as patch:
            for name in ("replace", "rename", "unlink", "write_bytes", "write_text", "mkdir"):
                patch.setattr(Path, name, limited(getattr(Path, name)))
            try:
                other.save_pretrained(folder)
                is_killed = False
            except Killed:
                is_killed = True
        if (folder / "config.json").exists():
            digest = InContextRouter.from_pretrained(folder).digest()
            assert digest in (old.digest(), other.digest())
        other.save_pretrained(folder)
        assert InContextRouter.from_pretrained(folder).digest() == other.digest()
        if not is_killed:
            break
    assert 3 < n_steps < 19


def test_recording_results_never_takes_the_router_away(saved_router, copy, monkeypatch):
    def refuse(file, missing_ok=False):
        raise AssertionError(f"{file} would be taken away")

    monkeypatch.setattr(Path, "unlink", refuse)
    InContextRouter.from_pretrained(copy).save_pretrained(copy)
    assert contents(copy).keys() == {copy / file.name for file in saved_router.iterdir()}


def test_a_repository_of_something_else_is_not_overwritten(saved_router, tmp_path, monkeypatch):
    with local_hub(monkeypatch, tmp_path / "cache") as hub:
        hub.files["config.json"] = b'{"model_type": "llama"}'
        icr = InContextRouter.from_pretrained(saved_router)
        with pytest.raises(ValueError, match=r"'someone/some-router' holds a config\.json that is"):
            icr.push_to_hub("someone/some-router")
        assert hub.files == {"config.json": b'{"model_type": "llama"}'}


def test_a_repository_of_a_router_is_overwritten(saved_router, tmp_path, monkeypatch):
    with local_hub(monkeypatch, tmp_path / "cache") as hub:
        hub.files["config.json"] = (saved_router / "config.json").read_bytes()
        InContextRouter.from_pretrained(saved_router).push_to_hub("someone/some-router")
        assert hub.files.keys() == {"config.json", "model.safetensors", "README.md"}


def test_a_router_is_saved_and_uploaded_in_one_call(saved_router, tmp_path, monkeypatch):
    with local_hub(monkeypatch, tmp_path / "cache") as hub:
        icr = InContextRouter.from_pretrained(saved_router)
        address = icr.save_pretrained(
            tmp_path / "x", push_to_hub=True, repo_id="someone/some-router"
        )
        assert str(address).endswith(COMMIT)
        assert hub.files["config.json"] == (tmp_path / "x" / "config.json").read_bytes()


def test_results_replace_earlier_ones_and_leave_the_rest(saved_router):
    card = (saved_router / "README.md").read_text()
    assert "None were recorded yet. `icr eval" in card
    once = with_results(card, "| first |\n")
    assert with_results(with_results(card, "| other |\n"), "| first |") == once
    assert "None were recorded" not in once
    assert once.startswith(card[: card.index("## Results")])
    more = once + "\n## Licence\n\nmine\n"
    assert with_results(more, "| second |") == more.replace("first", "second")
    assert with_results("# A card by hand", "| x |") == "# A card by hand\n\n## Results\n\n| x |\n"


@pytest.mark.parametrize(
    ("base_model", "is_named"),
    [("pinned:smollm2-135m", False), ("/models/a/b", False), ("owner/name", True)],
)
def test_the_front_matter_names_a_hub_id_alone_and_is_yaml(saved_router, base_model, is_named):
    icr = InContextRouter.from_pretrained(saved_router)
    card = dataclasses.replace(
        icr, description=dataclasses.replace(icr.description, base_model=base_model)
    )
    assert card.generate_model_card().data.to_dict().get("base_model") == (
        base_model if is_named else None
    )


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-coder-0.5b"])
def test_the_committed_routers_load(name):
    where = Path(__file__).parents[1] / "routers" / name
    icr = InContextRouter.from_pretrained(where)
    assert json.loads((where / "config.json").read_text())["format_version"] == 1
    assert icr.digest() == json.loads((where / "config.json").read_text())["weights_sha256"][:16]


_opened: list[str] | None = None


def _listen(event, arguments):
    if _opened is not None and event in (
        "open",
        "os.listdir",
        "os.scandir",
        "import",
        "exec",
        "pickle.find_class",
    ):
        _opened.append(f"{event} {arguments[0]}")


def test_nothing_but_the_config_and_the_weights_is_read(copy):
    """Whatever lies beside them: neither code, nor pickles, nor the card."""
    global _opened
    InContextRouter.from_pretrained(copy)  # what is imported when first needed
    for name in (
        "modeling.py",
        "pytorch_model.bin",
        "router.pkl",
        "config.yaml",
        "adapter_config.json",
        "__init__.py",
    ):
        (copy / name).write_bytes(b"raise SystemExit")
    sys.addaudithook(_listen)
    _opened = []
    try:
        InContextRouter.from_pretrained(copy)
        heard = _opened
    finally:
        _opened = None
    assert {line for line in heard if str(copy) in line} == {
        f"open {copy / name}" for name in ("config.json", "model.safetensors")
    }
    assert not [line for line in heard if line.startswith(("exec", "pickle"))]


def test_routers_are_equal_where_they_are_the_same(saved_router, other, tmp_path):
    icr = InContextRouter.from_pretrained(saved_router)
    icr.save_pretrained(tmp_path)
    assert icr == InContextRouter.from_pretrained(tmp_path)
    assert icr != other
    assert icr != dataclasses.replace(
        icr, description=dataclasses.replace(icr.description, base_model="another")
    )
    assert icr != "a router"
    assert {icr, InContextRouter.from_pretrained(tmp_path)} == {icr}


def test_directions_are_equal_where_their_numbers_are(saved_router):
    pids = InContextRouter.from_pretrained(saved_router).pids
    assert pids == InContextRouter.from_pretrained(saved_router).pids
    assert pids != dataclasses.replace(pids, query_std=pids.query_std * 2)
    assert pids != dataclasses.replace(pids, query_std=pids.query_std.double())
    assert pids != dataclasses.replace(pids, basis="whitened")


def test_what_is_read_of_a_prompt_can_be_compared(saved_router, encoder_folder):
    model = tiny.model("qwen2")
    tokenizer = tiny.tokenizer()
    folder_by_name = {"encoder": str(encoder_folder)}
    icr = InContextRouter.from_pretrained(saved_router)
    fit = dataclasses.replace(icr.description.fit, **folder_by_name)
    icr = dataclasses.replace(icr, description=dataclasses.replace(icr.description, fit=fit))
    with icr.attached(model, tokenizer, strength=0.0) as routed:
        assert routed.routing(["a dull film:"]) == routed.routing(["a dull film:"])
        assert routed.routing(["a dull film:"]) != routed.routing(["a nice film:"])
        seen = inspect_prompt(routed, "a dull film:")
        assert seen == inspect_prompt(routed, "a dull film:")
        assert seen != inspect_prompt(routed, "a nice film:")
