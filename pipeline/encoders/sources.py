"""Loads CLIP models: turns a spec, as the user writes it, into an open_clip model with weights.

A spec is a folder in open_clip's own format, an OpenAI-format `.pt` file, the name of a folder in
the workspace's `encoders/`, `viclip:FILE` for a weight file of ViCLIP, or `ARCH/TAG` as open_clip
names its pretrained models. Only the last may use the network, and only when the weights are not in
the cache.
"""

from __future__ import annotations

import re
import urllib.error
import urllib.request
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import torch
from huggingface_hub import constants as hub_constants
from safetensors.torch import save as safetensors_bytes

from featstore.commands import ADAPTED_BY, command
from featstore.errors import UserError, WorkError, meant, one_line
from featstore.files.documents import read_object
from featstore.files.durable import write_bytes, write_json
from pipeline.encoders.sizes import MOST_POSITIONS, require_sane_sizes
from pipeline.encoders.specs import CONFIG_FILE, VICLIP, WEIGHTS_FILE, local_encoder
from pipeline.encoders.tensors import plain_tensors, read_safetensors, require_finite

MAX_CONFIG_BYTES = 1 << 20
HUB_TIMEOUT_S = 5
# The names of OpenAI's CLIPs on the model hub and in OpenAI's own package, in lower case. Those of
# other weights are in open_clip's list.
_OPENAI_ELSEWHERE = {
    "openai/clip-vit-base-patch32": "ViT-B-32/openai",
    "openai/clip-vit-base-patch16": "ViT-B-16/openai",
    "openai/clip-vit-large-patch14": "ViT-L-14/openai",
    "openai/clip-vit-large-patch14-336": "ViT-L-14-336/openai",
    "vit-l/14@336px": "ViT-L-14-336/openai",
}


@dataclass
class LoadedClip:
    """An fp32 open_clip model in evaluation mode, with its name and its configs."""

    name: str
    model: torch.nn.Module
    model_config: dict[str, Any]
    preprocess_config: dict[str, Any]
    tokenizer_source: str  # the argument of open_clip.get_tokenizer


def load_clip(spec: str, encoders_dir: Path | None = None) -> LoadedClip:
    """Load the model that `spec` names.

    Raises UserError for an unknown name or unusable files, WorkError if weights cannot be fetched.
    """
    if spec.startswith(ADAPTED_BY):
        run = spec.removeprefix(ADAPTED_BY)
        raise UserError(
            f"{spec} is a CLIP with the adapters of head {run}, which `mote-cli extract --head "
            f"{safe_name(run)}`, eval and predict use: name another encoder here"
        )
    place = local_encoder(spec, encoders_dir)
    if place is not None and spec.startswith(VICLIP):
        from pipeline.encoders.viclip_file import load_viclip  # which reads with this module

        return load_viclip(place)
    if place is not None:
        return _load_folder(place) if place.is_dir() else _load_openai_file(place)
    known = _known_pretrained(spec)
    if known is None:
        raise UserError(_unknown_spec(spec, encoders_dir))
    return _load_pretrained(*known)


