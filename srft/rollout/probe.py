"""What a model may be asked for when it generates, found out on a few tokens: not every one masks padding, or has a
cache that holds for several rows.

masks_padding(loaded)          # False for RWKV, RecurrentGemma
cache_holds(loaded)            # False for RWKV
"""

import inspect

import torch
from torch import Tensor
from transformers import GenerationConfig

from srft.model import LoadedModel

TOLERANCE = {torch.float32: 1e-3}  # of logits, relative; of 16-bit types:
COARSE = 0.05


@torch.no_grad()
def masks_padding(loaded: LoadedModel) -> bool:
    """Whether the logits after a prompt are the same with padding before it. The model must be in evaluation mode."""
    ids, padding = tokens(loaded, 4), tokens(loaded, 16).flip(1)
    mask = torch.cat([torch.zeros_like(padding), torch.ones_like(ids)], 1)
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    named = positions if "position_ids" in inspect.signature(loaded.model.forward).parameters else {}
    alone = loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
    padded = loaded.model(input_ids=torch.cat([padding, ids], 1), attention_mask=mask, **named).logits[:, -1]
    return alike(alone, padded, loaded.dtype)


@torch.no_grad()
def cache_holds(loaded: LoadedModel) -> bool:
    """Whether two rows that are generated together have the logits of one forward over all of their tokens."""
    ids = torch.cat([tokens(loaded, 4), tokens(loaded, 4).flip(1)])
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": loaded.pad_id}
    output = loaded.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig(**settings, output_logits=True, return_dict_in_generate=True),
    )
    whole = output.sequences[:, :-1]
    expected = loaded.model(input_ids=whole, attention_mask=torch.ones_like(whole), use_cache=False).logits[:, 3:]
    return alike(torch.stack(output.logits, 1), expected, loaded.dtype)


def tokens(loaded: LoadedModel, count: int) -> Tensor:
    """Some ids (1, count), none of which is the padding."""
    size = loaded.model.get_input_embeddings().num_embeddings
    ids = torch.arange(1, count + 1, device=loaded.device) % size
    return torch.where(ids == loaded.pad_id, (loaded.pad_id + 1) % size, ids)[None]


def alike(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    one, other = one.float(), other.float()
    return bool((one - other).norm() <= TOLERANCE.get(dtype, COARSE) * one.norm())
