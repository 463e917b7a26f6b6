"""The registry of methods by name, which code outside a method uses to learn about it.

A method is a folder `heads/methods/NAME/` with its configuration, model, losses and official names
(or, where it shares them, a module), whose `METHOD` is registered here by its name in `_BUILT_IN`.
It is imported when the method is first asked for, and imports the model only where that is used:
so this module needs no torch, and `import heads` loads no method that needs video decoding.

The commands contain no method names and ask the registry instead: `train-head` and `finetune` what
can be trained, `import-checkpoint` and `export` about the authors' format, `eval` and `predict`
about modulation, `tradeoff` about new classes, `tradeoff` and `demo` for titles.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from featstore.errors import UserError, one_of

if TYPE_CHECKING:
    from heads.methods.head import Head
    from heads.methods.settings import MethodConfig

log = logging.getLogger(__name__)

DEFAULT_METHOD: Final = "mote"
"""The method of a configuration without `kind`."""
MEAN_OF_FRAMES: Final = "mean"
"""The method without parameters, and the name by which commands ask for no head."""


@dataclass(frozen=True)
class Method:
    """A way to compute one embedding of a video from its frames."""

    name: str
    title: str
    """The name of the method in pictures."""
    config: Any
    """The class of a head's configuration: a frozen dataclass that is a `MethodConfig`."""
    head: Callable[[Any, int], Head]
    """A function of configuration and number of training classes; the head has no weights drawn."""
    losses: tuple[str, ...] = ()
    """Names of the losses besides the total, in the order of `Head.training_loss`."""
    trains: bool = True
    """Whether the method has parameters to train."""
    fitted: bool = False
    """Whether `Head.fit` learns all parameters at once, where other methods train in epochs."""
    open_vocabulary: bool = True
    """Whether it can score classes that it was not trained on, given their texts."""
    from_store: bool = True
    """Whether it can be trained from stored frame features."""
    end_to_end: bool = True
    """Whether it can be trained together with the image tower."""
    pixels: bool = False
    """Whether the head looks at pixels beside the encoder: its features are made with the head."""
    adapts: bool = False
    """Whether the head changes both towers of the encoder: features and class texts are made with
    it, by an encoder of its own."""
    taught: bool = False
    """Whether a teacher, an average of its own towers, holds it in training: then a run also keeps
    the teacher and the mean of its weights."""
    scaled: bool = False
    """Whether its published tests fuse views by the softmax of logits, where others leave the
    multiplier of cosines out."""
    modulated: bool = True
    """Whether temporal feature modulation can scale down what the head adds to the frames."""
    multi_label: bool = False
    """Whether it can be trained on videos of several classes each and, in epochs, with class
    weights."""
    portable: bool = True
    """Whether it can be exported as safetensors and ONNX."""
    from_elsewhere: tuple[str, ...] = ()
    """Fields of the configuration that no recipe sets, as when encoder and training give them."""
    recipe: str = "end-to-end"
    """The recipe of `finetune` where none is named."""
    prompts: str | None = None
    """The prompt set of its class texts in fine-tuning; None: the usual one."""
    official: str | None = None
    """Module for the format in which the authors publish weights. `is_of(content)` says whether the
    entries of a file have the names of such a checkpoint, `lacks(content)` says in words what is
    missing, and `EXAMPLE` is the name of such a file; `read(path)` returns the checkpoint with
    every tensor checked; `write(path, head, tower_state, epoch)` writes one, for a head that looks
    at pixels `write(path, head, clip_state)`, for one that adapts `write(path, head)`. They
    raise UserError for content that does not fit."""

    @property
    def keeps_towers(self) -> bool:
        """Whether end-to-end training leaves both towers as they are."""
        return self.pixels or self.adapts

    @property
    def in_epochs(self) -> bool:
        """Whether it is trained in epochs."""
        return self.trains and not self.fitted

    @property
    def checkpoint(self) -> Any:
        """The module named by `official`; None without an official format."""
        return None if self.official is None else import_module(self.official)

    def require(self, what: str, possible: bool, remedy: str) -> None:
        """Raise UserError unless it is `possible` to do `what` with this method.

        `remedy` is right for every command that may ask: it names an option only if all have it.
        """
        if not possible:
            raise UserError(f"{self.title} cannot be {what}: {remedy}")

    def warn_of_epochs(self, options: Mapping[str, Any]) -> None:
        """Warn of options with a value, by name, that are for methods trained in epochs only."""
        given = [name for name, value in options.items() if value is not None]
        if given and not self.in_epochs:
            log.warning(
                "no effect of %s on %s, which is not trained in epochs: leave it out, or choose "
                "another --head",
                *(", ".join(given), self.title),
            )