def save_open_clip_folder(
    model: torch.nn.Module,
    model_config: Mapping[str, Any],
    preprocess_config: Mapping[str, Any],
    folder: Path,
) -> None:
    """Write `model` as a folder that `load_clip` and open_clip's `local-dir:` both load.

    Weights are stored as they are (dtype included). The config is written last: a folder without
    it is unfinished.
    """
    state = {
        name: tensor.detach().cpu().clone().contiguous()
        for name, tensor in model.state_dict().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    write_bytes(folder / WEIGHTS_FILE, safetensors_bytes(state))
    write_json(
        folder / CONFIG_FILE,
        {"model_cfg": dict(model_config), "preprocess_cfg": dict(preprocess_config)},
    )


def build_model(model_config: Mapping[str, Any], where: str) -> torch.nn.Module:
    """Build an open_clip model with random weights. For a bad config, UserError names `where`."""
    require_sane_sizes(model_config, where)
    config = deepcopy(dict(model_config))
    custom_text = config.pop("custom_text", False)
    try:
        # Towers from other libraries would fetch their own weights.
        if "timm_model_name" in config["vision_cfg"]:
            config["vision_cfg"]["timm_model_pretrained"] = False
        if "hf_model_name" in config["text_cfg"]:
            config["text_cfg"]["hf_model_pretrained"] = False
            custom_text = True
        kind: type[torch.nn.Module] = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
        if "multimodal_cfg" in config:
            kind = open_clip.CoCa
        return kind(**config).eval().requires_grad_(False)
    except KeyError as error:
        raise UserError(f"the model config of {where} has no entry {error}") from None
    except Exception as error:
        raise UserError(
            f"the model config of {where} is not one open_clip can build: {one_line(error, 160)}"
        ) from None


def safe_name(text: str) -> str:
    """Return `text` as a name that a folder can have."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "encoder"


def _load_folder(folder: Path) -> LoadedClip:
    config_path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    for path in (config_path, weights_path):
        if not path.is_file():
            raise UserError(
                f"encoder folder {folder} has no {path.name}: a folder in open_clip's format "
                f"holds {CONFIG_FILE} and {WEIGHTS_FILE}"
            )
    config = _read_config(config_path)
    with torch.device("meta"):  # shapes only: a wrong config must not cost memory
        expected = build_model(config["model_cfg"], str(config_path)).state_dict()
    state = read_safetensors(weights_path, expected)
    model = build_model(config["model_cfg"], str(config_path))
    model.load_state_dict(state)
    require_finite(model, str(weights_path))
    return LoadedClip(
        name=safe_name(folder.resolve().name),
        model=model,
        model_config=config["model_cfg"],
        preprocess_config=config["preprocess_cfg"],
        tokenizer_source=f"local-dir:{folder}",
    )


def _read_config(path: Path) -> dict[str, Any]:
    config = read_object(path, "fetch or write it again", limit=MAX_CONFIG_BYTES)
    if not isinstance(config.get("model_cfg"), dict):
        raise UserError(f"{path} has no entry 'model_cfg': it is not an open_clip config")
    if not isinstance(config.setdefault("preprocess_cfg", {}), dict):
        raise UserError(f"the entry 'preprocess_cfg' of {path} is not an object")
    return config


def _load_openai_file(path: Path) -> LoadedClip:
    if path.suffix not in (".pt", ".pth"):
        raise UserError(
            f"encoder {path} is neither a folder in open_clip's format nor a .pt file of a CLIP"
        )
    state = _read_openai_state(path)
    if "visual.proj" not in state and "visual.attnpool.positional_embedding" not in state:
        raise UserError(
            f"{path} holds no CLIP in OpenAI's layout (no visual.proj): pass a CLIP .pt file, or "
            f"import a MoTE checkpoint with `{command('import-checkpoint', path, name='NAME')}`"
        )
    return clip_of_state(state, path.stem, str(path))


def clip_of_state(
    state: Mapping[str, torch.Tensor],
    name: str,
    where: str | None = None,
    *,
    tuned: bool = False,
) -> LoadedClip:
    """Build the CLIP of a state dict in OpenAI's names; UserError, naming `where`, if it is none.

    The tensors are copied into float32. On the way matrices are rounded to float16, which OpenAI's
    own are, unless the CLIP was `tuned`.
    """
    path = where or name
    positions = state.get("positional_embedding")
    if positions is not None and len(positions) > MOST_POSITIONS:
        raise UserError(f"{path} has {len(positions)} positions of text: no CLIP has so many")
    try:
        model = open_clip.model.build_model_from_openai_state_dict(
            dict(state), cast_dtype=torch.float32
        ).float()
    except KeyError as error:
        raise UserError(f"{path} lacks the tensor {error}: it is not a whole CLIP") from None
    except (RuntimeError, ValueError, AssertionError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{path} is not a whole CLIP: {one_line(error, 200)}") from None
    if tuned:
        model.load_state_dict(state)
    require_finite(model, path)
    return LoadedClip(
        name=safe_name(name),
        model=model.eval().requires_grad_(False),
        model_config=_openai_config(model),
        preprocess_config={},
        tokenizer_source="",
    )


def _read_openai_state(path: Path) -> dict[str, torch.Tensor]:
    """Read a TorchScript archive or a plain state dict; no code in the file is run."""
    try:
        if _is_torchscript(path):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch.jit is on its way out
                archive = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
            return plain_tensors(dict(archive.state_dict()), path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as weights: {one_line(error, 120)}; only TorchScript archives "
            "and plain state dicts are loaded, never pickled code"
        ) from None
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    return plain_tensors(
        {str(name).removeprefix("module."): value for name, value in loaded.items()}, path
    )


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def _openai_config(model: Any) -> dict[str, Any]:
    """The open_clip config of a model built from an OpenAI state dict (read off its modules)."""
    visual, text = model.visual, model.transformer
    if isinstance(visual, open_clip.transformer.VisionTransformer):
        layers: int | list[int] = len(visual.transformer.resblocks)
        width, patch = visual.conv1.out_channels, visual.conv1.kernel_size[0]
    else:
        layers = [len(getattr(visual, f"layer{stage}")) for stage in (1, 2, 3, 4)]
        width, patch = visual.layer1[0].conv1.out_channels, None
    size = visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size
    return {
        "embed_dim": model.text_projection.shape[1],
        "quick_gelu": True,
        "vision_cfg": {"image_size": size, "layers": layers, "width": width, "patch_size": patch},
        "text_cfg": {
            "context_length": model.context_length,
            "vocab_size": model.vocab_size,
            "width": text.width,
            "heads": text.width // 64,
            "layers": text.layers,
        },
    }


def _known_pretrained(spec: str) -> tuple[str, str] | None:
    """(architecture, tag) if open_clip knows both. `ViT-B/16/openai` means `ViT-B-16/openai`."""
    architecture, _, tag = spec.strip().rpartition("/")
    architecture = architecture.replace("/", "-")
    if architecture and open_clip.is_pretrained_cfg(architecture, tag):
        return architecture, tag
    return None


def _unknown_spec(spec: str, encoders_dir: Path | None) -> str:
    bare = spec.strip().replace("/", "-")
    tags = open_clip.list_pretrained_tags_by_model(bare)
    if tags:
        return f"encoder {spec!r} needs a tag: for example {bare}/{tags[0]} (one of {len(tags)})"
    if bare in open_clip.list_models():
        return f"encoder {spec!r}: open_clip has no weights for it; pass a folder or a .pt file"
    architecture = spec.strip().rpartition("/")[0].replace("/", "-")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    hint = "ARCH/TAG is, for example, ViT-B-16/openai"
    if architecture in open_clip.list_models():
        hint = f"did you mean {', '.join(f'{architecture}/{tag}' for tag in tags[:5])}?"
    names = ["/".join(known) for known in open_clip.list_pretrained()]
    if encoders_dir is not None and encoders_dir.is_dir():
        names += [folder.name for folder in encoders_dir.iterdir() if folder.is_dir()]
    return (
        f"unknown encoder {spec!r}: it is no folder, no .pt file, no name under encoders/ of the "
        "workspace and no ARCH/TAG of open_clip; "
        + (meant(spec, names, _names_elsewhere()).strip() or hint)
    )


def _names_elsewhere() -> dict[str, str]:
    """Return the names, in lower case, under which model hubs know the weights of open_clip."""
    found = dict(_OPENAI_ELSEWHERE)
    for architecture, tag in open_clip.list_pretrained():
        known = open_clip.get_pretrained_cfg(architecture, tag) or {}
        repository = str(known.get("hf_hub", "")).strip("/").lower()
        found.setdefault(repository, f"{architecture}/{tag}")
    return found


def _load_pretrained(architecture: str, tag: str) -> LoadedClip:
    pretrained = open_clip.get_pretrained_cfg(architecture, tag)
    config = open_clip.get_model_config(architecture)
    if pretrained.get("quick_gelu"):
        # The tag was trained with QuickGELU; open_clip only warns when the architecture's config
        # says otherwise, and features would be wrong by a few percent.
        config["quick_gelu"] = True
    weights = _weights_of(f"{architecture}/{tag}", pretrained)
    model = build_model(config, architecture)
    try:
        open_clip.load_checkpoint(model, weights)
    except Exception as error:
        raise WorkError(
            f"the weights of {architecture}/{tag} do not load: {one_line(error, 160)}; delete "
            f"{weights} to fetch them again"
        ) from None
    require_finite(model, weights)
    return LoadedClip(
        name=safe_name(f"{architecture}-{tag}"),
        model=model,
        model_config=config,
        preprocess_config=dict(pretrained),
        tokenizer_source=architecture,
    )


def _weights_of(spec: str, pretrained: Mapping[str, Any]) -> str:
    """Find the weights in the hub's cache or fetch them. Raises WorkError in one line."""
    hub_name = str(pretrained.get("hf_hub", ""))
    cached = _cached_weights(hub_name)
    if cached:
        return cached
    remedy = (
        "fetch it on a connected machine and copy the cache, or pass --encoder FOLDER with a model "
        "in open_clip's format; to try the steps without any, "
        f"`{command('demo')}` makes a small CLIP of its own"
    )
    if hub_name and not hub_reachable():
        raise WorkError(
            f"the weights of {spec} are not in the cache and the model hub cannot be reached: "
            f"{remedy}"
        )
    try:
        return str(open_clip.download_pretrained(pretrained))
    except Exception as error:
        raise WorkError(
            f"the weights of {spec} cannot be fetched ({one_line(error, 120)}): {remedy}"
        ) from None


def _cached_weights(hub_name: str) -> str | None:
    repository, _, file_name = hub_name.rpartition("/")
    if not repository:
        return None
    default = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    stem = file_name.rpartition(".")[0]
    for candidate in (f"{stem}.safetensors", file_name) if file_name else default:
        with suppress(Exception):
            found = huggingface_hub.try_to_load_from_cache(repository, candidate)
            if isinstance(found, str):
                return found
    return None


def hub_reachable() -> bool:
    """Whether the model hub answers at all, asked once with a short time limit.

    The hub's own client retries for 46 seconds before it gives up.
    """
    if hub_constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(hub_constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
