"""A bench for ways of running a model: a very sharp router, and the slow run.

The router is so sharp that every other text is decided otherwise. The slow run is the dense
reference (tests/reference.py): one prompt at a time, no padding, no cache.
"""

import torch
from transformers import DynamicCache

import tiny
from icrouting.config import FitConfig
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import CACHE, base_of
from icrouting.decoder.partial import entering_states
from icrouting.icr import InContextRouter
from icrouting.routing.description import describe
from icrouting.routing.features import features_of
from icrouting.routing.router import Router, Routing
from reference import reference_routed

# fp32 round-off of logits of size 10 through five layers
CLOSE = 5e-5
# What a lost or a wrong routing changes at least.
MATTERS = 0.1
N_NEW = 8


def rows_of(routing, *rows):
    return Routing(routing.routing_vector[list(rows)], routing.head_gates[list(rows)])


class Bench:
    """A family's tiny model, an artificial router for it, and three prompts of unlike lengths."""

    def __init__(self, encoder, family="llama", bias_rows="all"):
        self.encoder, self.family, self.tokenizer = encoder, family, tiny.tokenizer()
        self.bias_rows = bias_rows
        toy = tiny.task()
        self.texts = [f"{'dull ' * extra}{toy.prompt(toy.test[extra])}" for extra in range(3)]
        self.model = self.fresh()
        self.icr = self.router()
        with self.attached() as routed:
            self.routing = routed.routing(self.texts)
        assert self.routing.routing_vector.std(0).mean() > 0.1, "prompts must be routed differently"

    def of(self, family):
        return Bench(self.encoder, family, self.bias_rows)

    def fresh(self, kernel="sdpa"):
        return tiny.model(self.family, kernel)

    def router(self, seed=0, layers=(3, 4)):
        shape = {"layers": layers, "rank": 3, "hidden_width": 13}
        fit = FitConfig(**shape, encoder=str(self.encoder), bias_rows=self.bias_rows)
        features = features_of(str(self.encoder), Decoder.of(self.model, self.tokenizer), "cpu")
        described = (Decoder.of(self.model, self.tokenizer), [tiny.task()], fit, layers, features)
        generator = torch.Generator().manual_seed(seed)
        router = Router(features.n_features, len(layers), 6, 3, 13, generator).requires_grad_(False)
        router.alpha[-1].weight.normal_(generator=generator)
        rows = self.tokenizer(self.texts).input_ids
        vectors = features.read(
            rows, entering_states(Decoder.of(self.model, self.tokenizer), rows, layers[0])
        )
        for linear in (
            router.alpha[0],
            router.gamma[0],
        ):  # a random encoder tells texts apart by little
            linear.weight *= 3 / vectors.std(0).mean()
            linear.bias -= linear.weight @ vectors.mean(0)
        return InContextRouter(describe(*described), tiny.pids(self.model, layers), router)

    def inputs(self, *rows, side="left", positions=False):
        """The prompts of `rows`, or all three, as tensors."""
        self.tokenizer.padding_side = side
        texts = [self.texts[row] for row in rows] or self.texts
        inputs = dict(self.tokenizer(texts, return_tensors="pt", padding=True))
        if positions:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
        return inputs

    def attached(self, model=None):
        return self.icr.attached(self.model if model is None else model, self.tokenizer)

    def reference(self, dense, row):
        """The dense reference, routed by one prompt, which what it reads begins with."""
        first_biased = None
        if self.bias_rows == "last":
            first_biased = [self.inputs(row)["input_ids"].shape[1] - 1]
        routing = rows_of(self.routing, row)
        return reference_routed(base_of(dense), self.icr.pids, routing, first_biased)

    def slow_logits(self, row, dense=None, input_ids=None):
        """One prompt's logits, or those of tokens that begin with it."""
        dense, ids = (
            dense or self.fresh("eager"),
            self.inputs(row)["input_ids"] if input_ids is None else input_ids,
        )
        with self.reference(dense, row):
            return dense(input_ids=ids, use_cache=False).logits

    def slow_tokens(self, row, dense=None, input_ids=None, **settings):
        """What one prompt, or tokens that begin with it, goes on with.

        There is one row per returned sequence.
        """
        dense, ids = (
            dense or self.fresh("eager"),
            self.inputs(row)["input_ids"] if input_ids is None else input_ids,
        )
        with self.reference(dense, row):
            return self.tokens(
                dense,
                {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
                **settings,
                use_cache=False,
            )

    def tokens(self, model, inputs, seed=0, **settings):
        settings = {
            "max_new_tokens": N_NEW,
            "min_new_tokens": N_NEW,
            "do_sample": False,
            **settings,
        }
        torch.manual_seed(seed)
        return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]

    def check_tokens(self, *rows, model=None, dense=None, fast=None, drop=(), **both):
        """Generation with settings `both` and `fast` gives what the slow run gives with `both`."""
        model, inputs = self.model if model is None else model, self.inputs(*rows)
        inputs = {name: tensor for name, tensor in inputs.items() if name not in drop}
        expected = torch.cat([self.slow_tokens(row, dense, **both) for row in rows])
        with self.attached(model):
            got = self.tokens(model, inputs, **both, **(fast or {}))
        assert torch.equal(got, expected)
        assert not torch.equal(self.tokens(model, inputs, **both), expected), (
            "the routing must matter"
        )

    def check_logits(
        self, *rows, model=None, dense=None, side="left", positions=False, close=CLOSE, **more
    ):
        """A plain call gives the slow run's logits at all real tokens."""
        model, inputs = (
            self.model if model is None else model,
            self.inputs(*rows, side=side, positions=positions),
        )
        real = inputs["attention_mask"].bool()
        plain = model(**inputs).logits
        with self.attached(model):
            got = model(**inputs, **more).logits
        for number, row in enumerate(rows):
            expected = self.slow_logits(row, dense)[0]
            assert (got[number][real[number]] - expected).abs().max() <= close
            assert (plain[number][real[number]] - expected).abs().max() > MATTERS, (
                "the routing must matter"
            )

    def check_turns(self, cache, through_generate=True, cropped=0):
        """Two turns with one kept cache are both routed by the first prompt."""
        model, prompt, more = self.model, self.inputs(0)["input_ids"], torch.tensor([[20, 30, 40]])
        with self.attached():
            if through_generate:
                inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
                seen = torch.cat([prompt, self.tokens(model, inputs, **{CACHE: cache})], 1)
                if cropped:
                    cache.crop(-cropped)
                seen = torch.cat([seen[:, : seen.shape[1] - cropped], more], 1)
                inputs = {"input_ids": seen, "attention_mask": torch.ones_like(seen)}
                got = self.tokens(model, inputs, **{CACHE: cache})
            else:
                model(input_ids=prompt, **{CACHE: cache})
                pieces = [
                    model(input_ids=token, **{CACHE: cache}).logits for token in more.split(1, 1)
                ]
        if through_generate:
            assert torch.equal(got, self.slow_tokens(0, input_ids=seen))
            assert not torch.equal(got, self.tokens(model, inputs)), "the routing must matter"
            return
        expected = self.slow_logits(0, input_ids=torch.cat([prompt, more], 1))[:, -3:]
        assert (torch.cat(pieces, 1) - expected).abs().max() <= CLOSE

    def foreign_cache(self):
        """A cache that a prompt filled outside `attached`."""
        cache = DynamicCache(config=self.model.config)
        self.model(**self.inputs(0), **{CACHE: cache})
        return cache
