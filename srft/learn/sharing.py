"""May the completions of a prompt share its tokens on this model?

A shared bin (packing.py) brings its own attention mask and positions. A backbone that does not follow them (flash
attention, a recurrence, positions counted from its start, …) would silently mix completions up, so it is tried out.
"""

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from srft.learn.packing import Sequence, pack
from srft.model import hidden_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A mask of our own replaces that of a window, so bins must not reach beyond one. A trial with few tokens cannot see
# that, nor a layer that selects tokens once there are many.
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "max_position_embeddings")
LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


@torch.no_grad()
def sharing_limit(model: "PreTrainedModel") -> int:
    """The longest bin (tokens) in which completions may share their prompt; 0: not on this model.

    Compares the hidden states of two random completions of one prompt, in a shared bin and in bins of their own.
    """
    config = model.config.get_text_config()
    if not set(getattr(config, "layer_types", None) or ()) <= LAYERS:
        return 0
    ids = [7919 * i % config.vocab_size for i in range(40)]
    sequences = [Sequence(ids[:8], ids[8:28]), Sequence(ids[:8], ids[28:])]

    def states(share_up_to: int) -> Tensor:
        (m,) = pack(sequences, token_budget=1000, device=model.device, share_up_to=share_up_to)
        hidden = hidden_states(model, m.input_ids, m.attention_mask, m.position_ids)
        return hidden.flatten(0, 1)[m.hidden_index[m.step_index.argsort()]].double()

    training = model.training
    model.eval()
    try:
        shared, apart = states(sys.maxsize), states(0)
        same = (shared - apart).norm() <= (0.05 if model.dtype.itemsize < 4 else 1e-3) * apart.norm()
    except Exception:  # whatever a backbone says about a mask or positions that it does not know
        same = False
    model.train(training)
    bounds = [getattr(config, name, None) for name in WINDOWS]
    return min([each for each in bounds if isinstance(each, int)], default=sys.maxsize) if same else 0