_BUILT_IN: Final = ("mote", "transformer", "mean", "linear", "knn", "dist", "msta", "taco")
_registered: dict[str, Method | None] = dict.fromkeys(_BUILT_IN)


def register(added: Method) -> None:
    """Register a method that has no folder here."""
    _registered[added.name] = added


def names() -> list[str]:
    """Return the names of all methods."""
    return list(_registered)


def method(name: str) -> Method:
    """Return the method of that name; UserError, listing the choices, if there is none."""
    if name not in _registered:
        raise UserError(f"head kind {name!r} is unknown: {one_of(name, _registered)}")
    found = _registered[name]
    if found is None:
        found = _registered[name] = import_module(f"heads.methods.{name}").METHOD
        assert isinstance(found, Method)
    return found


def require_run_name(name: str) -> None:
    """Raise UserError for the name "mean", which no run can have: it asks commands for no head."""
    if name == MEAN_OF_FRAMES:
        raise UserError(f"--name {name}: --head {name} means no head; use another name")


def config_from_json(value: Any) -> MethodConfig:
    """Read the configuration that some method's `to_json` wrote; UserError if it is none."""
    kind = value.get("kind", DEFAULT_METHOD) if isinstance(value, Mapping) else DEFAULT_METHOD
    found: MethodConfig = method(kind).config.from_json(value)
    return found


def untrained(kind: object) -> bool:
    """Return whether `kind`, from a record of any version, is a method without parameters."""
    return isinstance(kind, str) and kind in _registered and not method(kind).trains


def knows_only_its_classes(kind: object) -> bool:
    """Return whether `kind`, from a record of any version, is a method without new classes."""
    return isinstance(kind, str) and kind in _registered and not method(kind).open_vocabulary


def keeps_several_weights(kind: object) -> bool:
    """Return whether `kind`, from a record of any version, is a method whose runs keep several."""
    return isinstance(kind, str) and kind in _registered and method(kind).taught


def adapts_its_features(kind: object) -> bool:
    """Return whether `kind`, from a record of any version, is a method that makes its features."""
    return isinstance(kind, str) and kind in _registered and method(kind).adapts


def read_checkpoint(file: Path) -> tuple[Method, Any]:
    """Return the method whose authors' format `file` has, and the checkpoint with checked tensors.

    Raises UserError for a file that is damaged, holds code, or has an unknown format.
    """
    from heads.methods.weight_files import load_weight_file

    known: list[Method] = []  # one for each format
    for found in map(method, _registered):
        if found.official not in (None, *(other.official for other in known)):
            known.append(found)
    examples = " or ".join(found.checkpoint.EXAMPLE for found in known)
    content = load_weight_file(file, examples)
    # A later method's format may be an earlier one's with more in it: TACO's is MoTE's with texts.
    fitting = (found for found in reversed(known) if found.checkpoint.is_of(content))
    chosen = next(fitting, None)
    if chosen is None:
        absent = [
            f"for {found.title} it lacks {found.checkpoint.lacks(content)}" for found in known
        ]
        raise UserError(
            f"{file} is no checkpoint of a released code that mote knows: {'; '.join(absent)}; "
            f"pass one, such as {examples}"
        )
    return chosen, chosen.checkpoint.read(file)
