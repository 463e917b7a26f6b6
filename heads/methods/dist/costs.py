"""What a DiST model costs: its trained parameters, and the multiplications of one clip.

T' = dense frames, a = alpha, T = T' / a slow frames, M = tokens of a frame (CLS first), N = M - 1
patches, d = width of the image tower, Di and Dt = integration and temporal width, E = embedding
width.

Multiplications are counted as publications count them: of matrices and convolutions, zeros at the
ends of a clip included, where many publications call them FLOPs. They are those of the published
code, which embeds all dense frames and projects every token in the pooling; ours embeds the slow
frames and projects queries there, which is less.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from heads.methods.dist.config import DistConfig

_PARTS = {
    "temporal_stem": "temporal stem",
    "input_linears": "input maps",
    "integration2temporal_nets": "integration to temporal",
    "temporal2integration_nets": "temporal to integration",
    "temporal_nets": "temporal blocks",
    "integration_nets": "integration blocks",
    "adapooling_nets": "pooling blocks",
}
OUTPUT = "output"  # the map of the CLS token, the last norm and projection, the queries


@dataclass(frozen=True)
class DistCosts:
    """The costs of a configuration, by part of the branch; multiplications are of one clip."""

    parameters: dict[str, int]
    tensors: int
    """The number of trained tensors."""
    tower: int
    """Multiplications of the frozen image tower."""
    branch: dict[str, int]
    """Multiplications of the branch."""

    @property
    def trained(self) -> int:
        """All trained parameters."""
        return sum(self.parameters.values())

    @property
    def forward(self) -> int:
        """Multiplications of tower and branch."""
        return self.tower + self.cached_step // 3

    @property
    def training_step(self) -> int:
        """Multiplications of a training step: the tower goes forward only."""
        return self.tower + self.cached_step

    @property
    def cached_step(self) -> int:
        """Multiplications of a training step on stored tokens, without the tower."""
        return 3 * sum(self.branch.values())


def dist_costs(config: DistConfig, blocks: int, image_size: int = 224) -> DistCosts:
    """Return the costs of `config`, whose sizes are all set (`DistConfig.for_backbone`).

    `blocks` are those of the image tower, `image_size` the side of its input in pixels.
    """
    import torch  # counting parameters needs it, reading the configuration does not

    from heads.methods.dist.branch import DistBranch

    with torch.device("meta"):
        shapes = {name: value.shape for name, value in DistBranch(config).named_parameters()}
    parameters = dict.fromkeys((*_PARTS.values(), OUTPUT), 0)
    for name, shape in shapes.items():
        parameters[_PARTS.get(name.partition(".")[0], OUTPUT)] += prod(shape)
    patches = (image_size // config.patch) ** 2
    return DistCosts(
        parameters, len(shapes), _tower(config, blocks, patches), _branch(config, patches)
    )


def _tower(config: DistConfig, blocks: int, patches: int) -> int:
    """Multiplications of the image tower: patches of all dense frames, blocks of slow ones."""
    d, tokens = config.width, patches + 1
    embedded = patches * 3 * config.patch**2 * d
    block = tokens * (4 * d * d + 2 * tokens * d + 8 * d * d)
    return config.dense_frames * embedded + config.slow_frames * (blocks * block + d * config.dim)


def _branch(config: DistConfig, patches: int) -> dict[str, int]:
    dense, slow, tokens = config.dense_frames, config.slow_frames, patches + 1
    wide, narrow, kernel = config.integration_dim, config.temporal_dim, config.temporal_kernel
    over_time = config.integration_temporal_hidden
    layers = len(config.selected_layers)
    integration = 2 * wide * config.integration_hidden + 2 * wide * over_time
    # For each query: its projection, that of the output, and the feed-forward.
    query = (2 + 8) * wide * wide
    looking = 2 * wide * wide + 2 * wide  # for each token: key and value, score and mean
    return {
        "temporal stem": dense * patches * 3 * config.patch**2 * config.stem_kernel * narrow,
        "input maps": layers * slow * tokens * config.width * wide,
        "integration to temporal": layers * slow * patches * wide * narrow,
        "temporal to integration": layers * slow * patches * narrow * config.alpha * wide,
        "temporal blocks": layers
        * (dense * patches * narrow * config.temporal_hidden * (kernel + 9)),
        "integration blocks": layers * slow * tokens * (integration + over_time**2 * kernel),
        "pooling blocks": config.pooling_layers
        * (slow * (query + tokens * looking) + query + slow * looking),
        OUTPUT: config.width * wide + wide * config.dim,
    }
