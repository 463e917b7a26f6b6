"""`mote-cli extract`: encode the videos in tars with a frozen CLIP into a feature store."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.output import progress_of, report
from featstore.commands import ADAPTED_BY, command
from featstore.errors import UserError, counted, one_of
from featstore.remote.urls import is_url

if TYPE_CHECKING:
    from featstore.format.tiers import Tier
    from pipeline.extraction.cluster.connection import Cluster
    from pipeline.extraction.request import ExtractionSummary

logger = logging.getLogger(__name__)


def extract(
    dataset: options.Dataset,
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Take only this split's tars (needs disjoint splits)."),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="`ARCH/TAG` of open_clip, a folder in open_clip's format, an OpenAI-format `.pt` "
            "file, a name under encoders/ of the workspace (`./NAME` is a folder here), or "
            "`viclip:FILE`.",
            show_default=options.DEFAULT_ENCODER,
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Encode with the CLIP whose towers the head of this run adapts (msta), with the "
            "head's own frames and sentences unless others are named.",
        ),
    ] = None,
    sampling: Annotated[
        str | None,
        typer.Option(
            metavar="uniform:F|clips:TxV",
            help="Take F frames over the whole video, or V clips of T frames each.",
            show_default="uniform:16",
        ),
    ] = None,
    tier: Annotated[
        str,
        typer.Option(
            metavar="embeddings|frames|tokens:K",
            help="What to store of each frame: its pooled embedding, its pixels after resize and "
            "crop, or all tokens of block K of the image tower, counted from 0.",
        ),
    ] = "embeddings",
    crops: Annotated[
        int, typer.Option(metavar="1|3", help="Centre crop, or three crops along the long side.")
    ] = 1,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SET|FILE.txt",
            help="Sentences for class names: mote28 (default), name, video, or a file with one "
            "sentence per line and {} for the class name. May be repeated.",
        ),
    ] = None,
    descriptions: options.Descriptions = None,
    prompt_set_name: options.PromptSetName = None,
    precision: options.Precision = "auto",
    device: options.Device = "auto",
    decoder: Annotated[
        str,
        typer.Option(
            metavar="auto|pyav|dali",
            help="Decode videos with pyav on the CPU or dali on the GPU (docs/gpu.md); auto takes "
            "dali if --device is a GPU that supports it.",
        ),
    ] = "auto",
    strict_decode: Annotated[
        bool | None,
        typer.Option(
            "--strict-decode/--no-strict-decode",
            help="Fail videos with any sign of damage and those whose size changes, or skip damage "
            "and count it; default: fail videos whose chosen frames, or what they lean on, cannot "
            "be decoded soundly (docs/decoding.md).",
            show_default=False,
        ),
    ] = None,
    partition: Annotated[
        str,
        typer.Option(
            metavar="K/N|all|auto",
            help="Do only every N-th tar, so that N processes share the work; auto takes K and N "
            "from torchrun's or SLURM's environment variables.",
        ),
    ] = "auto",
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Do tars with failed videos again.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only say what would be done and how long; make no store."),
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads (per Ray worker); default: one per core.")
    ] = None,
    engine: Annotated[
        str, typer.Option(metavar="local|ray", help="Work in this process or on a Ray cluster.")
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT|auto|local",
            help="Address of the Ray cluster; default: RAY_ADDRESS, else a cluster that this "
            "command starts on this machine.",
        ),
    ] = None,
    ray_workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Number of Ray workers; default: one per machine, or per GPU with "
            "--gpus-per-worker.",
        ),
    ] = None,
    cpus_per_worker: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="CPUs and threads per Ray worker.")
    ] = None,
    gpus_per_worker: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            min=0,
            help="GPUs per Ray worker, such as 1 or 0.5; default: none, or 1 with --device cuda.",
        ),
    ] = None,
    max_failures: options.MaxFailures = options.DEFAULT_MAX_FAILURES,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|URL",
            help="The store to write, such as s3://BUCKET/my-clips.zarr; default: under --root.",
        ),
    ] = None,
    root: Annotated[
        str,
        typer.Option(
            envvar="MOTE_ROOT",
            metavar="DIR|URL",
            help="Workspace with data sets and features: a folder, or s3://BUCKET/PREFIX.",
        ),
    ] = str(options.DEFAULT_ROOT),
    json: options.Json = False,
) -> None:
    """Decode, preprocess and encode every video once, and write the features to a Zarr store.

    You can interrupt it at any time: at most the tars in progress are lost, and the same command
    continues. A video that fails keeps its row in the store, with the reason.

    --root and --store may lie on S3-compatible storage (this needs the extra `cloud`, and takes
    credentials from the environment only): see docs/cloud.md.

    Example: `mote-cli extract --dataset my-clips --sampling uniform:16`
    """
    # Nothing here imports torch, which recognising a finished store does not need.
    from featstore.format.class_texts import DEFAULT_PROMPTS
    from featstore.format.tiers import Tier
    from heads.evaluation.protocols.serving import protocols_served
    from heads.files.head_cards import adapting_card
    from pipeline.encoders.specs import encoder_label
    from pipeline.extraction.request import ExtractionRequest, Share
    from pipeline.extraction.run import extract as run
    from pipeline.prompts import prompt_sets_from, trained_prompt_set
    from pipeline.sampling import parse_sampling

    wanted = Tier.parse(tier)
    cluster = _cluster(engine, device, address, ray_workers, cpus_per_worker, gpus_per_worker)
    if cluster is not None and partition == "auto":
        partition = "all"  # the cluster divides the work itself
    # A URL holds what the workspace folder would hold; encoders are looked up on this machine.
    remote = is_url(root)
    workspace = options.workspace(Path() if remote else Path(root))
    encoders = (options.DEFAULT_ROOT if remote else workspace.root) / "encoders"
    own = None
    if encoder is not None and encoder.startswith(ADAPTED_BY) and head is None:
        head, encoder = encoder.removeprefix(ADAPTED_BY), None
    heads_at = options.workspace(encoders.parent)
    if head is not None:
        if encoder is not None or cluster is not None:
            other = "--encoder" if encoder is not None else "--engine ray"
            raise UserError(f"--head {head} brings its own encoder, without {other}: leave it out")
        card = adapting_card(heads_at, head)
        encoder, sampling = f"{ADAPTED_BY}{head}", sampling or card.origin.sampling
        own = card.origin
    encoder, sampling = encoder or options.DEFAULT_ENCODER, sampling or "uniform:16"
    chosen = parse_sampling(sampling)
    store_path = workspace.store_path(
        dataset,
        encoder=encoder_label(encoder, encoders),
        sampling=chosen.text,
        crops=crops,
        split=split,
        tier=wanted.text,
    )

    def place(path: Path) -> Path | str:
        return f"{root.rstrip('/')}/{path.as_posix()}" if remote else path

    request = ExtractionRequest(
        dataset_dir=place(workspace.dataset_dir(dataset)),
        store_path=place(store_path) if store is None else store if is_url(store) else Path(store),
        encoder=encoder,
        sampling=chosen,
        encoders_dir=encoders,
        split=split,
        crops=crops,
        precision=precision,
        device=options.known_device(device),
        decoder=decoder,
        strict="auto" if strict_decode is None else "always" if strict_decode else "never",
        prompt_sets=prompt_sets_from(
            prompts or ([] if descriptions or own else [DEFAULT_PROMPTS]),
            descriptions or [],
            prompt_set_name,
        ),
        workers=workers,
        max_failures=max_failures,
        share=Share.parse(partition),
        retry_failed=retry_failed,
        tier=wanted,
    )
    if own is not None and not prompts and not descriptions:
        named = trained_prompt_set(own.prompt_set, own.prompt_templates)
        request = replace(request, prompt_sets=(named,))
    packed = None if remote else list(workspace.packed_splits(dataset) or ())
    serving = None
    if wanted.pooled and (remote or not workspace.unlabelled(dataset)):
        views, splits = f"{chosen.clips}x{crops}", [split] if split else packed
        serving = protocols_served(dataset, views, frames=chosen.frames, splits=splits)
    adapted = None
    if head is not None:
        from heads.prediction.adapted_encoder import encoder_of_run

        adapted = encoder_of_run(heads_at, head, precision, request.device)
    served = {} if serving is None else {"protocols": serving.to_json()}
    if dry_run:
        from pipeline.extraction.estimate import estimate

        with progress_of("sample", "videos") as progress:
            plan = estimate(request, encoder=adapted, progress=progress)
        facts = plan.facts() | ({} if serving is None else serving.facts())
        report(json, plan.to_json() | served, facts)
        plan.require_room()
        return
    if serving is not None:
        for name, words in serving.facts().items():
            logger.info("%s: %s", name, words)
    with progress_of("extract", "videos") as progress:
        summary = run(request, encoder=adapted, cluster=cluster, progress=progress)
    following = _following(summary, wanted) if summary.rows_ok else {}
    report(json, summary.to_json() | served | following, _facts(summary) | following)
    options.require_few_failures(
        *(summary.rows_failed, summary.rows_ok + summary.rows_failed, max_failures),
        "the summary lists the first reasons"
        if is_url(summary.store)
        else f"`{command('inspect', Path(summary.store))}` lists the reasons",
        *(failure["reason"] for failure in summary.failures[:1]),
    )


def _cluster(
    engine: str,
    device: str,
    address: str | None,
    workers: int | None,
    cpus_per_worker: int | None,
    gpus_per_worker: float | None,
) -> Cluster | None:
    """Return the cluster that the options describe; None to work in this process."""
    if engine == "local":
        rays = {
            "--address": address,
            "--ray-workers": workers,
            "--cpus-per-worker": cpus_per_worker,
            "--gpus-per-worker": gpus_per_worker,
        }
        for name, value in rays.items():
            if value is not None:
                raise UserError(f"{name} {value} is for clusters: add --engine ray")
        return None
    if engine != "ray":
        raise UserError(f"engine {engine!r} is unknown: {one_of(engine, ('local', 'ray'))}")
    from pipeline.extraction.cluster.connection import Cluster

    gpus = gpus_per_worker if gpus_per_worker is not None else float(device == "cuda")
    if (device == "cuda" and not gpus) or (device == "cpu" and gpus):
        raise UserError(
            f"--device {device} and --gpus-per-worker {gpus:g} do not fit together: a worker "
            "computes on a GPU exactly if it is given one"
        )
    return Cluster(address, workers, cpus_per_worker, gpus)


def _facts(summary: ExtractionSummary) -> dict[str, Any]:
    notes = {
        "damaged": (summary.rows_damaged, "video", "had damaged packets that were skipped"),
        "miscounted": (
            summary.rows_miscounted,
            "container",
            "with another count of frames",
        ),
        "cut": (summary.videos_cut, "video", "that began inside a group of pictures"),
        "resized": (summary.videos_resized, "video", "with frames of several sizes"),
        "missing": (summary.partitions_missing, "tar", "not done yet"),
    }
    facts: dict[str, Any] = {
        "store": summary.store,
        "rows": f"{summary.rows_ok} ok, {summary.rows_failed} failed",
        "tars": f"{summary.partitions_done} done now, {summary.partitions_skipped} before"
        + (f" (partition {summary.partition})" if summary.partition else ""),
        **{name: f"{counted(n, what)} {why}" for name, (n, what, why) in notes.items() if n},
    }
    if summary.seconds:
        facts["speed"] = (
            f"{summary.videos_per_second:.2f} videos/s, {summary.frames_per_second:.1f} frames/s "
            f"({summary.precision}, {summary.decoder})"
        )
    failed = {f"failed: {f['key']}": f["reason"] for f in summary.failures}
    return facts | failed


def _following(summary: ExtractionSummary, tier: Tier) -> dict[str, str]:
    """Return the command to run next; none after too many failures, which the error explains."""
    if summary.too_many_failures:
        return {}
    if is_url(summary.store):
        train = command("train-head", dataset=summary.dataset, store=summary.store)
        trainable = tier.pooled and summary.classes and not summary.partitions_missing
        return {"next": train} if trainable else {}
    from heads.evaluation.next_steps import after_extraction

    done = not summary.partitions_missing
    return {"next": after_extraction(Path(summary.store), complete=done)}
