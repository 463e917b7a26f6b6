"""Finds the rank of the true class of every tested video, under every setting of the score.

N = videos, V = views, D = embedding width, C = classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from featstore.errors import UserError, WorkError
from featstore.format.class_texts import ClassText
from featstore.format.schema import STATUS_OK, RowArray
from featstore.progress import ProgressSink, no_progress
from featstore.reading.store import Store
from heads.compatibility import check_complete
from heads.evaluation.protocols.protocol import LabelIds, TestSet
from heads.methods.head import Head
from heads.methods.mote.modulation import require_neighbours
from heads.scoring.scores import BlockScores, Scoring, ranks
from heads.scoring.view_summaries import ViewSummaries, summarise_store
from heads.training.ranks import Ranks

NOT_EVALUATED = -1


class Measurement:
    """The tested rows of a store, and their outcomes under every setting in every test set.

    `listed` (int64) holds the array rows of all test sets, `positions` their places among the
    store's samples, and `keys` their keys. `usable` holds the indices into `listed` of the rows
    that a score can be computed for. Test set t has the label ids `candidates[t]` and the indices
    `members[t]` into `listed`. Under setting s, `places[s][t]` and `predicted[s][t]` (int64) have
    one entry per member: the rank of the true class (0 = best), and the predicted label; both are
    -1 for a row whose extraction failed.
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
        every = np.arange(len(store.class_names))
        self.candidates = [every if test.classes is None else test.classes for test in tests]
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
        progress: ProgressSink = no_progress,
    ) -> None:
        """Fill `places` and `predicted`.

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
        self.places, self.predicted = (
            [[np.full(len(m), NOT_EVALUATED, np.int64) for m in self.members] for _ in scorings]
            for _ in range(2)
        )
        candidates = [
            None if test.classes is None else torch.from_numpy(test.classes).to(where)
            for test in self.tests
        ]
        classes = torch.from_numpy(text.embeddings).to(where)
        scorer = head.scorer(classes, text.names)
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
            block = BlockScores(summaries, classes, trained, ensemble, scorer)
            for t, test in enumerate(self.tests):
                slot = slots[t][part]
                at = np.flatnonzero(slot >= 0)
                if len(at) == 0:
                    continue
                videos = slice(None) if len(at) == len(part) else torch.from_numpy(at).to(where)
                labels = torch.from_numpy(self._locals[t][slot[at]]).to(where)
                all_modulate = test.modulation_classes == "all"
                for s, scoring in enumerate(scorings):
                    scores = block.scores(scoring, videos, candidates[t], all_modulate)
                    best = scores.argmax(1).cpu().numpy()  # the first of equal ones
                    self._require_finite(scores, part[at])
                    self.places[s][t][slot[at]] = ranks(scores, labels).cpu().numpy()
                    self.predicted[s][t][slot[at]] = self.candidates[t][best]
        self._gather(group)

    def listed_keys(self, members: npt.NDArray[np.integer]) -> list[str]:
        """Return the keys of the entries of `listed` that have the indices `members`."""
        return [self.keys[member] for member in members.tolist()]

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

    def _gather(self, group: Ranks) -> None:
        """Give every process all entries; each entry is -1 in all processes but one."""
        parts = [array for table in (self.places, self.predicted) for row in table for array in row]
        values, start = group.greatest(torch.from_numpy(np.concatenate(parts))).numpy(), 0
        for array in parts:
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
                f"{store.path.name} has {store.schema.views} views and {tested.path.name} "
                f"{tested.schema.views}: an ensemble needs CLIP features of the same views"
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
