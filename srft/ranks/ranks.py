"""The processes of a run, called ranks. One process is `Ranks()`; under torchrun they are torchrun.py's.

Every rank draws the same prompts, and after each piece of work that was divided it holds everybody's results: from
rollouts and rewards on, all of them see the step that one process would see, and take their part of its microbatches.
Only rank 0 prints and writes.
"""

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from srft.config import ModelConfig
    from srft.model import LoadedModel
    from srft.rewards import Scorer
    from srft.rollout import Engine

T = TypeVar("T")


class Ranks:
    """One process: nothing is divided, nothing is sent, and torch.distributed is not imported."""

    rank, size = 0, 1
    last_words = ""  # what a message that ends the run adds: where it stands on disk
    on_end: Callable[[str], None] | None = None  # called on one of several ranks with what ended their run

    @property
    def main(self) -> bool:
        """Is this the rank that prints and writes?"""
        return self.rank == 0

    def check(self, config: "ModelConfig") -> None:
        """Raise UserError where model.device cannot be had by every rank."""

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank; all ranks must call it."""
        return [value]

    def concatenate(self, *parts: "Tensor") -> tuple["Tensor", ...]:
        """Of each tensor every rank's part (n, …), one rank after the other. All ranks must call it."""
        return parts

    def add(self, tensor: "Tensor") -> "Tensor":
        """Sum over the ranks, in place."""
        return tensor

    def engine(self, engine: "Engine", loaded: "LoadedModel") -> "Engine":
        """An engine with which ranks generate for a part of the prompts each, and all get all completions."""
        return engine

    def scorer(self, scorer: "Scorer") -> "Scorer":
        """The same for rewards; completions of one example are scored by one rank, in one call."""
        return scorer

    def shard(self, loaded: "LoadedModel") -> None:
        """Leave a part of every weight on this rank; from then on weights are used inside `forward` or `whole`.

        Of one model after the other, where there are several.
        """

    def forward(self, loaded: "LoadedModel", function: Callable[[], T]) -> T:
        """Call it inside of the forward of the module that owns embedding, final norm and head.

        The head's weight is whole there, and its gradient is summed over the ranks. All ranks must call it.
        """
        return function()

    def whole(self, loaded: "LoadedModel", function: Callable[[], T]) -> T:
        """Call it while every weight of the model is whole on every rank, without gradients. All ranks must call it."""
        return function()

    def weights(self, loaded: "LoadedModel") -> "Iterator[tuple[str, Tensor]]":
        """The model's state dict, each weight whole and in the model's type, for the engine. All ranks must walk it."""
        yield from loaded.model.state_dict().items()

    def state_dict(self, loaded: "LoadedModel") -> dict[str, "Tensor"] | None:
        """The same on the CPU of rank 0, to be saved; None: as the model has it. All ranks must call it."""
        return None

    def fail(self, message: str, code: int, error: BaseException | None = None) -> int:
        """Print what ends the run, once for all ranks; returns the exit code, where there is still something to leave.

        error: what the message is about. If it says that another rank is gone, that is told instead.
        """
        print(message, file=sys.stderr)
        return code

    def leave(self, code: int = 0) -> int:
        """The end of what went well, with the exit code where there is still something to leave."""
        return code


def broadcast(ranks: Ranks, function: Callable[[], Any]) -> Any:
    """What the function returns on rank 0, which alone calls it, for all ranks."""
    return ranks.gather(function() if ranks.main else None)[0]
