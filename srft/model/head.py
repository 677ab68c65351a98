"""A model cut before its head, so that the loss never needs its logits.

head = head_of(loaded.model)                            # what the functions of srft_kernels ask about a head
hidden = hidden_states(loaded.model, ids)               # (B, L, H)
srft_kernels.linear_logprobs(hidden[:, :-1], target=ids[:, 1:], **head)
"""

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from srft.errors import UserError, first_line
from srft.model.attention import Segments, arguments

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def head_of(model: "PreTrainedModel") -> dict[str, Any]:
    """The output layer as keyword arguments of `srft_kernels.linear_loss`.

    linear_weight (V, H): the model's own Parameter, shared with the embedding where they are tied.
    linear_bias (V,), or None.   softcap, logit_scale: found by the names that transformers' configs have for them.
    vocab_size: the number of real entries where the weight is padded beyond it, else None.
    """
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0  # Falcon-H1
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None) or None
    vocab_size = config.vocab_size if config.vocab_size < layer.weight.shape[0] else None
    return {
        "linear_weight": layer.weight,
        "linear_bias": getattr(layer, "bias", None),
        "softcap": softcap,
        "logit_scale": float(scale),
        "vocab_size": vocab_size,
    }


LARGE = 50.0  # a logit that every soft cap in use changes
POSITIONS = "the model's max_position_embeddings"


def positions(config: "PreTrainedConfig") -> float:
    """The most tokens of a sequence; infinity where the model's config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf


def hidden_states(model: "PreTrainedModel", input_ids: Tensor, segments: Segments | None = None) -> Tensor:
    """The last hidden states (B, L, H), after the final norm, for ids (B, L); no logits are made.

    segments: of a packed row (B = 1); else rows are sequences, and what pads them stands behind them, where nothing
    that is causal sees it. So it needs no mask, and sdpa makes none.
    """
    given = {"attention_mask": torch.ones_like(input_ids)} if segments is None else arguments(model, segments)
    backbone = model.get_decoder()
    if backbone is model:  # transformers does not find that of Llama 4
        backbone = model.model
    output = backbone(input_ids=input_ids, use_cache=False, **given)
    return output.last_hidden_state.to(model.get_output_embeddings().weight.dtype)  # Mamba's are in fp32


@contextlib.contextmanager
def multiplied(layer: torch.nn.Module, factor: float) -> Iterator[list[bool]]:
    """While it lasts, the layer gives `factor` times its output; the list is empty until it was called."""
    reached: list[bool] = []

    def multiply(module: torch.nn.Module, given: Any, output: Tensor) -> Tensor:
        reached.append(True)
        return output * factor

    handle = layer.register_forward_hook(multiply)
    try:
        yield reached
    finally:
        handle.remove()


@torch.no_grad()
def check_head(model: "PreTrainedModel") -> None:
    """Raise UserError unless `head_of` and `hidden_states` reproduce the model's own logits on a few tokens.

    So too where the output layer gives more than a model that is not yet trained does: a soft cap then shows. Of
    entries past the vocabulary, which are padding, nothing is asked. Refuses a model whose tokens see what follows.
    """
    import srft_kernels as sk  # a second and a half, which what is refused before a model is loaded need not wait for

    training = model.training
    model.eval()
    causal, reason = True, ""
    try:
        head = head_of(model)
        weight = head["linear_weight"]
        ids = torch.arange(4, device=weight.device)[None] % len(weight)
        mask = torch.ones_like(ids)
        hidden = hidden_states(model, ids)
        other_end = hidden_states(model, torch.cat([ids[:, :-1], ids[:, :1]], 1))
        causal = (other_end - hidden)[:, :-1].norm() <= 0.02 * hidden[:, :-1].norm()
        most = 0.0
        for factor in (1.0, None):
            factor = factor or max(1.0, LARGE / max(most, 1e-6))
            with multiplied(model.get_output_embeddings(), factor) as reached:
                expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
            if not reached:  # the weight is used in another way than by calling its layer
                factor = 1.0
            logits = sk.reference.logits(hidden, **head | {"logit_scale": head["logit_scale"] * factor}).float()
            expected = expected[..., : logits.shape[-1]]
            most = float(expected.abs().max())
            error = float((logits - expected).abs().max()) / max(most, 1e-6)
            if not error < 0.02:
                reason = f"logits differ by {error:.1%} from those of its own forward"
                break
    except Exception as problem:
        reason = first_line(problem)
    model.train(training)
    if not causal:
        raise UserError(f"{type(model).__name__}: its tokens see those that follow them, so it is no causal LM")
    if reason:
        raise UserError(f"{type(model).__name__}: its output layer works in a way that srft does not know: {reason}")
