"""Variants: a router that was fitted by an ablation of the paper's method says so everywhere."""

import pytest

import tiny
from commands import evaluate, fit
from fitted import small_fit
from icrouting.config import EARLIER, PAPER, FitConfig
from icrouting.icr import InContextRouter
from icrouting.runtime.storage import load_json

VARIANTS = [
    ({"extract_from": "zero-shot"}, "directions of zero-shot prompts"),
    ({"basis": "learned"}, "directions trained with the router"),
    ({"basis": "gaussian"}, "Gaussian directions"),
    ({"demo_selection": "random"}, "demonstrations drawn at random"),
    ({"pooling": "last-4"}, "directions of the mean of the last 4 tokens"),
    ({"pooling": "rollout"}, "directions of all tokens, by attention rollout"),
    ({"bias_rows": "last"}, "bias from the last prompt row on"),
    ({"extract_from": "shuffled"}, "directions of prompts with shuffled answers"),
]


def fitted(tokenizer, **changes):
    return InContextRouter.fit(
        tiny.model("llama"), tokenizer, [tiny.task()], small_fit(**changes), gate=False
    )


@pytest.mark.parametrize(("changes", "phrase"), VARIANTS)
def test_a_router_says_what_is_unlike_the_paper_and_keeps_it(changes, phrase, tokenizer, tmp_path):
    icr = fitted(tokenizer, **changes)
    assert phrase in repr(icr)
    icr.save_pretrained(tmp_path)
    assert f"| unlike the paper | {phrase} |" in (tmp_path / "README.md").read_text()
    again = InContextRouter.from_pretrained(tmp_path)
    assert again == icr
    assert repr(again) == repr(icr)
    for name, value in changes.items():
        assert getattr(again.description.fit, name) == value


def test_a_router_like_the_paper_s_says_nothing_and_its_file_is_as_it_was(tokenizer, tmp_path):
    icr = fitted(tokenizer)
    assert "directions" not in repr(icr)
    icr.save_pretrained(tmp_path)
    assert "unlike the paper" not in (tmp_path / "README.md").read_text()
    fit = load_json(tmp_path / "config.json")["fit"]
    assert not (EARLIER.keys() - {"min_steps", "patience"}) & fit.keys()


def test_neither_the_paper_nor_the_defaults_are_a_variant():
    assert PAPER.variants() == FitConfig().variants() == []


def test_a_card_of_zero_shot_directions_names_no_demonstrations(tokenizer, tmp_path):
    icr = fitted(tokenizer, extract_from="zero-shot", demos_per_class=3)
    (source,) = icr.description.sources
    assert source.n_demos == 0
    icr.save_pretrained(tmp_path)
    assert "| source task | zero-shot prompts |" in (tmp_path / "README.md").read_text()


def test_a_router_of_nearest_demonstrations_says_so_and_keeps_it(
    tokenizer, encoder_folder, tmp_path
):
    icr = fitted(tokenizer, demo_selection="nearest", encoder=str(encoder_folder))
    icr.save_pretrained(tmp_path)
    assert "demonstrations nearest to their query" in (tmp_path / "README.md").read_text()
    again = InContextRouter.from_pretrained(tmp_path)
    assert again == icr
    assert "demonstrations nearest to their query" in repr(again)
    assert icr.pids != fitted(tokenizer, encoder=str(encoder_folder)).pids


@pytest.mark.slow
def test_commands_fit_and_evaluate_a_variant(world, encoder_folder, tmp_path, capsys):
    """Through the options of `icr fit`, and the methods of `icr eval`."""
    options = "--extract-from shuffled --pooling rollout --demo-selection random --bias-rows last"
    router = tmp_path / "router"
    fit(world, encoder_folder, router, *options.split(), "--basis", "learned")
    saved = InContextRouter.from_pretrained(router).description.fit
    assert (saved.extract_from, saved.pooling) == ("shuffled", "rollout")
    assert (saved.demo_selection, saved.bias_rows, saved.basis) == ("random", "last", "learned")
    methods = ["icr", "icr-spread-alpha", "icr-spread-gates"]
    evaluate(world, tmp_path / "run", "--router", str(router), "--methods", "zero-shot", *methods)
    table = capsys.readouterr().out
    for name in methods[1:]:
        assert name in table
