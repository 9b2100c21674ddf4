"""Several routers on one model at once: each row of a batch names one, or the base model.

The routed layers get the directions of all routers side by side, and a row's routing is zero on
those of every other router. So a row is routed as by its own router alone, and a row of the base
model by none.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icrouting.config import BiasRows
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.hold import Hold
from icrouting.decoder.scoring import score
from icrouting.decoder.texts import listed, prompts_of
from icrouting.icr import InContextRouter
from icrouting.routing.pids import PIDs
from icrouting.routing.predictions import Prediction
from icrouting.routing.reader import Reader
from icrouting.routing.rerouting import rerouted
from icrouting.routing.routed import Routed
from icrouting.routing.router import Routing
from icrouting.runtime.checks import known
from icrouting.tasks.chat import Messages
from icrouting.tasks.task import LabelScoring, Task, TaskSpec

# The name of the model as it is.
BASE = "base"


@dataclass(frozen=True)
class Part:
    """One router's place among several.

    Attributes:
        reader: reads prompts for it.
        positions: of its layers among all routed ones.
        columns: its directions among all.
    """

    reader: Reader
    positions: Tensor
    columns: slice


@dataclass
class RowsReader:
    """Reads each prompt of a batch by the router that its row names (a `PromptReader`).

    Attributes:
        decoder: the model that is routed, with its tokenizer.
        first_layer: the first routed layer, which is that of every router.
        parts: the routers by name.
        n_layers: how many layers any of them routes.
        rank: the directions of all of them together.
        names: whose each row of the calls from now on is; None between calls.
    """

    decoder: Decoder
    first_layer: int
    parts: Mapping[str, Part]
    n_layers: int
    rank: int
    names: tuple[str, ...] | None = None

    def of_states(self, token_lists: Sequence[Sequence[int]], hidden: Sequence[Tensor]) -> Routing:
        """Returns the routing of prompts; see `Reader.of_states`."""
        return self._joined(token_lists, hidden)

    def of_tokens(self, token_lists: Sequence[Sequence[int]]) -> Routing:
        """Returns the routing of prompts; see `Reader.of_tokens`."""
        return self._joined(token_lists, None)

    def _joined(
        self, token_lists: Sequence[Sequence[int]], hidden: Sequence[Tensor] | None
    ) -> Routing:
        """Returns one routing of all rows, in which each has that of its own router."""
        names = self._names_of(len(token_lists))
        n_rows = len(token_lists)
        n_heads = self.decoder.dims.n_heads
        device = self.decoder.device
        routing_vector = torch.zeros(n_rows, self.n_layers, self.rank, device=device)
        head_gates = torch.zeros(n_rows, self.n_layers, n_heads, device=device)
        for name, part in self.parts.items():
            rows = [row for row, row_name in enumerate(names) if row_name == name]
            if not rows:
                continue
            tokens = [token_lists[row] for row in rows]
            if hidden is None:
                routing = part.reader.of_tokens(tokens)
            else:
                states = [hidden[row] for row in rows if hidden]
                routing = part.reader.of_states(tokens, states)
            for row, alpha, gates in zip(
                rows, routing.routing_vector, routing.head_gates, strict=True
            ):
                routing_vector[row, part.positions, part.columns] = alpha.to(device)
                head_gates[row, part.positions] = gates.to(device)
        return Routing(routing_vector, head_gates)

    def _names_of(self, n_rows: int) -> list[str]:
        """Returns whose each prompt is; those of beams and samples stand side by side."""
        if self.names is None:
            raise ValueError(
                "several routers are attached, and nothing says whose these rows are: call inside "
                "`with several.rows([...])`, one name a row"
            )
        n_each, n_over = divmod(n_rows, max(1, len(self.names)))
        if n_over or not n_each:
            raise ValueError(
                f"`rows` named {len(self.names)} rows, and the call has {n_rows}: name each"
            )
        return [name for name in self.names for _ in range(n_each)]


@dataclass(frozen=True)
class Several:
    """A model with several routers; comes from `attach`.

    Attributes:
        reader: reads the routing of prompts.
        hold: the hold on the model; whatever is asked takes its turn.
        routed: each router's own view of the model, which asks for that router's rows.
    """

    reader: RowsReader
    hold: Hold
    routed: Mapping[str, Routed]

    def __repr__(self) -> str:
        name = self.reader.decoder.model.config.name_or_path
        return f"Several({name!r}, {', '.join(self.names)})"

    @property
    def names(self) -> tuple[str, ...]:
        """What a row may name: the base model, and every router."""
        return (BASE, *self.routed)

    @contextmanager
    def rows(self, names: Sequence[str]) -> Iterator[None]:
        """Inside, row i of the model's plain calls and of `generate` is routed by `names[i]`.

        Other threads wait meanwhile. A cache keeps its rows' routing, also behind the block.

        Args:
            names: of a router or "base", one a row of the batch.

        Raises:
            ValueError: a name that is none of these.
        """
        checked = tuple(listed(names, "names"))
        for name in checked:
            known("router", name, dict.fromkeys(self.names))
        with self.hold.turn():
            before = self.reader.names
            self.reader.names = checked
            try:
                yield
            finally:
                self.reader.names = before

    def score(
        self,
        prompts: Sequence[str | Messages],
        options: Sequence[str] | Sequence[Sequence[str]],
        names: Sequence[str],
        *,
        label_scoring: LabelScoring = "first",
    ) -> Float[Tensor, "n_prompts n_options"]:
        """Returns each option's score behind each prompt, as `Routed.score` of its router does.

        Args:
            prompts: zero-shot prompts or conversations.
            options: the answers to choose from, for all prompts or a list each.
            names: whose each prompt is.
            label_scoring: as in `Routed.score`.

        Raises:
            ValueError: a name that is none, or not one a prompt, or what `score` says.
        """
        prompts = listed(prompts, "prompts")
        rows_by_name = self._rows_by_name(names, len(prompts))
        entries = listed(options, "options")
        is_one_list = all(isinstance(entry, str) for entry in entries)
        if not is_one_list and len(entries) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts have {len(entries)} lists of options")
        pieces: dict[str, Tensor] = {}
        # Scoring sorts prompts by length, so that rows of one name are asked together.
        for name, rows in rows_by_name.items():
            row_prompts = [prompts[row] for row in rows]
            row_options = entries if is_one_list else [entries[row] for row in rows]
            with self.rows([name]):
                pieces[name] = self._scored(name, row_prompts, row_options, label_scoring)
        width = max((piece.shape[1] for piece in pieces.values()), default=len(entries))
        scores = torch.full((len(prompts), width), -torch.inf)
        for name, rows in rows_by_name.items():
            scores[rows, : pieces[name].shape[1]] = pieces[name].float().cpu()
        return scores

    def _scored(
        self, name: str, prompts: list, options: list, label_scoring: LabelScoring
    ) -> Tensor:
        if name != BASE:
            return self.routed[name].score(prompts, options, label_scoring=label_scoring)
        decoder = self.reader.decoder
        whole_prompts = prompts_of(prompts, decoder.tokenizer)
        return score(decoder, whole_prompts, options, label_scoring=label_scoring)

    def predict(
        self, rows: Any, name: str, task: str | Task | TaskSpec | None = None
    ) -> list[Prediction]:
        """Returns a prediction for each row by one router, as `Routed.predict` does.

        Args:
            rows: as `Routed.predict` takes them.
            name: of the router.
            task: how rows become prompts; None takes the router's task where it knows but one.

        Raises:
            ValueError: no router has this name, or what `Routed.predict` says.
        """
        routed = known("router", name, self.routed)
        with self.rows([name]):
            return routed.predict(rows, task)

    def generate(
        self, prompts: Sequence[str | Messages], names: Sequence[str], **how: Any
    ) -> list[str]:
        """Returns the text that follows each prompt, all prompts in one batch.

        Args:
            prompts: texts or conversations.
            names: whose each prompt is.
            how: what the model's own `generate` takes beside its inputs.

        Raises:
            ValueError: a name that is none, or not one a prompt.
        """
        decoder = self.reader.decoder
        whole_prompts = prompts_of(listed(prompts, "prompts"), decoder.tokenizer)
        self._rows_by_name(names, len(whole_prompts))
        token_lists = decoder.tokenize([prompt.text for prompt in whole_prompts])
        input_ids, attention_mask = left_padded(token_lists, decoder.pad_id, decoder.device)
        with self.rows(names):
            tokens = decoder.model.generate(
                input_ids=input_ids, attention_mask=attention_mask, **how
            )
        new_tokens = tokens[:, input_ids.shape[1] :]
        return decoder.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)

    def _rows_by_name(self, names: Sequence[str], n_prompts: int) -> dict[str, list[int]]:
        names = listed(names, "names")
        if len(names) != n_prompts:
            raise ValueError(f"{n_prompts} prompts have {len(names)} names: give one a prompt")
        rows_by_name: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            known("router", name, dict.fromkeys(self.names))
            rows_by_name.setdefault(name, []).append(row)
        return rows_by_name


def left_padded(
    token_lists: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Int[Tensor, "batch q_len"], Int[Tensor, "batch q_len"]]:
    """Returns token ids and attention mask of a batch that `generate` goes on from."""
    longest = max(map(len, token_lists))
    input_ids = torch.full((len(token_lists), longest), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, tokens in enumerate(token_lists):
        input_ids[row, longest - len(tokens) :] = torch.tensor(tokens)
        attention_mask[row, longest - len(tokens) :] = 1
    return input_ids.to(device), attention_mask.to(device)


@contextmanager
def attach(
    routers: Mapping[str, InContextRouter],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    strengths: Mapping[str, float] | None = None,
) -> Iterator[Several]:
    """Inside, each row of a batch is routed by the router that it names, or is the base model's.

    On leaving, also by an exception, the model is as it was found. A row's logits are those of its
    lone run, up to the rounding of a wider batch; a call whose rows are all the base model's has
    its logits to the bit.

    Args:
        routers: by the names that rows call them by.
        model: the base model that all of them were fitted on.
        tokenizer: its tokenizer.
        strengths: factors on the routing vectors, by name; 1 where there is none.

    Raises:
        ValueError: there is no router, a name is "base", they are of different base models, or of
            different first layers or bias rows.
    """
    if not routers or BASE in routers:
        raise ValueError(
            f"give one router or more, by names other than {BASE!r}, which is the model as it is; "
            f"got {list(routers)}"
        )
    strengths = {} if strengths is None else strengths
    for name in strengths:
        known("router", name, routers)
    decoder = Decoder.of(model, tokenizer)
    bias_rows = _shared_bias_rows(routers)
    readers = {}
    for name, icr in routers.items():
        strength = strengths.get(name, 1.0)
        readers[name] = icr.watching(
            icr.reader(decoder, strength=strength, gate=icr.gate), stacklevel=4
        )
    reader, pids = _joined(routers, readers)
    with rerouted(reader, pids, bias_rows) as now:
        routed = {}
        for name, icr in routers.items():
            strength = strengths.get(name, 1.0)
            routed[name] = Routed(
                readers[name],
                icr.pids.layers,
                strength,
                now.last,
                now.hold,
                icr.description.sources or (),
                icr.made_of(icr.gate, strength),
                icr.calibrations,
                bias_rows,
            )
        yield Several(reader, now.hold, routed)


def _shared_bias_rows(routers: Mapping[str, InContextRouter]) -> BiasRows:
    """Returns which rows get the bias, of all routers alike."""
    by_name: dict[str, BiasRows] = {}
    for name, icr in routers.items():
        by_name[name] = icr.description.fit.bias_rows
    if len(set(by_name.values())) > 1:
        raise ValueError(f"routers whose bias rows differ cannot share a batch: {by_name}")
    return next(iter(by_name.values()))


def _joined(
    routers: Mapping[str, InContextRouter], readers: Mapping[str, Reader]
) -> tuple[RowsReader, PIDs]:
    """Returns what reads the rows of all routers, and the directions of all side by side."""
    first_layers = {name: icr.pids.layers[0] for name, icr in routers.items()}
    if len(set(first_layers.values())) > 1:
        raise ValueError(
            f"routers that begin at different layers cannot share a batch: {first_layers}; attach "
            "them one by one"
        )
    layers = sorted({layer for icr in routers.values() for layer in icr.pids.layers})
    rank = sum(icr.pids.rank for icr in routers.values())
    any_pids = next(iter(routers.values())).pids
    query_width = any_pids.query_pids.shape[1]
    key_width = any_pids.key_pids.shape[1]
    # A router has no directions in a layer that it does not route.
    queries = torch.zeros(len(layers), query_width, rank)
    keys = torch.zeros(len(layers), key_width, rank)
    parts = {}
    start = 0
    for name, icr in routers.items():
        columns = slice(start, start + icr.pids.rank)
        start = columns.stop
        positions = torch.tensor([layers.index(layer) for layer in icr.pids.layers])
        queries[positions, :, columns] = icr.pids.query_directions().float().cpu()
        keys[positions, :, columns] = icr.pids.key_directions().float().cpu()
        parts[name] = Part(readers[name], positions, columns)
    ones = torch.ones(len(layers), rank)
    # As directions are used, so that what each basis says is in them already.
    pids = PIDs(tuple(layers), queries, keys, ones, ones, ones, ones, "pca")
    reader = next(iter(readers.values()))
    return RowsReader(reader.decoder, layers[0], parts, len(layers), rank), pids
