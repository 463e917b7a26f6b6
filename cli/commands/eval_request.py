"""What `mote-cli eval` was asked for, and the measurement of one head or of a sweep of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cli import options
from cli.commands import eval_sweep
from cli.commands import eval_unseen as unseen
from cli.output import progress_of
from featstore.errors import UserError
from featstore.reading.store import Store
from featstore.workspace import Workspace

if TYPE_CHECKING:
    from heads.evaluation.protocols.protocol import Kind, Protocol, TestSet
    from heads.evaluation.results import EvalResult
    from heads.methods.head import Head

EVALUATION_SPLITS: Final = ("val", "test")


@dataclass(frozen=True)
class Request:
    """What was asked for, apart from the head and the store, which a sweep of blends changes."""

    workspace: Workspace
    dataset: str
    kind: Kind
    protocol: Protocol | None
    split: str | None
    views: str | None
    sampling: str | None
    prompts: str | None
    fixed: dict[str, Any]
    swept: eval_sweep.Values
    clip_store: str | None
    allow_overlap: bool
    label_map: str
    unseen: unseen.UnseenChoice
    precision: str
    device: str

    def measure(
        self, model: Head | None, run_dir: Path, store_name: str | None
    ) -> tuple[list[tuple[EvalResult, Path]], list[dict[str, Any]]]:
        """(results with their run folders, blends that could not be measured and why)."""
        shares = self.swept.get(eval_sweep.BLEND)
        if shares is None:
            return self._measure_run(model, run_dir, store_name), []
        if store_name is not None:
            raise UserError("--sweep blend takes the store of every tower: leave --store out")
        found, missing = [], []
        for blended in eval_sweep.blended_runs(self.workspace, run_dir, shares, self.dataset):
            reason = "there is no head with this share"
            if blended.run_dir is not None:
                own, _ = options.head(self.workspace, blended.run_dir.name)
                try:
                    store = self._store(own, None)
                except UserError as error:
                    reason = str(error)
                else:
                    found += self._measure_run(own, blended.run_dir, store.path.name)
                    continue
            missing.append({"blend": blended.share, "reason": reason, "remedy": blended.remedy})
        if not found:
            raise UserError(
                f"no store of {self.dataset} was made with one of these blends: "
                f"{missing[0]['reason']}; make one with {missing[0]['remedy']}"
            )
        return found, missing

    def _measure_run(
        self, model: Head | None, run_dir: Path, store_name: str | None
    ) -> list[tuple[EvalResult, Path]]:
        from heads.compatibility import mean_head
        from heads.evaluation.evaluate import evaluate_many
        from heads.evaluation.leaks import require_no_leak
        from heads.evaluation.protocols.choose import usual_protocol, views_of
        from heads.evaluation.results import run_facts

        store = self._store(model, store_name)
        protocol = self.protocol or usual_protocol(
            self.kind,
            self.dataset,
            split=self.split,
            views=views_of(store),
            split_names=store.split_names,
        )
        tests, names_from = self._tests(protocol, store, model)
        overlap = None
        if model is not None:
            overlap = require_no_leak(store, tests, run_dir, allow=self.allow_overlap)
        scorer = model or mean_head(store.provenance.dim)
        scorings = eval_sweep.settings(scorer.config, self.fixed, self.swept, protocol.fusion)
        with progress_of("eval", "videos") as progress:
            measured = evaluate_many(
                store,
                model,
                scorings,
                protocol=protocol,
                dataset=self.dataset,
                tests=tests,
                head_name=self.workspace.head_name(run_dir),
                views=self.views,
                prompt_set=options.prompt_set(store, self.prompts),
                clip_store=self.chosen_clip_store(),
                facts=run_facts(run_dir, n_trained_on=overlap, class_names_source=names_from),
                device=self.device,
                precision=self.precision,  # type: ignore[arg-type]  # it is checked there
                progress=progress,
            )
        return [(result, run_dir) for result in measured]

    def _store(self, model: Head | None, name: str | None) -> Store:
        from heads.evaluation.label_maps import named_as
        from heads.evaluation.protocols.choose import count_views, known_dataset, usual_protocol

        origin = None if model is None else model.origin
        split = self.split
        named = self.protocol or usual_protocol(self.kind, self.dataset, split=split)
        if named.lists == "given":
            split = self.unseen.split(self.workspace, self.dataset)
        if self.kind == "closeset":
            split = split or self.workspace.default_split(self.dataset, EVALUATION_SPLITS)
        store = self.workspace.choose_store(
            self.dataset,
            split=split,
            views=None if self.views is None else count_views(self.views),
            encoder_fingerprint=None if origin is None else origin.encoder_fingerprint,
            sampling=self.sampling,
            name=name,
            encoder=None if origin is None else origin.encoder,
        )
        return named_as(store, known_dataset(self.dataset), self.label_map)

    def _tests(
        self, protocol: Protocol, store: Store, model: Head | None
    ) -> tuple[tuple[TestSet, ...], str | None]:
        """The test sets, and where their class names are from where it is not the data set."""
        from heads.evaluation.protocols.choose import build_test_sets

        if protocol.lists == "given":
            return self.unseen.tests(self.workspace, store, model)
        self.unseen.require_unused(protocol.name)
        return build_test_sets(protocol, store, self.split), None

    def chosen_clip_store(self) -> Store | None:
        """The store of CLIP's own features; UserError where nothing would take them."""
        if self.clip_store is None:
            return None
        if self.fixed["ensemble"] is None and eval_sweep.ENSEMBLE not in self.swept:
            raise UserError("--clip-store is for --ensemble WEIGHT or --sweep ensemble=...")
        return self.workspace.choose_store(self.dataset, name=self.clip_store)
