"""Leaving `attached` gives every family back as it was found.

Whatever happened inside, however often.
"""

import gc
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

import tiny
from icrouting.config import FitConfig
from icrouting.decoder.decoder import Decoder
from icrouting.icr import InContextRouter
from icrouting.routing.attach import attach
from icrouting.routing.description import describe
from icrouting.routing.features import features_of
from icrouting.routing.router import Router
from plain_and_routed import logits_of

ALL = list(tiny.ALL_CONFIGS)
LAYERS = (3, 4)
# Far less than an object each time that a router is attached; the allocator of torch may keep a
# few pages.
FEW_OBJECTS = 10
FEW_BYTES = 6 * 2**20


def router_for(model, encoder_folder):
    """A random router of a model, far from neutral."""
    fit = FitConfig(layers=LAYERS, rank=3, hidden_width=5, encoder=str(encoder_folder))
    description = describe(
        Decoder.of(model, tiny.tokenizer()),
        [tiny.task()],
        fit,
        LAYERS,
        features_of(fit.encoder, Decoder.of(model, tiny.tokenizer()), "cpu"),
    )
    generator = torch.Generator().manual_seed(0)
    router = Router(12, 2, description.n_heads, 3, 5, generator)
    torch.nn.init.normal_(router.alpha[-1].weight, generator=generator)
    return InContextRouter(description, tiny.pids(model), router.eval().requires_grad_(False))


def inventory(model):
    """All that leaving must restore.

    That is hooks, every module's attributes and mode, configurations, generate.
    """
    modules = [
        (
            name,
            sorted(vars(module)),
            module.training,
            {key: list(value) for key, value in vars(module).items() if "hooks" in key and value},
            [
                (key, parameter.requires_grad, parameter._version)
                for key, parameter in module.named_parameters()
            ],
        )
        for name, module in model.named_modules()
    ]
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    seen = [(config.to_dict(), config._attn_implementation) for config in configs]
    return (
        modules,
        seen,
        model.generation_config.to_dict(),
        getattr(model.generate, "__func__", None),
    )


@pytest.fixture
def only_new_objects():
    """Takes what is there already out of the collector's sight: to count it takes seconds."""
    gc.freeze()
    yield
    gc.unfreeze()


def objects():
    gc.collect()
    return Counter(type(thing).__name__ for thing in gc.get_objects())


def memory():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def raising_at(n_tokens):
    def process(tokens, scores):
        if tokens.shape[1] >= n_tokens:
            raise RuntimeError("boom")
        return scores

    def is_done(tokens, scores, **kwargs):
        return process(tokens, torch.zeros(len(tokens), dtype=torch.bool))

    return {"logits_processor": [process]}, {"stopping_criteria": [is_done]}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", ALL)
def test_an_exception_in_generation_leaves_nothing_behind(
    family, training, encoder_folder, tokenizer
):
    model = tiny.model_of(family)
    icr, inputs = (
        router_for(model, encoder_folder),
        tokenizer(["Review: joy\nSentiment:", "dull"], padding=True),
    )
    inputs, settings = inputs.convert_to_tensors("pt"), {"max_new_tokens": 5, "do_sample": False}
    plain, words = logits_of(model, inputs), model.generate(**inputs, **settings)
    model.train(training)
    model.get_output_embeddings().train(not training)  # modes of their own
    before = inventory(model)
    for how in (*raising_at(inputs["input_ids"].shape[1] + 3), {"max_new_tokens": 2}):
        with pytest.raises(RuntimeError, match="boom"), icr.attached(model, tokenizer):
            assert inventory(model) != before
            model.generate(**inputs, **settings | how)
            raise RuntimeError("boom")
        assert inventory(model) == before
    model.eval()
    assert torch.equal(logits_of(model, inputs), plain)
    assert torch.equal(model.generate(**inputs, **settings), words)


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize("family", ALL)
@pytest.mark.slow
def test_attaching_over_and_over_leaves_no_hook_no_object_and_no_memory(
    family, encoder_folder, tokenizer
):
    model = tiny.model_of(family)
    icr, before = router_for(model, encoder_folder), inventory(model)
    inputs = tokenizer(["Review: joy\nSentiment:"], return_tensors="pt")

    def use(n_times):
        for turn in range(n_times):
            with attach(model, icr.pids):
                pass
            if turn % 5 == 0:  # fingerprints take their time
                with icr.attached(model, tokenizer):
                    model(**inputs)

    for _ in range(2):  # what is made once, by counting too
        use(5)
        objects()
    found, n_bytes = objects(), memory()
    use(70)
    grown = objects() - found
    assert sum(grown.values()) < FEW_OBJECTS, grown
    assert memory() - n_bytes < FEW_BYTES
    assert inventory(model) == before
