"""Encodes videos of a store again, from the tars and with the encoder it was made with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from featstore import Store, open_store
from featstore.checking.verify import EncodeRow, Reencoding, reencode
from featstore.errors import UserError, WorkError
from featstore.format.tiers import Tier
from featstore.progress import ProgressSink, no_progress
from featstore.workspace import Workspace
from pipeline.decoding import decoder_named
from pipeline.decoding.contract import Strictness
from pipeline.extraction.cpu_pool import ThreadVideoPool
from pipeline.extraction.grow import recorded_encoder
from pipeline.extraction.tiers import frame_output
from pipeline.sampling import parse_sampling
from pipeline.tars.dataset import load_dataset
from pipeline.tars.reading import open_packed

if TYPE_CHECKING:
    from pipeline.extraction.grow import StoreEncoder


def reencode_store(
    path: Path,
    workspace: Workspace,
    count: int,
    *,
    seed: int = 0,
    device: str = "cpu",
    load: StoreEncoder = recorded_encoder,
    progress: ProgressSink = no_progress,
) -> Reencoding:
    """Encode `count` rows of a store again, drawn by `seed`, and compare them with what is stored.

    The data set and the encoder come from the workspace that the store lies in, or from `workspace`
    if it lies in none; `load` is as for `reencoder`. Raises what `reencoder` and
    `featstore.checking.verify.reencode` raise.
    """
    store = open_store(path)
    dataset = store.provenance.dataset
    folder = path.resolve().parent
    if folder.parent.name == "features" and folder.name == dataset:
        workspace = Workspace(folder.parents[1])
    encoders = workspace.root / "encoders"
    folder = workspace.dataset_dir(dataset)
    with reencoder(store, folder, encoders, device, load) as encoder:
        return reencode(store, count, encoder, seed=seed, progress=progress)


@contextmanager
def reencoder(
    store: Store,
    dataset_dir: Path,
    encoders_dir: Path | None,
    device: str = "cpu",
    load: StoreEncoder = recorded_encoder,
) -> Iterator[EncodeRow]:
    """Give a function that encodes rows of a store again, from the data set in `dataset_dir`.

    `load` loads the encoder. Raises UserError if the data set or the store's encoder is missing or
    has changed, or was recorded in a way that this version does not know; WorkError as
    `load_dataset` and `load`. The function raises UserError if the row's tar is missing, WorkError
    if the tar is damaged.
    """
    made = store.provenance
    dataset = load_dataset(dataset_dir)
    packed = {tar.sha256: tar for tar in dataset.tars}
    strictness: dict[str, Strictness] = {"auto": "auto", "always": "always", "never": "never"}
    decoder = decoder_named(made.decoder, strictness.get(made.strict_decode, "auto"))
    sampling = parse_sampling(made.sampling)
    try:
        encoder = load(made, None, made.precision, device, encoders_dir)
    except (UserError, WorkError) as error:
        raise type(error)(
            f"the encoder of {store.path.name} cannot be loaded, so that nothing can be "
            f"encoded again: {error}"
        ) from error
    if encoder.fingerprint != made.encoder_fingerprint:
        raise UserError(
            f"{made.encoder} has weights {encoder.fingerprint[:16]} and {store.path.name} was "
            f"made with {made.encoder_fingerprint[:16]}: put back the encoder that made it"
        )
    output = frame_output(Tier.parse(made.tier), encoder)
    # One worker thread with one torch thread, as in extraction: the same bits come out.
    pool = ThreadVideoPool(decoder, encoder, sampling, made.crops, 1, output)

    def encode(row: int, key: str) -> npt.NDArray[Any] | str:
        number, position = divmod(row, store.schema.capacity)
        entry = store.tars[number]
        tar = packed.get(entry.sha256)
        if tar is None or not (tar.remote or dataset.tar_path(tar).is_file()):
            raise UserError(
                f"{entry.file} of data set {dataset.name!r}, which partition {number} was "
                f"made of, is not in {dataset.folder if tar is None else dataset.location(tar)}: "
                "put it back to encode its videos again"
            )
        with open_packed(dataset, tar) as archive:
            if position >= len(archive.samples) or archive.samples[position].key != key:
                raise archive.damage(f"does not hold {key!r} at place {position}")
            sample = archive.samples[position]
            result = pool.submit(lambda: archive.read(sample)).result()
        return result if isinstance(result, str) else result.features

    with closing(pool):
        yield encode
