"""Where things lie under the workspace root, and which store or run a command works on.

`datasets/<name>`, `features/<name>/*.zarr`, `heads/<run>`, `encoders/<name>`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from featstore.errors import UserError, WorkError
from featstore.files.documents import LISTS_LIMIT, found_object
from featstore.format.tiers import EMBEDDINGS
from featstore.remote.urls import is_url

if TYPE_CHECKING:
    from featstore.reading.store import Store

log = logging.getLogger(__name__)

NAME_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,127}")
_UNSAFE = re.compile(r"[^A-Za-z0-9._+]+")

STORE_SUFFIX: Final = ".zarr"
HEAD_FILE: Final = "head.safetensors"
CONFIG_FILE: Final = "config.json"
DATASET_FILE: Final = "dataset.json"
FIRST_STAGE: Final = "frozen"
"""The folder in a fine-tuning's run that keeps the head it began with, if both have one name."""
PROTOCOL_FIELD: Final = "protocol"
"""The field in a run's config.json that names the evaluation protocol that trained the run."""


class Workspace:
    """The folder that holds data sets, features, heads and encoders (made as needed)."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def dataset_dir(self, name: str) -> Path:
        """Return the folder of a packed data set; UserError if `name` is no plain file name."""
        return self.root / "datasets" / _checked(name, "data set")

    def features_dir(self, name: str) -> Path:
        """Return the folder of a data set's stores; UserError as `dataset_dir`."""
        return self.root / "features" / _checked(name, "data set")

    def run_dir(self, name: str) -> Path:
        """Return the folder of one trained head; UserError as `dataset_dir`."""
        return self.root / "heads" / _checked(name, "run")

    def head_dir(self, name: str) -> Path:
        """Return the folder of head `RUN`, or of `RUN/frozen`, the first stage of a fine-tuning.

        UserError as `dataset_dir`.
        """
        run, _, stage = name.partition("/")
        return self.run_dir(run) / stage if stage == FIRST_STAGE else self.run_dir(name)

    def head_name(self, folder: Path) -> str:
        """Return the name of the head in this folder; the inverse of `head_dir`."""
        return folder.relative_to(self.root / "heads").as_posix()

    def encoder_dir(self, name: str) -> Path:
        """Return the folder of an imported or fine-tuned encoder; UserError as `dataset_dir`."""
        return self.root / "encoders" / _checked(name, "encoder")

    def trained_runs(self) -> list[Path]:
        """Return the folders of runs that hold a finished head, newest config.json first."""
        begun = (self.root / "heads").glob(f"*/{CONFIG_FILE}")
        found = [
            (p.stat().st_mtime_ns, p.parent) for p in begun if (p.parent / HEAD_FILE).is_file()
        ]
        return [folder for _, folder in sorted(found, reverse=True)]

    def stores(self, dataset: str) -> list[Path]:
        """Return the folders of a data set's stores, sorted by name."""
        return sorted(p for p in self.features_dir(dataset).glob(f"*{STORE_SUFFIX}") if p.is_dir())

    def store_path(
        self,
        dataset: str,
        *,
        encoder: str,
        sampling: str,
        crops: int = 1,
        split: str | None = None,
        tier: str = EMBEDDINGS,
    ) -> Path:
        """Return the store's path: `<encoder>--<sampling>[--crops3][--<tier>][--<split>].zarr`.

        Characters that trouble file systems or copying tools become "-".
        """
        parts = [encoder, sampling, f"crops{crops}" if crops > 1 else ""]
        parts += ["" if tier == EMBEDDINGS else tier, split or ""]
        safe = [_UNSAFE.sub("-", part).strip("-.") for part in parts]
        name = "--".join(part for part in safe if part)
        return self.features_dir(dataset) / f"{name}{STORE_SUFFIX}"

    def choose_dataset(self, name: str | None) -> str:
        """Return `name` or, if it is None, the only data set with features.

        Raises UserError if several data sets have features (it lists them) or none has (it names
        the command that makes some).
        """
        if name is not None:
            return name
        stores = (self.root / "features").glob(f"*/*{STORE_SUFFIX}")
        found = sorted({path.parent.name for path in stores})
        if not found:
            raise UserError(
                f"no features under {self.root / 'features'}: run `mote-cli extract` first"
            )
        if len(found) > 1:
            raise UserError(
                f"several data sets have features ({', '.join(found)}): name one with --dataset"
            )
        log.info("data set: %s, the only one with features", found[0])
        return found[0]

    def opened(self, dataset: str) -> OpenedStores:
        """Return the stores of a data set as an object that opens each of them only once."""
        return OpenedStores(self, dataset)

    def _packed_splits(self, dataset: str) -> dict[str, bool] | None:
        """Return the splits that dataset.json names, and whether each has tars of its own.

        None if the data set is not here or its file cannot be read; packing and extracting report
        what is wrong with that file.
        """
        try:
            packed = found_object(self.dataset_dir(dataset) / DATASET_FILE, LISTS_LIMIT) or {}
            own_tars = bool(packed["splits_disjoint"])
            return {str(name): own_tars for name in packed["split_names"]}
        except (LookupError, TypeError):
            return None

    def choose_run(self, name: str | None) -> Path:
        """Return the folder of the named head, or of the newest; it holds head.safetensors.

        Without a name, runs that an evaluation trained (few-shot, base-to-novel) and first stages
        of fine-tunings (`RUN/frozen`) are not considered. Raises UserError, which lists the runs,
        if there is no head of that name; or which says how to train one, if there is no head.
        """
        wanted = None if name is None else self.head_dir(name)
        if wanted is not None and (wanted / HEAD_FILE).is_file():
            return wanted
        if wanted is not None and (wanted / FIRST_STAGE / HEAD_FILE).is_file():
            raise UserError(
                f"run {name} has no head yet: its fine-tuning is not finished (`mote-cli finetune` "
                f"with --resume continues it); it began with --head {name}/{FIRST_STAGE}"
            )
        trained = self.trained_runs()
        if not trained:
            raise UserError(
                f"no trained head under {self.root / 'heads'}: run `mote-cli train-head` first"
            )
        if name is not None:
            known = ", ".join(run.name for run in trained)
            raise UserError(
                f"no trained head {name!r} in {self.root / 'heads'}: choose one of {known}"
            )
        own = next((run for run in trained if not _is_part_of_protocol(run)), None)
        if own is None:
            raise UserError(
                f"every head under {self.root / 'heads'} was trained by an evaluation: name "
                f"one with --head ({', '.join(run.name for run in trained)})"
            )
        log.info("head: %s, the newest run", own.name)
        return own


