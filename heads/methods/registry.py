"""The methods, by name: what the commands and everything else outside a method asks about it.

A method is a folder `heads/methods/NAME/` with its configuration, model, losses and official names
(or, where it shares them, a module), whose `METHOD` is registered here by its name in `_BUILT_IN`.
It is imported when the method is first asked for, and imports the model only where that is used:
so this module needs no torch, and `import heads` loads no method that needs video decoding.

The commands ask it and hold no name of a method: `train-head` and `finetune` what can be trained,
`import-checkpoint` and `export` about the authors' format, `eval` and `predict` about modulation,
`tradeoff` and `demo` for titles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from featstore.errors import UserError

if TYPE_CHECKING:
    from heads.methods.head import Head
    from heads.methods.settings import MethodConfig

DEFAULT_METHOD: Final = "mote"
"""What a configuration without `kind` is of."""
MEAN_OF_FRAMES: Final = "mean"
"""The method without parameters, and the name by which commands ask for no head."""


@dataclass(frozen=True)
class Method:
    """A way of getting from the frames of a video to one embedding of it."""

    name: str
    title: str
    """Its name in pictures."""
    config: Any
    """Frozen dataclass of a head's shape, a `MethodConfig`."""
    head: Callable[[Any, int], Head]
    """The head for a configuration and a number of training classes, its weights not drawn."""
    losses: tuple[str, ...] = ()
    """Names of the losses beside the total, as `Head.training_loss` gives them."""
    trains: bool = True
    """Whether it has parameters."""
    from_store: bool = True
    """Whether it can be trained from stored frame features."""
    end_to_end: bool = True
    """Whether it can be trained together with the image tower."""
    modulated: bool = True
    """Whether temporal feature modulation can hold back what it adds to the frames."""
    portable: bool = True
    """Whether it can be exported as safetensors and ONNX."""
    official: str | None = None
    """Module of the format in which its authors publish weights: `is_of(content)`, whether what a
    file holds is such a checkpoint as far as its entries' names say; `read(path)`, the checkpoint,
    every tensor checked; `write(path, head, tower_state, epoch)`. UserError for what does not fit.
    """

    @property
    def checkpoint(self) -> Any:
        """The module `official`; None without an official format."""
        return None if self.official is None else import_module(self.official)

    def require(self, what: str, possible: bool) -> None:
        """UserError unless it is `possible` to do `what` with this method."""
        if not possible:
            raise UserError(f"{self.title} cannot be {what}: choose another --head")


_BUILT_IN: Final = ("mote", "transformer", "mean")
_registered: dict[str, Method | None] = dict.fromkeys(_BUILT_IN)


def register(added: Method) -> None:
    """Make a method known that has no folder here."""
    _registered[added.name] = added


def names() -> list[str]:
    """The names of all methods."""
    return list(_registered)


def method(name: str) -> Method:
    """The method of that name; UserError, naming the choices, when there is none."""
    if name not in _registered:
        raise UserError(f"head kind {name!r} is unknown: choose one of {', '.join(_registered)}")
    found = _registered[name]
    if found is None:
        found = _registered[name] = import_module(f"heads.methods.{name}").METHOD
        assert isinstance(found, Method)
    return found


def require_run_name(name: str) -> None:
    """UserError for a name that no run can have: that by which commands ask for no head."""
    if name == MEAN_OF_FRAMES:
        raise UserError(f"--name {name}: --head {name} means no head; use another name")


def config_from_json(value: Any) -> MethodConfig:
    """The configuration that `to_json` of some method's gave; UserError where it is none."""
    kind = value.get("kind", DEFAULT_METHOD) if isinstance(value, Mapping) else DEFAULT_METHOD
    found: MethodConfig = method(kind).config.from_json(value)
    return found


def untrained(kind: object) -> bool:
    """Whether `kind`, of a record of any version, is a method without parameters."""
    return isinstance(kind, str) and kind in _registered and not method(kind).trains


def read_checkpoint(file: Path) -> tuple[Method, Any]:
    """The method whose authors' format `file` has, and the checkpoint, every tensor checked.

    UserError for a file that is damaged, holds code, or is of no format that is known.
    """
    from heads.methods.weight_files import load_weight_file

    content = load_weight_file(file)
    known = [found for found in map(method, _registered) if found.official is not None]
    fitting = [found for found in known if found.checkpoint.is_of(content)]
    # A file of no format known gets the first one's errors, which say what such a file holds.
    chosen = (fitting or known)[0]
    return chosen, chosen.checkpoint.read(file)
