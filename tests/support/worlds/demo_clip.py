"""How the demo's small CLIP was trained. Its shipped weights are made anew by

    python -m tests.support.worlds.demo_clip --out pipeline/demo/data/demo_clip.safetensors

Captions are as the web would give them. Letters: B batch, S image side.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import open_clip
import safetensors.torch
import torch
import torch.nn.functional as F

from featstore.files.durable import write_bytes
from pipeline.demo.small_clip import MODEL_CONFIG, PREPROCESSING, TOKEN_IDS
from pipeline.demo.world import ALL_CLASSES, SpriteClass, render_clip

PAIRS = sorted({sprite_class.pair for sprite_class in ALL_CLASSES})
TEXT_WEIGHT = 0.01
HARD_PAIRS = 4  # of the 36 (colour, shape) pairs, in every second batch


def caption(sprite_class: SpriteClass, rng: np.random.Generator) -> str:
    """A caption as the web would give it: often no motion, sometimes no colour."""
    draw = rng.random()
    if draw < 0.35:
        article = "an" if sprite_class.colour[0] in "aeiou" else "a"
        return f"{article} {sprite_class.colour} {sprite_class.shape}"
    if draw < 0.80:
        return sprite_class.name
    return f"a photo of a {sprite_class.shape} {sprite_class.motion}"


def _tokenise(sentences: list[str]) -> torch.Tensor:
    tokens = open_clip.SimpleTokenizer(context_length=MODEL_CONFIG["text_cfg"]["context_length"])
    result: torch.Tensor = tokens(sentences)
    return result


def train_small_clip(
    *,
    seed: int = 0,
    images: int = 24_000,
    epochs: int = 10,
    batch: int = 256,
    lr: float = 1e-3,
    dim: int = MODEL_CONFIG["embed_dim"],
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Contrastive training on random single frames; targets are spread over identical captions.

    Returns the packed weights (float16, with the int64 `token_ids` of the kept embedding rows) and
    the mean loss of each epoch. About two minutes on one core.
    """
    rng = np.random.default_rng([seed, 7])
    torch.manual_seed(seed)
    chosen = [ALL_CLASSES[i] for i in rng.integers(len(ALL_CLASSES), size=images)]
    pictures = np.concatenate([render_clip(c, rng, rng.random(1)) for c in chosen])
    captions = [caption(c, rng) for c in chosen]
    unique = sorted(set(captions))
    which = torch.tensor([unique.index(c) for c in captions])
    tokens = _tokenise(unique)
    token_ids = torch.unique(tokens)  # sorted, so that the end token keeps the largest id
    tokens = torch.searchsorted(token_ids, tokens)

    config = json.loads(json.dumps(MODEL_CONFIG))
    config["text_cfg"]["vocab_size"] = len(token_ids)
    config["embed_dim"] = dim
    model = open_clip.CLIP(**config, quick_gelu=False)
    mean, std = (torch.tensor(PREPROCESSING[key])[:, None, None] for key in ("mean", "std"))
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2)

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    steps = epochs * (images // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=steps, pct_start=0.1, anneal_strategy="cos"
    )
    pairs = torch.tensor([PAIRS.index(c.pair) for c in chosen])
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    for _ in range(epochs):
        order = torch.randperm(images, generator=generator)
        total = 0.0
        for step in range(images // batch):
            rows = order[step * batch : (step + 1) * batch]
            if step % 2:
                # Batches of a few (colour, shape) pairs leave only the motion to tell captions
                # apart; without them texts that differ in the motion alone fall together.
                few = torch.randperm(len(PAIRS), generator=generator)[:HARD_PAIRS]
                near = torch.isin(pairs, few).nonzero()[:, 0]
                rows = near[torch.randint(len(near), (batch,), generator=generator)]
            picture = (pixels[rows].float() / 255 - mean) / std
            texts, position = torch.unique(which[rows], return_inverse=True)
            image = F.normalize(model.encode_image(picture), dim=-1)
            named = F.normalize(model.encode_text(tokens[texts]), dim=-1)
            text = named[position]
            scale = model.logit_scale.exp()
            logits = scale * image @ text.T
            same = (position[:, None] == position[None, :]).float()
            target = same / same.sum(1, keepdim=True)
            loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
            # Language alone tells "left" from "right", even where no single picture does.
            apart = F.cross_entropy(scale * named @ named.T, torch.arange(len(named)))
            loss = loss + TEXT_WEIGHT * apart
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=np.log(100))
            total += loss.item()
        losses.append(total / (images // batch))
    state = {
        name: value.detach().half().contiguous()
        for name, value in model.state_dict().items()
        if name != "attn_mask"
    }
    state[TOKEN_IDS] = token_ids
    return state, losses


def main() -> None:
    """Train the small CLIP anew and write its packed weights."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, default=24_000)
    options = parser.parse_args()
    torch.set_num_threads(1)  # sums in another order would give other last bits
    started = time.perf_counter()
    state, losses = train_small_clip(
        seed=options.seed, epochs=options.epochs, images=options.images
    )
    recipe = {name: str(getattr(options, name)) for name in ("seed", "images", "epochs")}
    write_bytes(options.out, safetensors.torch.save(state, metadata=recipe))
    print(f"loss per epoch: {', '.join(f'{loss:.3f}' for loss in losses)}")
    print(
        f"{options.out}: {options.out.stat().st_size} bytes, {time.perf_counter() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
