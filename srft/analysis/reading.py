"""What a model says of texts that all models read: hidden states before their tokens, and what its head makes of them.

reading = read(loaded, sequences, token_budget)
divergence("forward_kl", of=base, to=reading)         # KL(base ‖ model) of each token, (N,)
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import srft_kernels as sk
from srft.learn.packing import Sequence, pack, predictors
from srft.model import LoadedModel, head_of


@dataclass(frozen=True)
class Reading:
    """Of the N tokens of the texts, one text after the other.

    hidden: (N, H) what predicts each token.   head: of the model, as head_of gives it.   target: (N,) the tokens.
    logprobs, entropy: (N,) in nats.   likeliest: (N,) the token that the model finds likeliest.
    """

    hidden: Tensor
    head: dict[str, Any]
    target: Tensor
    logprobs: Tensor
    entropy: Tensor
    likeliest: Tensor

    def of(self, where: Tensor) -> "Reading":  # (N,) bool, or (n,) which
        """Of some of the tokens."""
        names = ("hidden", "target", "logprobs", "entropy", "likeliest")
        return Reading(head=self.head, **{name: getattr(self, name)[where] for name in names})


@torch.no_grad()
def read(loaded: LoadedModel, sequences: SequenceOf[Sequence], token_budget: int) -> Reading:
    """Evaluation mode, temperature 1."""
    training = loaded.model.training
    loaded.model.eval()
    microbatches = pack(
        sequences, token_budget=token_budget, pad_id=loaded.pad_id, device=loaded.device, rows=loaded.rows
    )
    order = torch.cat([m.step_index for m in microbatches]).argsort()
    hidden = torch.cat([predictors(loaded.model, m) for m in microbatches])[order]
    target = torch.cat([m.target for m in microbatches])[order]
    loaded.model.train(training)
    head = {
        name: value.detach() if isinstance(value, Tensor) else value for name, value in head_of(loaded.model).items()
    }
    found = sk.linear_logprobs(hidden, target=target, extras=sk.Extras(argmax=True), **head)
    return Reading(hidden, head, target, found.logprobs, found.entropy, found.extras.argmax)


@torch.no_grad()
def divergence(kind: str, of: Reading, to: Reading) -> Tensor:
    """(N,) in nats: "forward_kl" KL(of ‖ to), or "jensen_shannon", which is symmetric and at most log 2.

    Of the entries that both heads have: those of one tokenizer, while one head may be padded further.
    """
    common = min(each.head["vocab_size"] or len(each.head["linear_weight"]) for each in (of, to))
    student = {name: value for name, value in to.head.items() if name != "vocab_size"}
    teacher = {
        f"teacher_{name.removeprefix('linear_')}": value for name, value in of.head.items() if name != "vocab_size"
    }
    found = sk.linear_distillation(
        to.hidden, teacher_input=of.hidden, divergence=kind, vocab_size=common, **student, **teacher
    )
    return found.divergence.clamp_min(0)  # rounding


@torch.no_grad()
def ranks(reading: Reading, tokens: Tensor) -> Tensor:  # (N,)
    """(N,) how many tokens the model finds likelier than the one given."""
    return sk.linear_logprobs(reading.hidden, target=tokens, extras=sk.Extras(rank=True), **reading.head).extras.rank
