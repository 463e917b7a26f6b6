"""Videos of a store encoded once more, from the tars and with the encoder it was made with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy.typing as npt

from featstore import Store, open_store
from featstore.checking.verify import Reencoding, reencode
from featstore.errors import UserError, WorkError
from featstore.format.tiers import Tier
from featstore.progress import ProgressSink, no_progress
from featstore.workspace import Workspace
from pipeline.clip_encoder import load_encoder
from pipeline.decoding import decoder_named
from pipeline.decoding.contract import Strictness
from pipeline.extraction.cpu_pool import ThreadVideoPool
from pipeline.extraction.tiers import frame_output
from pipeline.sampling import parse_sampling
from pipeline.tars.dataset import load_dataset
from pipeline.tars.reading import DamagedTar, open_tar


def reencode_store(
    path: Path,
    workspace: Workspace,
    count: int,
    *,
    seed: int = 0,
    device: str = "cpu",
    progress: ProgressSink = no_progress,
) -> Reencoding:
    """Encode `count` rows of a store again, drawn by `seed`, and compare them with what is stored.

    A store in its place knows its workspace; `workspace` has the data set and the encoder of any
    other. Raises what `Reencoder` and `featstore.checking.verify.reencode` do.
    """
    store = open_store(path)
    dataset = store.provenance.dataset
    folder = path.resolve().parent
    if folder.parent.name == "features" and folder.name == dataset:
        workspace = Workspace(folder.parents[1])
    encoders = workspace.root / "encoders"
    with Reencoder(store, workspace.dataset_dir(dataset), encoders, device) as encoder:
        return reencode(store, count, encoder, seed=seed, progress=progress)


class Reencoder:
    """Encodes rows of a store again. A context manager; called with an array row and its key."""

    def __init__(
        self, store: Store, dataset_dir: Path, encoders_dir: Path | None, device: str = "cpu"
    ) -> None:
        """Find the data set in `dataset_dir` and load the encoder that the store names.

        Raises UserError when either is gone or is another one, or was recorded in a way that this
        version does not know; WorkError as `load_dataset` and `load_encoder`.
        """
        made = store.provenance
        self._capacity = store.schema.capacity
        self._tars = store.tars
        self._dataset = load_dataset(dataset_dir)
        self._packed = {tar.sha256: tar for tar in self._dataset.tars}
        strictness: dict[str, Strictness] = {"auto": "auto", "always": "always", "never": "never"}
        decoder = decoder_named(made.decoder, strictness.get(made.strict_decode, "auto"))
        sampling = parse_sampling(made.sampling)
        try:
            encoder = load_encoder(made.encoder, made.precision, device, encoders_dir)
        except (UserError, WorkError) as error:
            raise type(error)(
                f"the encoder of {store.path.name} cannot be loaded, so that nothing can be "
                f"encoded again: {error}"
            ) from error
        if encoder.fingerprint != made.encoder_fingerprint:
            raise UserError(
                f"{made.encoder} has weights {encoder.fingerprint[:16]} and {store.path.name} was "
                f"made with {made.encoder_fingerprint[:16]}: put the encoder back that made it"
            )
        # One worker thread with one torch thread, as in extraction: the same bits come out.
        output = frame_output(Tier.parse(made.tier), encoder)
        self._pool = ThreadVideoPool(
            decoder, encoder, sampling, made.crops, workers=1, output=output
        )

    def __call__(self, row: int, key: str) -> npt.NDArray[Any] | str:
        """Embeddings float32 [V, F, D] of the row's video, or why it cannot be decoded.

        Of a store of another tier, its items in their type.

        Raises UserError when its tar is gone, WorkError when the tar is damaged.
        """
        number, position = divmod(row, self._capacity)
        entry = self._tars[number]
        tar = self._packed.get(entry.sha256)
        path = self._dataset.folder if tar is None else self._dataset.tar_path(tar)
        if tar is None or not path.is_file():
            raise UserError(
                f"{entry.file} of data set {self._dataset.name!r}, which partition {number} was "
                f"made of, is not in {self._dataset.folder}: put it back to encode its videos again"
            )
        with open_tar(path, tar.bytes) as archive:
            if position >= len(archive.samples) or archive.samples[position].key != key:
                raise DamagedTar.of(path, f"does not hold {key!r} at place {position}")
            sample = archive.samples[position]
            result = self._pool.submit(lambda: archive.read(sample)).result()
        return result if isinstance(result, str) else result.features

    def __enter__(self) -> Reencoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()
