"""InContextRouter: fit once on a few tasks, attach to the same model on any task."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icrouting import artifact, fitting
from icrouting.artifact import Description
from icrouting.batches import pad_id_of
from icrouting.config import FitConfig
from icrouting.families import check_layers, device_of, dims_of, family_of, late_third
from icrouting.features import Features, Reader, features_of
from icrouting.models import fingerprint, frozen
from icrouting.pids import PIDs
from icrouting.routed import Routed, rerouted
from icrouting.router import Router
from icrouting.tasks import Task
from icrouting.train import Trainer


@dataclass(frozen=True)
class InContextRouter:
    """PIDs and a trained router for one base model (arXiv 2509.22854).

    Attributes:
        description: what it is and where it comes from; the artifact's config.json.
        pids: the directions.
        router: the trained router.
    """

    description: Description
    pids: PIDs
    router: Router

    @classmethod
    def fit(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Sequence[Task],
        config: FitConfig | None = None,
        *,
        folder: str | Path | None = None,
    ) -> "InContextRouter":
        """Returns a router fitted on source tasks: extraction, PIDs, training (sections 2 to 4).

        Args:
            model: a frozen decoder of a known family, from `load_model` or `from_pretrained`.
            tokenizer: its tokenizer.
            tasks: the source tasks.
            config: settings; None takes the defaults.
            folder: keeps the stages' results, so that a fit that was stopped goes on from there.

        Raises:
            ValueError: the model cannot be routed, or the settings, tasks or folder do not fit.
        """
        config = config or FitConfig()
        if not tasks:
            raise ValueError("a fit needs at least one source task, got none")
        family_of(model)
        dims, digest = dims_of(model), fingerprint(model)
        layers = config.layers or late_third(dims.n_layers)
        check_layers(layers, dims.n_layers)
        where = Path(folder) if folder is not None else None
        if where is not None:
            fitting.claim_folder(where, config, tasks, digest)
        features = features_of(config.encoder, model, tokenizer, str(device_of(model)))
        generator = torch.Generator().manual_seed(config.seed)
        router = Router(features.n_features, len(layers), dims.n_heads, config.rank, config.hidden_width, generator)
        router.to(device_of(model))
        with frozen(model):
            pids = fitting.extract(model, tokenizer, tasks, layers, config, where)
            queries, scale = fitting.training_queries(model, tokenizer, tasks, features, layers[0], config)
            Trainer(model, pids, router, queries, config, pad_id_of(tokenizer), where).run()
        router.absorb(*scale)
        description = artifact.describe(model, tasks, config, layers, features)
        return cls(description, pids, router.eval().requires_grad_(False))

    def _features(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Features:
        """What the router reads; ValueError if it is not what the router was fitted with."""
        description = self.description
        features = features_of(description.fit.encoder, model, tokenizer, "cpu")
        if features.fingerprint != description.encoder:
            raise ValueError(
                f"the router was fitted with another sentence encoder than {description.fit.encoder!r} is here: "
                f"expected weights {description.encoder}, got {features.fingerprint}"
            )
        return features

    @contextmanager
    def attached(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, strength: float = 1.0
    ) -> Iterator[Routed]:
        """Inside, every plain `model(...)` and `model.generate(...)` is routed by the prompt it is given.

        On leaving, also by an exception, the model is as it was found.

        Args:
            model: the base model that the router was fitted on.
            tokenizer: its tokenizer.
            strength: factor on the routing vector; 0 gives the logits of the untouched model.

        Raises:
            ValueError: another base model, or one that is attached already.
        """
        found, expected = fingerprint(model), self.description.fingerprint
        if found != expected:
            raise ValueError(
                f"this router was fitted on {self.description.base_model!r} (fingerprint {expected}), this model is "
                f"{model.config.name_or_path!r} ({found}): load the base model it was fitted on, or fit a new router"
            )
        self.router.to(device_of(model))
        scale = strength * self.description.fit.final_alpha_scale
        features = self._features(model, tokenizer)
        reader = Reader(model, tokenizer, features, self.router, self.pids.layers[0], scale)
        if strength == 0:  # exact in every dtype: wider heads round differently below float32
            yield Routed(reader, self.pids.layers, [])
            return
        with rerouted(reader, self.pids) as last:
            yield Routed(reader, self.pids.layers, last)

    def digest(self) -> str:
        """Returns 16 hex digits that identify the router's weights."""
        return artifact.digest(self.pids, self.router)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json, model.safetensors and a model card (README.md) to a folder."""
        artifact.save(Path(folder), self.description, self.pids, self.router)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None) -> "InContextRouter":
        """Returns a saved router.

        Args:
            name: a folder, or a hub id.
            revision: branch, tag or commit, for a hub id.

        Raises:
            ValueError: nothing is there, or it is damaged, of a newer format, or of wrong shapes.
        """
        return cls(*artifact.load(artifact.locate(str(name), revision)))

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Uploads the artifact to the hub and returns its address.

        Args:
            repo_id: "owner/name".
            private: whether a repository made for it is private.
            token: access token; None takes the one you are logged in with.
        """
        return artifact.push(repo_id, self.description, self.pids, self.router, private=private, token=token)
