"""The configuration of MSTA: where its adapters are, how wide they are, and what they are taught.

d = width of a tower, r = width inside an adapter, T = frames of a clip.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final, Literal

from featstore.errors import UserError
from heads.methods.settings import MethodConfig, within

MOST_PARAMETERS: Final = 2**31  # 8 GiB in fp32; the paper's largest adapters have 8.7e6
KERNEL: Final = 3  # frames that the temporal convolution looks at together


@dataclass(frozen=True)
class MstaConfig(MethodConfig):
    """The configuration of adapters on both towers; the defaults are those of few-shot training.

    `visual_width` and `text_width` are the towers'; 0 takes them from these (`for_towers`). Raises
    UserError when a value is out of range. docs/methods.md says of every field which evidence it
    rests on.

    Source: MSTA (Chen et al., CVPR 2025) and MMA (Yang et al., CVPR 2024), which it is built on.
    """

    WHAT: ClassVar[str] = "MSTA"

    dim: int = field(metadata={"range": (1, 65536)})
    """D, the embedding width of the encoder."""
    kind: str = "msta"
    first: int = within(8, 0, 1024)
    """The first block of both towers with an adapter, counted from 1; 0: four before the last, or
    as many as there are."""
    last: int = within(12, 0, 1024)
    """The last one; 0: the last that both towers have."""
    width: int = within(128, 1, 65536)
    """r, the width inside an adapter."""
    scale: float = within(0.005, 0, 1000)
    """lambda, which multiplies what an adapter adds to a block."""
    form: Literal["a", "b", "none"] = "a"
    """The temporal part of the video tower's adapters, a convolution over frames: one of each
    channel of the tower ("a"), one of each channel inside the adapter, which spreads to the
    tower's ("b"), or none, as in MMA."""
    conv_reads: Literal["auto", "up", "hidden", "input"] = "auto"
    """What the convolution reads: what the spatial part adds ("up"), what is inside the adapter
    ("hidden"), or the adapter's input ("input"). "auto" is "up" for form a and "hidden" for b,
    which reads nothing else."""
    conv_class_token: bool = False
    """Whether the convolution changes class tokens too."""
    conv_init: Literal["fan-out", "fan-in", "zero"] = "fan-out"
    """How its first weights are drawn: as those of the linear layers, with the spread that the
    other count gives, or 0."""
    conv_padding: Literal["zeros", "repeat"] = "zeros"
    """What it reads before the first frame and after the last one."""
    norm: bool = True
    """Whether an adapter reads the block's input through the block's own first norm."""
    gradient_trick: bool = True
    """Whether adapters get gradients as if lambda were 1; gradients below them keep lambda."""
    alpha: float = within(1.0, 0, 1000)
    """Weight of the loss that holds class texts near their descriptions."""
    loss_classes: Literal["all", "batch"] = "all"
    """The classes in that loss: all, or those in the batch."""
    normalise_descriptions: bool = True
    """Whether descriptions are scaled to length 1 before their mean is taken."""
    frames: int = within(8, 1, 4096)
    """T, the frames of a clip, of which one embedding is made."""
    visual_width: int = within(0, 0, 65536)
    """d of the image or video tower."""
    text_width: int = within(0, 0, 65536)
    """d of the text tower."""
    modulation_neighbours: int = field(default=0, metadata={"range": (0, 0)})
    modulation_temperature: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last and self.last < self.first:
            raise UserError(
                f"adapters from block {self.first} to {self.last} are none: last must not be "
                "before first"
            )
        reads = {"a": ("auto", "up", "input"), "b": ("auto", "hidden"), "none": ("auto",)}
        if self.conv_reads not in (possible := reads[self.form]):
            raise UserError(
                f"conv_reads {self.conv_reads} is not possible with form {self.form}: use "
                f"{' or '.join(possible)}"
            )
        if self.form == "b" and self.visual_width % self.width:
            raise UserError(
                f"form b spreads each of {self.width} channels to as many of the tower's "
                f"{self.visual_width}, which {self.width} does not divide: choose another width, "
                "or form a"
            )
        if (count := self.parameters) > MOST_PARAMETERS:
            raise UserError(
                f"adapters of these sizes have {count:.1e} parameters, more than "
                f"{MOST_PARAMETERS:.1e}: choose smaller numbers"
            )

    @property
    def layers(self) -> range:
        """The blocks with adapters, counted from 1."""
        return range(self.first, self.last + 1)

    @property
    def parameters(self) -> int:
        """The number of trained parameters, once the widths are known."""
        shared = self.width * (self.width + 1)
        of_towers = sum(
            2 * d * self.width + self.width + d for d in (self.text_width, self.visual_width)
        )
        conv = 0 if self.form == "none" else (KERNEL + 1) * self.visual_width
        return len(self.layers) * (shared + of_towers + conv)

    def for_towers(
        self, visual_width: int, text_width: int, dim: int, visual_blocks: int, text_blocks: int
    ) -> MstaConfig:
        """Return this configuration for two towers, with their widths and its blocks set.

        Raises UserError if the towers have other sizes than are set, or lack a block that is to get
        an adapter.
        """
        found: dict[str, Any] = {"visual_width": visual_width, "text_width": text_width, "dim": dim}
        for name, value in found.items():
            if getattr(self, name) not in (0, value):
                what = {"dim": "embedding width"}.get(name, name.replace("_width", " width"))
                raise UserError(
                    f"the CLIP has {what} {value}, the adapters were made for {what} "
                    f"{getattr(self, name)}: use the CLIP that they were trained with"
                )
        for tower, blocks in (("image", visual_blocks), ("text", text_blocks)):
            if self.last > blocks:
                raise UserError(
                    f"there is no block {self.last} for an adapter: the {tower} tower has {blocks} "
                    f"blocks, 1 to {blocks}, and both towers share adapters; set first and last in "
                    f"[head] of a recipe, up to {min(visual_blocks, text_blocks)}"
                )
        last = self.last or min(visual_blocks, text_blocks)
        first = self.first or max(1, last - 4)
        return replace(self, first=first, last=last, **found)