class OpenedStores:
    """The stores of one data set, each opened once, when it is first needed.

    A store shows what was committed when it was opened; make a new object after a store has grown.
    """

    def __init__(self, workspace: Workspace, dataset: str) -> None:
        self.dataset = dataset
        self._workspace = workspace
        self._opened: dict[Path, Store | UserError | WorkError] = {}

    def open(self, path: Path) -> Store:
        """Return the store at `path`; if opening it fails, each call raises the same error."""
        from featstore.opening import open_store  # folders and names need no arrays

        if path not in self._opened:
            try:
                self._opened[path] = open_store(path)
            except (UserError, WorkError) as error:
                self._opened[path] = error
        found = self._opened[path]
        if isinstance(found, UserError | WorkError):
            raise found
        return found

    def default_split(self, names: Sequence[str]) -> str | None:
        """Return the first split of `names` with rows in a readable store of embeddings, if any."""
        for name in names:
            for path in self._workspace.stores(self.dataset):
                try:
                    _require_match(self.open(path), split=name)
                    return name
                except (UserError, WorkError):
                    continue  # `choose` reports stores that cannot be read
        return None

    def choose(
        self,
        *,
        split: str | None = None,
        views: int | None = None,
        encoder_fingerprint: str | None = None,
        sampling: str | None = None,
        name: str | None = None,
        encoder: str | None = None,
        option: str = "--store",
    ) -> Store:
        """Return the data set's one store of embeddings that fits the split and other arguments.

        `name` is the name of the store's folder, with or without ".zarr", or its URL. In messages,
        `encoder` names the encoder in the command that makes a store, and `option` is the command
        line option that sets `name`.
        Raises UserError if no store fits (with the command that makes one) or several do (with
        their names), WorkError if the store that fits is damaged or not finished.
        """
        from featstore.opening import open_store  # as in `open`

        dataset = self.dataset
        remote = name is not None and is_url(name)
        if remote:
            _require_remote_embeddings(str(name))
        paths = [open_store(str(name)).path] if remote else self._workspace.stores(dataset)
        if not paths:
            raise UserError(
                f"no features of data set {dataset!r} under "
                f"{self._workspace.features_dir(dataset)}: run "
                f"`mote-cli extract --dataset {dataset}` first"
            )
        if name is not None and not remote:
            wanted = f"{name.removesuffix(STORE_SUFFIX)}{STORE_SUFFIX}"
            known = ", ".join(path.name for path in paths)
            paths = [path for path in paths if path.name == wanted]
            if not paths:
                raise UserError(f"data set {dataset!r} has no store {name!r}: it has {known}")
        fitting: list[Store] = []
        refused: list[str] = []
        damaged: list[WorkError] = []
        for path in paths:
            try:
                store = self.open(path)
                _require_match(store, split, views, encoder_fingerprint, sampling)
                fitting.append(store)
            except WorkError as error:
                damaged.append(error)
            except UserError as error:
                refused.append(str(error))
        if not fitting:
            packed = self._workspace._packed_splits(dataset)
            if split is not None and packed is not None and split not in packed:
                raise UserError(
                    f"data set {dataset!r} has no split {split!r}: "
                    + (f"choose one of {', '.join(packed)}" if packed else "it has none to name")
                )
            if damaged:
                raise damaged[0]
            # Splits that share tars also share one store of all those tars.
            own_tars = packed is None or packed.get(split or "", False)
            raise UserError(
                f"no store of data set {dataset!r} fits: {'; '.join(refused)}; make one with "
                + _extract_command(dataset, split if own_tars else None, sampling, encoder)
                + ("" if views is None else f" and a --sampling and --crops of {views} views")
            )
        if len(fitting) > 1:
            names = ", ".join(_describe(store) for store in fitting)
            raise UserError(
                f"{len(fitting)} stores of data set {dataset!r} fit: {names}; choose one with "
                f"{option} NAME"
            )
        store = fitting[0]
        if not store.complete:
            raise WorkError(
                f"{store.path} holds {len(list(store.partitions()))} of {store.schema.tars} "
                "partitions: finish it with the `mote-cli extract` command that started it "
                f"(encoder {store.provenance.encoder}, sampling {store.provenance.sampling})"
            )
        for damage in damaged:
            log.warning("left out: %s", damage)
        log.info("features of %s: %s", dataset, _describe(store))
        return store


