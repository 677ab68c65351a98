"""What a rollout engine is: prompts in, sampled completions out.

Every engine samples from exactly `softmax(logits / temperature)`, cut to the `top_p` nucleus where that is asked for,
because that is the distribution whose log-probabilities the training loss computes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rollout:
    """One sampled completion: its token ids, the end-of-sequence token included where the model produced one."""

    tokens: list[int]
    finished: bool  # ended by an end-of-sequence token, not by the length limit


class Engine:
    """Samples completions with the model's current weights. A run has one, for rollouts and evaluation alike.

    An engine that generates with the very model that is trained has only `generate` to write. One that has weights of
    its own says so by `needs_model = False`: they are the model's when it is made, and `refresh` brings the new ones.
    """

    needs_model = True  # it generates with the model, which then has to be whole on every rank

    def generate(
        self,
        prompts: list[list[int]],
        samples: int,
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        batch_size: int,
        numbers: Sequence[int] | None = None,
    ) -> list[list[Rollout]]:
        """`samples` completions of each prompt, in the order of `prompts`. Temperature 0 is greedy decoding.

        What is drawn follows from the weights, the seed, the prompt with its number (default: its place in `prompts`)
        and the sample's number, whoever generates which of them together, at most `batch_size` sequences at a time; the
        global random state is left as it was.
        """
        raise NotImplementedError

    def refresh(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """The model's weights have changed. What is generated from now on is sampled with the new ones.

        weights: each by its name in the model's state dict, whole and in the model's type, a tied one under both of its
        names. They are gathered one at a time while they are walked through, of which all ranks must do equally much. A
        tensor may be the model's own: copy what is to be kept beyond the next.
        """

    def release(self) -> None:
        """Nothing is generated for a while: memory that only generating needs is free until the next `generate`."""
