"""The options of `mote-cli eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

CloseSet = Annotated[
    str | None,
    typer.Option("--closeset", metavar="NAME", help="Data set with the head's own classes."),
]
ZeroShot = Annotated[
    str | None, typer.Option("--zeroshot", metavar="NAME", help="Data set with new classes.")
]
ProtocolName = Annotated[
    str | None,
    typer.Option(
        "--protocol",
        metavar="PROTOCOL",
        help="A protocol by its name: `mote-cli protocols list`.",
    ),
]
ProtocolDataset = Annotated[
    str | None,
    typer.Option(
        "--dataset", metavar="NAME", help="Data set of --protocol; default: the protocol's own."
    ),
]
Views = Annotated[
    str | None,
    typer.Option("--views", metavar="CLIPSxCROPS", help="Take the store with these views."),
]
ModulationNeighbours = Annotated[
    str | None,
    typer.Option(
        "--modulation-neighbours",
        metavar="K",
        help="Classes modulation compares on either side; default: the head's, 5 as published.",
    ),
]
ModulationTemperature = Annotated[
    str | None,
    typer.Option(
        "--modulation-temperature",
        metavar="T",
        help="The larger, the less the head is held back, none: not at all; default: the "
        "head's, 0.05 as published.",
    ),
]
Ensemble = Annotated[
    float | None,
    typer.Option(
        "--ensemble",
        metavar="WEIGHT",
        min=0.0,
        max=1.0,
        help="Add CLIP's own cosines per frame with this weight; 0.5 as DiST in zero-shot.",
    ),
]
ClipStore = Annotated[
    str | None,
    typer.Option(
        "--clip-store",
        metavar="NAME",
        help="Store of the same data set with CLIP's own features, for --ensemble with a head "
        "whose tower was tuned.",
    ),
]
Fusion = Annotated[
    str | None,
    typer.Option(
        "--fusion",
        metavar="softmax|cosine|features|all",
        help="How views become one score: mean of softmax, of cosines, or of features; "
        "default: the protocol's.",
    ),
]
Sweeps = Annotated[
    list[str] | None,
    typer.Option(
        "--sweep",
        metavar="NAME=V,V,...",
        help="Many settings from one pass: modulation-temperature, modulation-neighbours, "
        "ensemble, fusion; or blend, over imported towers. May be repeated.",
    ),
]
AllowOverlap = Annotated[
    bool,
    typer.Option("--allow-overlap", help="Measure although tested videos are training videos."),
]
HeadPrecision = Annotated[
    str,
    typer.Option(
        "--precision",
        metavar="auto|fp32|bf16",
        help="Arithmetic of the head; auto takes bf16 for wide heads where it is faster.",
    ),
]
FewShot = Annotated[
    str | None,
    typer.Option(
        "--fewshot", metavar="NAME", help="Train on K videos per class, then test (--shots)."
    ),
]
BaseToNovel = Annotated[
    str | None,
    typer.Option(
        "--base-to-novel",
        metavar="NAME",
        help="Train on 16 videos of each frequent class, test frequent and rare classes.",
    ),
]
Shots = Annotated[
    str | None,
    typer.Option(
        "--shots", metavar="K,K,...", help="Videos per class; default: 2,4,8,16 (base-to-novel 16)."
    ),
]
DrawSeeds = Annotated[
    str | None,
    typer.Option(
        "--draw-seeds",
        metavar="S,S,...",
        help="Draws of the shots; default: 1, for base-to-novel 1,2,3.",
    ),
]
ListsFrom = Annotated[
    Path | None,
    typer.Option(
        "--lists-from",
        metavar="DIR",
        help="Take the shots from a clone of a repository with published lists.",
    ),
]
LabelMapOption = Annotated[
    str,
    typer.Option(
        "--label-map",
        metavar="corrected|as-published",
        help="Class names that published label files exchange (HMDB51): right, or as they are.",
    ),
]
TrainStore = Annotated[
    str | None,
    typer.Option("--train-store", metavar="NAME", help="Store to train from, where several fit."),
]
Recipe = Annotated[
    str | None,
    typer.Option("--recipe", metavar="NAME|FILE", help="Settings of training, as train-head's."),
]
Epochs = Annotated[int | None, typer.Option("--epochs", min=1, help="Epochs of training.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, help="Of training.")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Learning rate of training.")]
Repeat = Annotated[
    str,
    typer.Option(
        "--repeat", metavar="N|full", help="Repeat the shots N times an epoch, or to the full size."
    ),
]
RunName = Annotated[
    str | None,
    typer.Option("--name", metavar="RUN", help="Name that the runs trained here begin with."),
]
BestEpoch = Annotated[
    bool,
    typer.Option(
        "--best-epoch/--no-best-epoch",
        help="Test every epoch too, and report the best one separately.",
    ),
]
K600Source = Annotated[
    str | None,
    typer.Option(
        "--k600-source",
        metavar="test|val|FILE",
        help="Videos of Kinetics-600 zero-shot: a split, or a list of names or YouTube ids; "
        "default: test where it was extracted, else val.",
    ),
]
ClassLists = Annotated[
    list[Path] | None,
    typer.Option(
        "--class-lists",
        metavar="DIR|FILE",
        help="Class splits of Kinetics-600 zero-shot, a file of names or numbers each (repeat the "
        "option, or name a folder); default: three drawn here.",
    ),
]
K400Names = Annotated[
    Path | None,
    typer.Option(
        "--k400-names",
        metavar="FILE",
        help="Class names of Kinetics-400; default: the head's, else those of the packed k400.",
    ),
]