def _checked(name: str, kind: str) -> str:
    if not NAME_PATTERN.fullmatch(name):
        raise UserError(
            f"{name!r} is no name for a {kind}: use letters, digits, '.', '_', '+' and '-', "
            "beginning with a letter or digit"
        )
    return name


def _is_part_of_protocol(run: Path) -> bool:
    settings = found_object(run / CONFIG_FILE)  # loading the run reports what is wrong with it
    return settings is not None and bool(settings.get(PROTOCOL_FIELD))


def _require_match(
    store: Store,
    split: str | None,
    views: int | None = None,
    encoder_fingerprint: str | None = None,
    sampling: str | None = None,
) -> None:
    """Raise UserError, which says why, if the store does not fit the arguments."""
    names, made = store.split_names, store.provenance
    reason = ""
    if not store.schema.pooled:
        reason = f"holds {store.tier}, not the embeddings that heads work on"
    elif split is not None and (split not in names or not store.split(split).size):
        reason = f"has no rows of split {split!r} (it has {', '.join(names) or 'none'})"
    elif views is not None and store.schema.views != views:
        reason = f"has {store.schema.views} views, not {views}"
    elif encoder_fingerprint not in (None, made.encoder_fingerprint):
        reason = f"was made with another encoder ({made.encoder})"
    elif sampling not in (None, made.sampling):
        reason = f"has sampling {made.sampling}, not {sampling}"
    if reason:
        raise UserError(f"{store.path.name} {reason}")


def _require_remote_embeddings(url: str) -> None:
    """Raise UserError for a remote store of another tier, before its terabytes are fetched."""
    from featstore.remote.writer import RemoteStoreWriter  # obstore takes a while to load

    writer = RemoteStoreWriter.open(url)
    tier = writer.schema.tier
    writer.close()
    if tier != EMBEDDINGS:
        raise UserError(
            f"{url} holds {tier}, not the embeddings that heads work on: choose or extract a "
            "store without --tier"
        )


def _describe(store: Store) -> str:
    made = store.provenance
    return (
        f"{store.path.name} (sampling {made.sampling}, {store.schema.views} views, "
        f"encoder {made.encoder})"
    )


def _extract_command(
    dataset: str, split: str | None, sampling: str | None, encoder: str | None
) -> str:
    options = f" --split {split}" if split else ""
    options += f" --encoder {encoder}" if encoder else ""
    options += f" --sampling {sampling}" if sampling else ""
    return f"`mote-cli extract --dataset {dataset}{options}`"
