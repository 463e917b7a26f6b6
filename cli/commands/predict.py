"""`mote-cli predict`: what happens in these videos, in the user's own words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import options
from cli.output import print_json, print_table, progress_of, warn
from featstore.errors import UserError


def predict(
    videos: Annotated[list[Path], typer.Argument(metavar="VIDEO...", help="Video files.")],
    classes: Annotated[
        str | None,
        typer.Option(
            metavar='"a,b,c"',
            help="Classes in your own words, separated by commas; default: the head's own.",
        ),
    ] = None,
    head: options.Head = None,
    encoder: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Default: the encoder the head was trained with."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to show per video.")] = 5,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Frames per video; default: the head's.")
    ] = None,
    prompts: options.PromptSet = None,
    modulate: options.Modulate = True,
    precision: options.Precision = "auto",
    device: options.Device = "auto",
    max_failures: options.MaxFailures = options.DEFAULT_MAX_FAILURES,
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Name the classes that fit each video best, with scores that add up to 1.

    Without a trained head (or with `--head mean`) frames are averaged, as CLIP would.

    Example: `mote-cli predict clip.mp4 --classes "arm wrestling, cooking, crossing a street"`
    """
    import torch

    from heads.compatibility import check_encoder, mean_head
    from heads.files.choose import choose_head
    from heads.scoring.scores import can_modulate, predict_scores
    from pipeline.clip_encoder import load_encoder
    from pipeline.decoding import decoder_named
    from pipeline.decoding.contract import DecodeError
    from pipeline.extraction.cpu_pool import encode_video
    from pipeline.prompts import as_prompt_set, trained_prompt_set
    from pipeline.sampling import parse_sampling

    for path in videos:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise UserError(f"{path} {what}: predict takes video files")
    workspace = options.workspace(root)
    model, run_dir = choose_head(workspace, head, or_mean=True)
    name = workspace.head_name(run_dir)
    origin = None if model is None else model.origin
    own = None if origin is None else origin.class_names
    if classes is None and own is None:
        raise UserError('no classes to choose from: name them with --classes "a,b,c"')
    names = options.class_list(classes) if classes is not None else list(own or ())
    spec = encoder or (options.DEFAULT_ENCODER if origin is None else origin.encoder)
    try:
        clip = load_encoder(
            spec, precision, options.device(device), encoders_dir=workspace.root / "encoders"
        )
    except UserError as error:
        if encoder is not None or origin is None:
            raise
        raise UserError(f"head {name}: {error}; name its encoder with --encoder") from error
    if origin is not None:
        check_encoder(origin, spec, clip.fingerprint)
    if prompts is not None or origin is None:
        prompt_set = as_prompt_set(prompts or options.DEFAULT_PROMPTS)
    else:
        prompt_set = trained_prompt_set(origin.prompt_set, origin.prompt_templates)
    embeddings = clip.class_embeddings(names, prompt_set)
    scorer = model or mean_head(clip.dim, clip.logit_scale)
    modulate = modulate and can_modulate(scorer, len(names))
    sampling = parse_sampling(f"uniform:{frames or (8 if origin is None else origin.frames)}")
    decoder = decoder_named("auto")
    answers: list[dict[str, object]] = []
    failed = 0
    with progress_of("predict", "videos") as progress:
        for number, path in enumerate(videos, start=1):
            try:
                video = encode_video(path, decoder, clip, sampling)
            except DecodeError as error:
                warn(f"{path}: {error.reason}")
                answers.append(
                    {
                        "path": str(path),
                        "num_frames": None,
                        "predictions": [],
                        "error": error.reason,
                    }
                )
                failed += 1
                progress(number, len(videos))
                continue
            scores = predict_scores(
                scorer, torch.from_numpy(video.features), embeddings.cpu(), names, modulate
            )
            answers.append(
                {
                    "path": str(path),
                    "num_frames": video.info.num_frames,
                    "predictions": [
                        {"class_name": name, "score": score} for name, score in scores[:top]
                    ],
                }
            )
            progress(number, len(videos))
    if json:
        print_json({"head": name, "encoder": spec, "videos": answers})
    else:
        for answer in answers:
            if "error" not in answer:
                print_table(
                    f"{answer['path']} ({answer['num_frames']} frames, head {name})",
                    ["class", "score"],
                    [[p["class_name"], f"{p['score']:.3f}"] for p in answer["predictions"]],  # type: ignore[attr-defined]
                )
    raise typer.Exit(options.exit_code(failed, len(videos), max_failures, "the reasons are above"))
