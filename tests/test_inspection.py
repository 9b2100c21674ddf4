import re
import warnings

import pytest
import torch

import browser
import tiny
from icrouting.decoder.scoring import score_options
from icrouting.routing import inspection
from icrouting.routing.inspection import inspect_prompt
from inspected import OPTIONS, prompts, sharp_router

# fp32 round-off between kernels on logits of size 30
CLOSE = 1e-4
# They share a first token, and are of several lengths.
LABELS = ("account access", "account deletion", "joy")
HOSTILE = 'Review: <img src=x> & "it\'s" <b>joy</b>\nSentiment:'


@pytest.fixture(scope="module")
def world(tokenizer, encoder_folder):
    model = tiny.model("llama")
    with pytest.MonkeyPatch.context() as monkeypatch:
        return model, tokenizer, sharp_router(model, tokenizer, encoder_folder, monkeypatch)


def look(world, prompt, options=None, strength=1.0):
    model, tokenizer, icr = world
    with icr.attached(model, tokenizer, strength=strength) as routed:
        return inspect_prompt(routed, prompt, options)


@pytest.fixture(scope="module")
def seen(world):
    return look(world, HOSTILE, OPTIONS)


@pytest.fixture(scope="module")
def page(seen):
    return inspection.html(seen, "<model> & router")


def test_options_before_and_after_are_what_scoring_gives(world):
    model, tokenizer, icr = world
    seen = look(world, prompts()[0], OPTIONS)
    plain = score_options(model, tokenizer, prompts()[:1], OPTIONS)
    with icr.attached(model, tokenizer) as routed:
        scores = torch.cat([plain, routed.score(prompts()[:1], OPTIONS)])
        decided = routed.routing(prompts()[:1])
    assert [one.text for one in seen.options] == list(OPTIONS)
    assert (torch.tensor([one.logits for one in seen.options]).T - scores).abs().max() < CLOSE
    assert (
        torch.tensor([one.probabilities for one in seen.options]).T - scores.softmax(-1)
    ).abs().max() < CLOSE
    assert torch.equal(seen.routing.head_gates, decided.head_gates)
    assert torch.equal(seen.routing.routing_vector, decided.routing_vector)


def slow_scores(model, tokenizer, prompt, label_scoring):
    """Scores of whole labels, by one plain pass for each."""
    (n_prompt,) = tokenizer(prompt, return_tensors="pt").input_ids.shape[1:]
    scores = []
    for label in LABELS:
        ids = tokenizer(f"{prompt} {label}", return_tensors="pt").input_ids
        log_probs = model(ids, use_cache=False).logits[0].log_softmax(-1)
        steps = [log_probs[at - 1, ids[0, at]] for at in range(n_prompt, ids.shape[1])]
        total = torch.stack(steps).sum()
        scores.append(total / len(steps) if label_scoring == "mean" else total)
    return torch.stack(scores)


@pytest.mark.parametrize("label_scoring", ["sum", "mean"])
def test_labels_that_begin_alike_are_what_whole_label_scoring_gives(world, label_scoring):
    model, tokenizer, icr = world
    prompt = prompts()[0]
    with pytest.raises(ValueError, match="share their first token"):
        look(world, prompt, LABELS)
    with torch.no_grad():
        plain = slow_scores(model, tokenizer, prompt, label_scoring)
    with warnings.catch_warnings(), icr.attached(model, tokenizer) as routed:
        # Prompts with a label behind them have another form, which is nobody's business here.
        warnings.simplefilter("error")
        seen = inspect_prompt(routed, prompt, LABELS, label_scoring=label_scoring)
        # The next call is routed again.
        moved = routed.score([prompt], LABELS, label_scoring=label_scoring)[0]
        assert routed.last == tokenizer([prompt]).input_ids
    scores = torch.tensor([one.logits for one in seen.options]).T
    assert (scores - torch.stack([plain, moved])).abs().max() < CLOSE
    assert (moved - plain).abs().max() > 100 * CLOSE
    shares = torch.tensor([one.probabilities for one in seen.options]).T
    assert (shares - scores.softmax(-1)).abs().max() < CLOSE
    assert "logit  routed" not in inspection.text(seen).split("next token")[0]
    assert "log-probability of" in inspection.html(seen, "a")


