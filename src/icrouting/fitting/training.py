"""Stage 3: training the router on the frozen trunk (section 4)."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from icrouting.config import FitConfig
from icrouting.decoder.batches import finite_rows
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.partial import LateEntry, late_entry
from icrouting.fitting import losses
from icrouting.fitting.queries import Query, n_rows_of
from icrouting.fitting.trunk import pad_states
from icrouting.fitting.validation import Look, Watch, answered
from icrouting.routing.attach import attach
from icrouting.routing.attachment import Attachment
from icrouting.routing.pids import PIDs
from icrouting.routing.router import Router
from icrouting.runtime.processes import is_first, mine, total
from icrouting.runtime.progress import track
from icrouting.runtime.storage import load_tensors, save_tensors

CHECKPOINT_FILE = "training.safetensors"
# Steps.
CHECKPOINT_EVERY = 25
# The objective's, in the order of its weights.
_TERMS = ("ce", "conf", "spar", "gate")


def alpha_scale(step: int, n_steps: int, final: float, first: float = 1.0) -> float:
    """Returns the routing vector's scale at a step: a cosine from `first` to `final`."""
    return final + (first - final) * 0.5 * (1 + math.cos(math.pi * step / max(1, n_steps)))


@dataclass(eq=False)
class Trainer:
    """One router in training; its state can be saved after any step and taken up again.

    Several processes share the queries of each step and add up their gradients, so that all have
    the same router.

    Attributes:
        decoder: the frozen model.
        pids: the directions that it is routed along.
        router: trained in place.
        queries: all training queries.
        config: settings.
        folder: where checkpoints and `training.jsonl` go; None keeps nothing.
        held: validation queries, on which the router is judged as it goes; there may be none.
        chosen: where cross-validation chose the step to end at, what it found there.
        first_scale: the routing vector's scale before the first step.
        step: number of steps taken.
        n_steps: number of steps of the whole training, unless it stops before.
        watch: judges the router on `held`; with `patience`, the best one is kept in the end.
        log: the loss and its terms, one entry per step.
    """

    decoder: Decoder
    pids: PIDs
    router: Router
    queries: Sequence[Query]
    config: FitConfig
    folder: Path | None = None
    held: Sequence[Query] = ()
    chosen: Look | None = None
    first_scale: float = 1.0

    def __post_init__(self):
        self.optimizer = torch.optim.AdamW(self.router.parameters(), lr=self.config.lr)
        self.step = 0
        self._is_between_steps = True
        self.log: list[dict[str, float]] = []
        self.steps_per_epoch = math.ceil(len(self.queries) / self.config.batch_size)
        self.n_steps = self.config.n_steps(len(self.queries))
        patience = self.config.patience if self.config.watches(len(self.queries)) else 0
        self.watch = Watch(self.held, patience, self.n_steps)
        # A checkpoint of an earlier run: training goes on from there.
        if self.folder is not None and (self.folder / CHECKPOINT_FILE).exists():
            self._restore(self.folder)

    def run(self) -> None:
        """Trains to the end, from where the last checkpoint stands.

        Without `patience` the router is the last one, with it the one that did best on `held`.
        """
        # The scale of alpha falls as it did where the end was chosen.
        end = self.n_steps if self.chosen is None else self.chosen.step
        steps = range(self.step, end)
        sizes = [1] * len(steps)
        with (
            attach(self.decoder.model, self.pids) as attachment,
            late_entry(self.decoder.model, self.pids.layers[0]) as entry,
        ):
            try:
                for _ in track(steps, "training", sizes, "steps", self.step, self.watch.summary):
                    self._judge(entry, attachment)
                    if self.watch.is_over:
                        break
                    queries = [self.queries[row] for row in mine(self._rows())]
                    self._update(self._terms(entry, attachment, queries))
                    if self.step % CHECKPOINT_EVERY == 0:
                        self._save()
                self._judge(entry, attachment)
            finally:
                # Whatever ends it, ctrl-C too, loses no step; half a step is none.
                if self._is_between_steps:
                    self._save()
        if self.watch.best:
            self.router.load_state_dict(self.watch.best)

    def _judge(self, entry: LateEntry, attachment: Attachment) -> None:
        """Asks the router the validation queries, if that is due.

        It comes before the next step and not behind the last, so that a stop between the two loses
        neither.
        """
        if self.watch.is_due(self.step):
            look = answered(self.held, self.router, self.decoder, entry, attachment, self.config)
            self.watch.add(Look(self.step, *look), self.router)

    def _rows(self) -> list[int]:
        """The queries of the current step; each epoch draws an order of its own."""
        epoch, position = divmod(self.step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.config.seed + epoch)
        order = torch.randperm(len(self.queries), generator=generator)
        return order.split(self.config.batch_size)[position].tolist()

    def _terms(
        self, entry: LateEntry, attachment: Attachment, queries: Sequence[Query]
    ) -> dict[str, Tensor]:
        """Returns the means of the objective's terms, and the number of "queries"."""
        device = self.decoder.device
        # More processes than queries in this step, or none of the queries is finite.
        if not queries:
            return {name: torch.zeros((), device=device) for name in (*_TERMS, "queries")}
        features = torch.stack([query.features for query in queries])
        routing = self.router(features.to(device))
        final = self.config.final_alpha_scale
        scale = alpha_scale(self.step, self.n_steps, final, self.first_scale)
        batch, hidden = pad_states([query.state for query in queries], self.decoder.pad_id)
        is_from_last = self.config.bias_rows == "last"
        attachment.route(routing.scaled(scale), batch.last if is_from_last else None)
        logits = entry(batch.to(device), hidden)
        texts = [query.text for query in queries]
        is_finite = logits.isfinite().all(-1)
        finite = finite_rows(is_finite, texts, "logits", self.config.skip_nan)
        # Once more without the others, as no mask helps: in backward, zero times NaN is NaN.
        if len(finite) < len(queries):
            return self._terms(entry, attachment, [queries[row] for row in finite])
        entropies = [query.state.entropy for query in queries]
        plain_entropy = torch.tensor(entropies, device=device)
        return {
            "ce": self._cross_entropy(logits, queries),
            "conf": losses.confidence_loss(logits, plain_entropy),
            "spar": losses.sparsity_loss(routing.routing_vector, self.config.deepest_weight),
            "gate": losses.gate_loss(routing.head_gates),
            "queries": torch.tensor(float(len(queries)), device=device),
        }

    def _cross_entropy(
        self, logits: Float[Tensor, "batch vocab"], queries: Sequence[Query]
    ) -> Float[Tensor, ""]:
        """Returns the cross-entropy of the answers, over what `ce_scope` says."""
        device = self.decoder.device
        label_list = [query.label for query in queries]
        labels = torch.tensor(label_list, dtype=torch.long, device=device)
        id_lists = [torch.tensor(query.option_ids, device=device) for query in queries]
        # Tasks differ in their number of options; negative tokens stand for missing ones.
        option_ids = pad_sequence(id_lists, batch_first=True, padding_value=-1)
        if self.config.ce_scope == "options":
            return losses.option_loss(logits, option_ids, labels)
        answer_ids = option_ids.gather(1, labels[:, None])[:, 0]
        return torch.nn.functional.cross_entropy(logits, answer_ids)

    def _update(self, terms: dict[str, Tensor]) -> None:
        """Takes one step on the mean over the queries of all processes."""
        config = self.config
        means = torch.stack([terms[name] for name in _TERMS])
        weights = means.new_tensor([1.0, config.w_conf, config.w_spar, config.w_gate])
        n_queries = terms["queries"]
        gradient = self._gradient(means @ weights, n_queries)
        # One behind the other, since every exchange between processes costs a wait.
        sums = torch.cat([gradient, means.detach() * n_queries, n_queries[None]])
        sums = total(sums)
        n_queries = sums[-1]
        # None of the queries was finite: a step without a move.
        if not n_queries:
            self.step += 1
            return
        averages = sums / n_queries
        sizes = [len(gradient), len(_TERMS), 1]
        gradient, means, _ = averages.split(sizes)
        loss = (means @ weights).item()
        if not averages.isfinite().all():
            raise ValueError(
                f"the training loss is {loss} at step {self.step}, or its gradient is not finite: "
                f"lower `lr` ({config.lr}) or load the model in float32"
            )
        self._is_between_steps = False
        self._move(gradient)
        self.step += 1
        term_values = dict(zip(_TERMS, means.tolist(), strict=True))
        self.log.append({"step": self.step, "loss": loss, **term_values, "lr": config.lr})
        self._is_between_steps = True

    def _gradient(
        self, loss: Float[Tensor, ""], n_queries: Float[Tensor, ""]
    ) -> Float[Tensor, "n_parameters"]:
        """Returns the gradient of the loss, summed over this process's queries."""
        parameters = list(self.router.parameters())
        # Without a query, the loss depends on no parameter.
        if not n_queries:
            return torch.cat([torch.zeros_like(each).detach().flatten() for each in parameters])
        gradients = torch.autograd.grad(loss * n_queries, parameters)
        return torch.cat([gradient.flatten() for gradient in gradients])

    def _move(self, gradient: Float[Tensor, "n_parameters"]) -> None:
        """Takes the optimizer's step along a gradient, which is clipped."""
        parameters = list(self.router.parameters())
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, part in zip(parameters, gradient.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        torch.nn.utils.clip_grad_norm_(parameters, self.config.grad_clip)
        self.optimizer.step()

    def _save(self) -> None:
        """Writes a checkpoint and the log, if there is a folder."""
        if self.folder is None or not is_first():
            return
        tensors = {f"router.{name}": value for name, value in self.router.state_dict().items()}
        moving_averages = self.optimizer.state_dict()["state"]
        for index, state in moving_averages.items():
            for kind, value in state.items():
                tensors[f"optimizer.{index}.{kind}"] = value.clone()
        tensors |= {f"best.{name}": value for name, value in self.watch.best.items()}
        looks = [asdict(look) for look in self.watch.looks]
        metadata = {
            "step": str(self.step),
            "log": json.dumps(self.log),
            "looks": json.dumps(looks),
            "kept": json.dumps(self.watch.kept_step),
            "n_steps": str(self.n_steps),
            "n_held": str(n_rows_of(self.held)),
            "chosen": json.dumps(asdict(self.chosen) if self.chosen else None),
            "n_queries": str(n_rows_of(self.queries)),
        }
        save_tensors(self.folder / CHECKPOINT_FILE, tensors, metadata)
        # Whole each time: a checkpoint that is taken up may be older than the last line.
        look_by_step = {look.step: look for look in self.watch.looks}
        lines = []
        for step_entry in self.log:
            look = look_by_step.get(int(step_entry["step"]))
            on_validation = look.named() if look else {}
            lines.append(json.dumps({**step_entry, **on_validation}) + "\n")
        (self.folder / "training.jsonl").write_text("".join(lines))

    def _restore(self, folder: Path) -> None:
        """Takes up the checkpoint that `_save` wrote."""
        tensors, metadata = load_tensors(folder / CHECKPOINT_FILE)
        self.step = int(metadata["step"])
        self.log = json.loads(metadata["log"])
        # Checkpoints of earlier versions have no looks.
        looks = json.loads(metadata.get("looks", "[]"))
        self.watch.looks = [Look(**look) for look in looks]
        names = list(self.router.state_dict())
        self.router.load_state_dict({name: tensors.pop(f"router.{name}") for name in names})
        if f"best.{names[0]}" in tensors:
            best = {name: tensors.pop(f"best.{name}") for name in names}
            self.watch.best = {name: value.to(self.decoder.device) for name, value in best.items()}
        optimizer = self.optimizer.state_dict()
        # Without the router's weights, what is left is the optimizer's: "optimizer.0.exp_avg".
        for name, value in tensors.items():
            _, index, kind = name.split(".")
            optimizer["state"].setdefault(int(index), {})[kind] = value
        self.optimizer.load_state_dict(optimizer)
