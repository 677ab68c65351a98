"""Rollout engines: prompts in, sampled completions out.

Every engine samples from exactly `softmax(logits / temperature)`, cut to the `top_p` nucleus where that is asked for,
because that is the distribution whose log-probabilities the training loss computes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from srft.errors import UserError
from srft.model import LoadedModel


@dataclass(frozen=True)
class Rollout:
    """One sampled completion: its token ids, the end-of-sequence token included where the model produced one."""

    tokens: list[int]
    finished: bool  # ended by an end-of-sequence token, not by the length limit


class Engine(Protocol):
    """Samples completions with the model's current weights."""

    def generate(
        self,
        prompts: list[list[int]],
        samples: int,
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        numbers: Sequence[int] | None = None,
    ) -> list[list[Rollout]]:
        """`samples` completions of each prompt, in the order of `prompts`. Temperature 0 is greedy decoding.

        What is drawn follows from the weights, the seed, the prompt with its number (default: its place in `prompts`)
        and the sample's number, whoever generates which of them together; the global random state is left as it was.
        """
        ...


def build_engine(name: str, loaded: LoadedModel, batch_size: int) -> Engine:
    """The engine called `name`, holding at most `batch_size` sequences at a time."""
    if name == "transformers":
        from srft.rollout.transformers_engine import TransformersEngine

        return TransformersEngine(loaded, batch_size)
    raise UserError(f"rollout.engine: expected 'transformers', found {name!r}")