def test_whole_labels_at_strength_zero_stay_where_they_are(world):
    model, tokenizer, icr = world
    with icr.attached(model, tokenizer, strength=0.0) as routed:
        seen = inspect_prompt(routed, prompts()[0], LABELS, label_scoring="sum")
    scores = torch.tensor([one.logits for one in seen.options])
    assert (scores[:, 0] - scores[:, 1]).abs().max() < CLOSE


def test_top_tokens_are_the_likeliest_of_either_side(world, seen):
    model, tokenizer, _ = world
    plain = model(**tokenizer(HOSTILE, return_tensors="pt")).logits[0, -1].softmax(-1)
    pairs = torch.tensor([one.probabilities for one in seen.top_tokens])
    assert len(pairs) == 10
    assert abs(pairs[:, 0].max() - plain.max()) < CLOSE
    assert pairs.amax(1).tolist() == sorted(pairs.amax(1).tolist(), reverse=True)
    assert (
        pairs.amax(1).min()
        >= seen.passes.logits.softmax(-1).amax(0).sort(descending=True).values[9] - CLOSE
    )


def test_what_tokens_gain_others_lose(seen):
    assert "".join(seen.tokens) == HOSTILE
    assert seen.gained.shape == (len(seen.tokens),)
    assert abs(seen.gained.sum()) < CLOSE
    assert seen.gained.abs().max() > 100 * CLOSE


def test_at_strength_zero_nothing_moves_and_both_outputs_say_so(world):
    seen = look(world, prompts()[0], OPTIONS, 0.0)
    assert seen.gained.abs().max() == seen.passes.mass_moved.max() == seen.passes.kl == 0.0
    assert all(len(set(one.logits)) == 1 for one in (*seen.options, *seen.top_tokens))
    assert "numerically nothing" in inspection.text(seen)
    assert "Numerically this is nothing" in inspection.html(seen, "a")


@pytest.mark.parametrize("prompt", ["a", "Review: joy " * 70 + "\nSentiment:"])
def test_a_prompt_of_any_length_renders_without_options(prompt, world):
    seen = look(world, prompt)
    assert seen.options == []
    assert seen.line in inspection.text(seen)
    assert "Likeliest next tokens" in inspection.html(seen, "a")
    assert "Each option" not in inspection.html(seen, "a")


def test_one_option_and_an_empty_prompt_are_refused(world):
    with pytest.raises(ValueError, match="at least two options"):
        look(world, "a:", ("negative",))
    with pytest.raises(ValueError, match="empty text"):
        look(world, "")


def test_what_comes_from_the_prompt_is_escaped(page):
    assert "<img" not in page
    assert "<b>joy" not in page
    assert "&lt;model&gt; &amp; router" in page
    shown = re.sub(
        r"<[^>]+>", "", re.search(r'<p class="prompt">(.*?)</p>', page, re.DOTALL).group(1)
    )
    assert shown.startswith("Review: &lt;img src=x&gt; &amp; ")


def test_every_picture_has_a_title_an_alternative_text_and_a_caption(page):
    assert page.count("<svg") == page.count('role="img" aria-label="Heat map of') == 5
    assert page.count("<figure>") == page.count("<h3>") == page.count("<figcaption>") == 5 + 2


def test_the_page_fetches_nothing_and_runs_nothing(page):
    assert not re.findall(r"\b(?:src|href|action|data|poster)\s*=\s*[\"']", page)
    for word in ("http", "<script", "@import", "url(", "<link"):
        assert word not in page


def test_the_text_is_plain_and_names_what_moved(seen):
    text = inspection.text(seen)
    for said in (
        "'positive'",
        "next token",
        "gates, %",
        "attention of the last token",
        repr(seen.tokens[-1]),
    ):
        assert said in text
    assert "&" not in text.replace(" &", "").replace("'&", "")
    assert max(map(len, text.splitlines()[1:])) <= 80


@pytest.mark.browser
def test_in_a_browser_pictures_are_there_and_nothing_scrolls_sideways(world, page, tmp_path):
    long = inspection.html(look(world, "x" * 300 + "\nSentiment:", OPTIONS), "a")
    for number, shown in enumerate((page, long)):
        (tmp_path / str(number)).mkdir()
        for width, found in browser.lay_out(shown, (1280, 400), tmp_path / str(number)).items():
            assert found["drawn"] == 5
            assert found["fetched"] == found["clipped"] == 0
            assert found["width"] <= width
