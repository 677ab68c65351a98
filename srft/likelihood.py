"""How likely a model finds demonstrations: the held-out loss, for data whose answers nobody can verify."""

from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

import torch

import srft_kernels as sk
from srft.learn.packing import Sequence, pack, predictors
from srft.model import head_of
from srft.ranks import Ranks

if TYPE_CHECKING:
    from srft.data import Problem
    from srft.model import LoadedModel


@torch.no_grad()
def demonstration_loss(
    loaded: "LoadedModel", problems: SequenceOf["Problem"], token_budget: int, ranks: Ranks | None = None
) -> tuple[float, int]:
    """(mean −log p of the demonstrations' tokens in nats, their number), at temperature 1; (NaN, 0) without any.

    All ranks must call it with the same problems.
    """
    ranks, model = ranks or Ranks(), loaded.model
    sequences = [Sequence(p.prompt, p.demonstration, True) for p in problems if p.demonstration]
    total = torch.zeros(2, dtype=torch.float64, device=loaded.device)
    if not sequences:
        return float("nan"), 0
    training = model.training
    model.eval()
    microbatches = pack(
        sequences, token_budget=token_budget, pad_id=loaded.pad_id, device=loaded.device, rows=loaded.rows,
        rank=ranks.rank, ranks=ranks.size,
    )  # fmt: skip
    for m in microbatches:

        def logprobs(m=m) -> torch.Tensor:
            return sk.linear_logprobs(predictors(model, m), target=m.target, **head_of(model)).logprobs

        found = ranks.forward(loaded, logprobs).double()
        total += torch.stack([-found.sum(), found.new_tensor(len(found))])
    model.train(training)
    loss, count = ranks.add(total).tolist()
    return loss / count, int(count)
