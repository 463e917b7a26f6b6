"""Finds the rank of the true class of every tested video, under every setting of the score.

N = videos, V = views, D = embedding width, C = classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from featstore.errors import UserError, WorkError, counted
from featstore.format.class_texts import ClassText
from featstore.format.schema import STATUS_OK, RowArray, Shown
from featstore.progress import ProgressSink, no_progress
from featstore.reading.store import Store
from heads.compatibility import check_complete
from heads.evaluation.details import Confidences, NotEvaluated
from heads.evaluation.protocols.protocol import LabelIds, TestSet
from heads.methods.head import Head
from heads.methods.mote.modulation import require_neighbours
from heads.scoring import TOP_K
from heads.scoring.scores import BlockScores, Scoring, best_classes, ranks
from heads.scoring.view_summaries import ViewSummaries, summarise_store
from heads.training.ranks import Ranks

NOT_EVALUATED = -1

Entries = npt.NDArray[np.int64] | npt.NDArray[np.float64]


class Measurement:
    """The tested rows of a store, and their outcomes under every setting in every test set.

    `listed` (int64) holds the array rows of all test sets, `positions` their places among the
    store's samples, and `keys` their keys. `usable` holds the indices into `listed` of the rows
    that a score can be computed for. Test set t has the label ids `candidates[t]` and the indices
    `members[t]` into `listed`. Under setting s, `places[s][t]` int64 [members] is the rank of the
    true class of every member (0 = best), `predicted[s][t]` int64 [members, K] the labels of the K
    best candidates, and `confidences[s][t]` float64 of the same shape how sure the model is of
    each (`BlockScores.confidences`). All are -1 for a row whose extraction failed. K is `TOP_K`, or
    the number of candidates if that is smaller; without confidences it is 1.

    If the store's videos may show several classes, there are no places: `scores[s][t]` float64
    [members, candidates] holds all scores (-inf for a row without), and `shown[t]` bool of the same
    shape which candidates each video shows.
    """

    def __init__(self, store: Store, tests: Sequence[TestSet]) -> None:
        self.store = store
        self.tests = tests
        rows = [np.unique(np.asarray(test.rows, np.int64)) for test in tests]
        self.listed: RowArray = np.unique(np.concatenate(rows))
        self.members = [np.searchsorted(self.listed, part) for part in rows]
        self.positions = store.positions(self.listed) if len(self.listed) else self.listed
        self.keys = [store.keys[at] for at in self.positions.tolist()]
        self.usable = np.flatnonzero(store.status[self.positions] == STATUS_OK)
        self.labels: LabelIds = store.labels[self.positions].astype(np.int64)
        self.places: list[list[LabelIds]] = []
        self.predicted: list[list[LabelIds]] = []
        self.confidences: list[list[Confidences]] = []
        every = np.arange(len(store.class_names))
        self.candidates = [every if test.classes is None else test.classes for test in tests]
        self.scores: list[list[npt.NDArray[np.float64]]] = []
        self.shown: list[Shown] = []
        self._locals: list[LabelIds] = []
        if store.multi_label:
            shown = store.shown(self.listed)
            pairs = zip(self.members, self.candidates, strict=True)
            self.shown = [shown[members][:, classes] for members, classes in pairs]
        else:
            self._locals = [self._local_labels(t) for t in range(len(tests))]

    def run(
        self,
        head: Head,
        scorings: Sequence[Scoring],
        text: ClassText,
        *,
        frames: npt.NDArray[np.int64] | None = None,
        precision: str = "fp32",
        clip: ClipFeatures | None = None,
        confident: bool = False,
        progress: ProgressSink = no_progress,
    ) -> None:
        """Fill `places` and `predicted`, and with `confident` also `confidences`.

        In a process group each process computes a part, and every process gets all of the results.
        Raises WorkError when a score is not finite.
        """
        group = Ranks.joined_before()
        mine = self.usable[group.rank :: group.world_size]
        where = head.logit_scale.device
        # slots[t][i]: the index of entry i of `listed` among the members of test set t, or -1.
        slots = np.full((len(self.members), len(self.listed)), -1, np.int64)
        for slot, members in zip(slots, self.members, strict=True):
            slot[members] = np.arange(len(members))
        named = [min(TOP_K, len(c)) if confident else 1 for c in self.candidates]
        shapes = [(len(m), k) for m, k in zip(self.members, named, strict=True)]
        for _ in scorings:
            self.places.append([np.full(n, NOT_EVALUATED, np.int64) for n, _ in shapes])
            self.predicted.append([np.full(shape, NOT_EVALUATED, np.int64) for shape in shapes])
            if confident:
                self.confidences.append([np.full(shape, float(NOT_EVALUATED)) for shape in shapes])
            self.scores.append([np.full(shown.shape, -np.inf) for shown in self.shown])
        candidates = [
            None if test.classes is None else torch.from_numpy(test.classes).to(where)
            for test in self.tests
        ]
        classes = torch.from_numpy(text.embeddings).to(where)
        scorer = head.scorer(classes, text.names)
        scale = head.logit_scale.detach().double().exp()
        bias = None if head.logit_bias is None else head.logit_bias.detach()
        blocks = summarise_store(
            self.store,
            head,
            self.listed[mine],
            frames=frames,
            precision=precision,
            progress=progress,
        )
        for start, summaries in blocks:
            part = mine[start : start + len(summaries.features)]
            ensemble = None
            if clip is not None:
                ensemble = clip.summaries(self.listed_keys(part)), clip.classes
            trained = head.training_class_embeddings
            block = BlockScores(summaries, classes, trained, ensemble, scorer, scale)
            for t, test in enumerate(self.tests):
                slot = slots[t][part]
                at = np.flatnonzero(slot >= 0)
                if len(at) == 0:
                    continue
                videos = slice(None) if len(at) == len(part) else torch.from_numpy(at).to(where)
                all_modulate = test.modulation_classes == "all"
                for s, scoring in enumerate(scorings):
                    asked = scoring, videos, candidates[t], all_modulate
                    scores = block.scores(*asked)
                    self._require_finite(scores, part[at])
                    best = best_classes(scores, named[t])
                    if self.shown:
                        self.scores[s][t][slot[at]] = scores.cpu().numpy()
                    else:
                        labels = torch.from_numpy(self._locals[t][slot[at]]).to(where)
                        self.places[s][t][slot[at]] = ranks(scores, labels).cpu().numpy()
                    self.predicted[s][t][slot[at]] = self.candidates[t][best.cpu().numpy()]
                    if confident:
                        sure = block.confidences(scale, *asked, bias=bias).gather(1, best)
                        self.confidences[s][t][slot[at]] = sure.cpu().numpy()
        self._gather(group, (self.places, self.predicted))
        if confident:
            self._gather(group, (self.confidences,))
        if self.shown:
            self._gather(group, (self.scores,))

    def listed_keys(self, members: npt.NDArray[np.integer]) -> list[str]:
        """Return the keys of the entries of `listed` that have the indices `members`."""
        return [self.keys[member] for member in members.tolist()]

    def failed(self, members: npt.NDArray[np.integer]) -> list[NotEvaluated]:
        """Return the entries of `listed` that have the indices `members` and were not evaluated."""
        reasons = self.store.reasons if len(members) else []
        found = []
        for member in members.tolist():
            reason = reasons[self.positions[member]] or "no CLIP features for the ensemble"
            found.append(NotEvaluated(self.keys[member], int(self.labels[member]), reason))
        return found

    def _local_labels(self, t: int) -> LabelIds:
        """Return the label of every member of test set t as an index into its candidates."""
        labels, classes = self.labels[self.members[t]], self.candidates[t]
        number = np.full(len(self.store.class_names), -1)
        number[classes] = np.arange(len(classes))
        local: LabelIds = number[labels]
        if (local < 0).any():
            at = int(np.flatnonzero(local < 0)[0])
            name = self.store.class_names[int(labels[at])]
            raise UserError(
                f"the class list of {self.tests[t].name} does not match its videos: "
                f"{self.keys[self.members[t][at]]} is of class {name!r}, which is not among its "
                f"{len(classes)} candidates"
            )
        return local

    def _require_finite(self, scores: torch.Tensor, members: npt.NDArray[np.integer]) -> None:
        finite = scores.isfinite().all(1).cpu().numpy()
        if not finite.all():
            raise WorkError(
                f"the scores of sample {self.keys[members[~finite][0]]} are not finite: check the "
                "head and the features"
            )

    def _gather(self, group: Ranks, tables: Sequence[Sequence[Sequence[Entries]]]) -> None:
        """Give every process all entries; each entry is -1 or -inf in all processes but one."""
        parts = [array.reshape(-1) for table in tables for row in table for array in row]
        values, start = group.greatest(torch.from_numpy(np.concatenate(parts))).numpy(), 0
        for array in parts:  # views of the tables' arrays
            array[:] = values[start : start + len(array)]
            start += len(array)


class ClipFeatures:
    """Raw CLIP features of the tested videos from another store, for CLIP's part of an ensemble.

    An ensemble needs this if the tested store was made with a tuned tower. `frames` are the indices
    of the frames taken from the tested store, None for all. They are taken here too, unless this
    store holds another number of frames per view: then all of its frames are taken. UserError when
    this store has other videos, views or classes.
    """

    def __init__(
        self,
        store: Store,
        tested: Store,
        prompt_set: str,
        frames: npt.NDArray[np.int64] | None,
        device: torch.device,
    ) -> None:
        check_complete(store)
        if store.schema.views != tested.schema.views:
            raise UserError(
                f"{store.path.name} has {counted(store.schema.views, 'view')} and "
                f"{tested.path.name} {tested.schema.views}: an ensemble needs CLIP features of the "
                "same views"
            )
        text = store.class_text(prompt_set)
        if list(text.names) != tested.class_names:
            raise UserError(
                f"{store.path.name} has other classes than {tested.path.name}: take CLIP features "
                "of the same data set"
            )
        self.store = store
        self.classes = torch.from_numpy(text.embeddings).to(device)
        self._frames = frames if store.schema.frames == tested.schema.frames else None
        self._device = device

    def failed(self, keys: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Tell which extractions failed, bool [n]; UserError for a key that the store lacks."""
        positions = self.store.positions(self._rows(keys))
        return np.asarray(self.store.status[positions] != STATUS_OK)

    def summaries(self, keys: Sequence[str]) -> ViewSummaries:
        """Return the summaries [n,V,D] of CLIP's features alone, without a head."""
        stored = self.store.features(self._rows(keys), self._frames)
        features = torch.from_numpy(stored).float().to(self._device)
        units = functional.normalize(features, dim=-1).mean(2)
        return ViewSummaries(None, features.mean(2), units)

    def _rows(self, keys: Sequence[str]) -> RowArray:
        return np.array([self.store.row(key) for key in keys], np.int64)


def check_candidates(
    tests: Sequence[TestSet], scorings: Sequence[Scoring], text: ClassText, head: Head
) -> None:
    """Raise UserError if candidates are not classes of the store, or the head cannot score them."""
    names = [test.name for test in tests]
    if len(set(names)) < len(names):
        raise ValueError(f"test sets need distinct names, not {names}")
    for test in tests:
        wanted = np.arange(len(text.names)) if test.classes is None else test.classes
        outside = wanted[(wanted < 0) | (wanted >= len(text.names))]
        problem = f"label {outside[0]} is not among them" if len(outside) else ""
        problem = problem or ("" if len(wanted) else "it is empty")
        if problem or len(np.unique(wanted)) < len(wanted):
            raise UserError(
                f"the class list of {test.name} does not match the {len(text.names)} classes of "
                f"the store: {problem or 'it names a class twice'}"
            )
        head.require_classes([text.names[label] for label in wanted.tolist()])
        tested = len(text.names) if test.modulation_classes == "all" else len(wanted)
        for scoring in scorings:
            if scoring.modulate:
                trained = head.training_class_embeddings.shape[0]
                require_neighbours(tested, trained, scoring.modulation_neighbours)
