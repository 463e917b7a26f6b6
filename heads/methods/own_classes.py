"""The base class of heads that are fitted in one go and know no other classes than their own.

n = videos, D = embedding width, S = the head's own classes, C = classes asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from featstore.errors import UserError
from featstore.spelling import comparable
from heads.methods.head import Head
from heads.methods.registry import method, names
from heads.methods.text_classifier import SAME_CLASS, class_cosines


class OwnClassesHead(Head):
    """A head that scores its own classes by what `fit` kept, and adds nothing to the frames.

    A method inherits from this class and writes `fit` and `own_scores`.
    """

    def own_scores(self, embeddings: Tensor) -> Tensor:
        """Return the scores [...,S] of unit video embeddings [...,D]; see `Head.scorer`."""
        raise NotImplementedError

    def hidden(self, features: Tensor) -> None:
        """Return None: the frames of a video are averaged as they are."""

    def scorer(
        self, class_embeddings: Tensor, class_names: Sequence[str] | None = None
    ) -> Callable[[Tensor], Tensor]:
        """Return the function that scores the named classes among the head's own.

        Classes are found by name, as a person reads it; a name that is not one of the head's own
        scores -inf (see `require_classes`). If names are not given, or the head does not know its
        own, classes are found by their embeddings, and UserError is raised for one that is not the
        head's own.
        """
        own = None if self.origin is None else self.origin.class_names
        trained = self.training_class_embeddings
        if own is not None and class_names is not None:
            columns = [len(own) if at is None else at for at in _places(own, class_names)]
        else:
            if not len(trained):
                raise UserError("this head has no classes yet: train it with train-head")
            tested = functional.normalize(class_embeddings.to(trained), dim=-1)
            best, found = class_cosines(tested, trained).max(1)
            far = [f"class {at}" for at, cosine in enumerate(best.tolist()) if cosine < SAME_CLASS]
            self._refuse(far, len(trained))
            columns = found.tolist()

        def scores(embeddings: Tensor) -> Tensor:
            padded = functional.pad(self.own_scores(embeddings), (0, 1), value=-torch.inf)
            return padded[..., columns]

        return scores

    def require_classes(self, class_names: Sequence[str]) -> None:
        """Raise UserError if a name is not one of the head's own classes."""
        own = None if self.origin is None else self.origin.class_names
        if own is not None:
            places = zip(class_names, _places(own, class_names), strict=True)
            self._refuse([name for name, at in places if at is None], len(own))

    def _refuse(self, strange: Sequence[str], known: int) -> None:
        """Raise UserError if there are classes that the head does not know."""
        if strange:
            kinds = [name for name in names() if method(name).open_vocabulary]
            raise UserError(
                f"a head of kind {self.config.kind} knows only the {known} classes it was trained "
                f"on, and {strange[0]!r} is not one of them: for other classes take a head of kind "
                f"{' or '.join(kinds)}, such as --head mean"
            )


def _places(own: Sequence[str], class_names: Sequence[str]) -> list[int | None]:
    """Return the place of each class among the `own` ones, None for a class that is none."""
    place = {comparable(name): at for at, name in enumerate(own)}
    place |= {name: at for at, name in enumerate(own)}  # the exact name comes first
    return [place.get(name, place.get(comparable(name))) for name in class_names]
