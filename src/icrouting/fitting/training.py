"""Stage 3: training the router on the frozen trunk (section 4)."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from icrouting.config import FitConfig
from icrouting.decoder.batches import finite_rows
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.partial import LateEntry, late_entry
from icrouting.fitting import losses
from icrouting.fitting.trunk import TrunkState, pad_states
from icrouting.routing.attach import Attachment, attach
from icrouting.routing.pids import PIDs
from icrouting.routing.router import Router
from icrouting.runtime.processes import is_first, mine, total
from icrouting.runtime.progress import track
from icrouting.runtime.storage import load_tensors, save_tensors

CHECKPOINT_EVERY = 25
_TERMS = ("ce", "conf", "spar", "gate")


@dataclass(frozen=True)
class Query:
    """One training query: what the trunk left of its zero-shot prompt, E(x), its options' tokens, and its text."""

    state: TrunkState
    features: Tensor
    option_ids: list[int]
    label: int
    text: str = ""


def alpha_scale(step: int, n_steps: int, final: float) -> float:
    """Returns the routing vector's scale at a step: a cosine from 1 to `final` over training."""
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * step / max(1, n_steps)))


@dataclass(eq=False)
class Trainer:
    """One router in training; its state can be saved after any step and taken up again.

    The router is trained in place; checkpoints and `training.jsonl` go to `folder`, if there is one. Several
    processes share the queries of each step and add up their gradients, so that all have the same router.
    """

    decoder: Decoder
    pids: PIDs
    router: Router
    queries: Sequence[Query]
    config: FitConfig
    folder: Path | None = None

    def __post_init__(self):
        self.optimizer = torch.optim.AdamW(self.router.parameters(), lr=self.config.lr)
        self.step = 0
        self.log: list[dict[str, float]] = []
        self.n_steps = self.config.epochs * math.ceil(len(self.queries) / self.config.batch_size)
        if self.folder is not None and (self.folder / "training.safetensors").exists():
            self._restore(self.folder)

    def run(self) -> None:
        """Trains to the end, from where the last checkpoint stands."""
        steps = range(self.step, self.n_steps)
        with (
            attach(self.decoder.model, self.pids) as attachment,
            late_entry(self.decoder.model, self.pids.layers[0]) as entry,
        ):
            try:
                for _ in track(steps, "training", [1] * len(steps), "steps", done=self.step):
                    self._update(
                        self._terms(
                            entry, attachment, [self.queries[row] for row in mine(self._rows())]
                        )
                    )
                    if self.step % CHECKPOINT_EVERY == 0:
                        self._save()
            finally:  # ctrl-C loses no step
                self._save()

    def _rows(self) -> list[int]:
        """The queries of the current step; each epoch has an order of its own, drawn from the seed."""
        epoch, position = divmod(self.step, self.n_steps // self.config.epochs)
        generator = torch.Generator().manual_seed(self.config.seed + epoch)
        order = torch.randperm(len(self.queries), generator=generator)
        return order.split(self.config.batch_size)[position].tolist()

    def _terms(
        self, entry: LateEntry, attachment: Attachment, queries: Sequence[Query]
    ) -> dict[str, Tensor]:
        """Returns the means of the objective's terms over queries, and the number of "queries" behind them."""
        config, device = self.config, self.decoder.device
        if not queries:  # more processes than queries in this step, or none that is finite
            return {name: torch.zeros((), device=device) for name in (*_TERMS, "queries")}
        batch, hidden = pad_states([query.state for query in queries], self.decoder.pad_id)
        routing = self.router(torch.stack([query.features for query in queries]).to(device))
        attachment.routing = routing.scaled(
            alpha_scale(self.step, self.n_steps, config.final_alpha_scale)
        )
        logits = entry(batch.to(device), hidden)
        kept = finite_rows(
            logits.isfinite().all(-1), [query.text for query in queries], "logits", config.skip_nan
        )
        if len(kept) < len(queries):  # once more without them: backward, zero times NaN is NaN
            return self._terms(entry, attachment, [queries[row] for row in kept])
        labels = torch.tensor([query.label for query in queries], dtype=torch.long, device=device)
        id_lists = [torch.tensor(query.option_ids, device=device) for query in queries]
        option_ids = pad_sequence(id_lists, batch_first=True, padding_value=-1)
        if config.ce_scope == "options":
            ce = losses.option_loss(logits, option_ids, labels)
        else:
            ce = torch.nn.functional.cross_entropy(
                logits, option_ids.gather(1, labels[:, None])[:, 0]
            )
        plain_entropy = torch.tensor([query.state.entropy for query in queries], device=device)
        return {
            "ce": ce,
            "conf": losses.confidence_loss(logits, plain_entropy),
            "spar": losses.sparsity_loss(routing.routing_vector, config.deepest_weight),
            "gate": losses.gate_loss(routing.head_gates),
            "queries": torch.tensor(float(len(queries)), device=device),
        }

    def _update(self, terms: dict[str, Tensor]) -> None:
        """Takes one step on the mean over the queries of all processes."""
        config, parameters = self.config, list(self.router.parameters())
        n_queries, means = terms["queries"], torch.stack([terms[name] for name in _TERMS])
        weights = means.new_tensor([1.0, config.w_conf, config.w_spar, config.w_gate])
        self.optimizer.zero_grad()
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
        if n_queries:
            gradients = list(torch.autograd.grad((means @ weights) * n_queries, parameters))
        flat = total(
            torch.cat(
                [part.detach().flatten() for part in (*gradients, means * n_queries, n_queries)]
            )
        )
        if not flat[-1]:  # none was finite
            self.step += 1
            return
        flat /= flat[-1].clone()
        values = flat[-1 - len(_TERMS) : -1]
        loss = (values @ weights).item()
        if not flat.isfinite().all():
            raise ValueError(
                f"the training loss is {loss} at step {self.step}, or its gradient is not finite: lower `lr` "
                f"({config.lr}) or load the model in float32"
            )
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, part in zip(parameters, flat[: sum(sizes)].split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip)
        self.optimizer.step()
        self.step += 1
        logged = dict(zip(_TERMS, values.tolist(), strict=True))
        self.log.append({"step": self.step, "loss": loss, **logged, "lr": config.lr})

    def _save(self) -> None:
        if self.folder is None or not is_first():
            return
        tensors = {f"router.{name}": value for name, value in self.router.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value.clone() for name, value in state.items()}
        metadata = {"step": str(self.step), "log": json.dumps(self.log)}
        save_tensors(self.folder / "training.safetensors", tensors, metadata)
        (self.folder / "training.jsonl").write_text(
            "".join(json.dumps(entry) + "\n" for entry in self.log)
        )

    def _restore(self, folder: Path) -> None:
        tensors, metadata = load_tensors(folder / "training.safetensors")
        self.step, self.log = int(metadata["step"]), json.loads(metadata["log"])
        self.router.load_state_dict(
            {name: tensors.pop(f"router.{name}") for name in self.router.state_dict()}
        )
        optimizer = self.optimizer.state_dict()
        for name, value in tensors.items():
            _, index, kind = name.split(".")
            optimizer["state"].setdefault(int(index), {})[kind] = value
        self.optimizer.load_state_dict(optimizer)
