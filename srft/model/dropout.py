"""A model without dropout: in training mode it computes what it computes when it samples.

Policy gradients compare a token's probability in training with the one it was sampled with. Dropout is noise in that
ratio: GPT-2's (0.1) puts 14 % of the tokens beyond the clip range before anything was learned.
"""

import copy
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from srft.errors import UserError
from srft.model.head import hidden_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Rates by the names that models and configs have for them: dropout, resid_pdrop, layerdrop, drop_path, jitter_noise, …
# A router's jitter (Phi-MoE) is a threshold, which evaluation mode knows too.
RATE = re.compile(r"drop|^(input_|moe_)?jitter")


@torch.no_grad()
def without_dropout(model: "PreTrainedModel") -> None:
    """Set every rate of dropout, LayerDrop and jitter to 0; `model.config`, which checkpoints save, stays as it is.

    Raises UserError where the model in training mode still differs from what it was in evaluation mode.
    """
    training = model.training
    before = _states(model.eval())
    quiet: dict[int, Any] = {}  # modules that read their config in forward get a copy of it
    for module in model.modules():
        config = vars(module).get("config")
        if module is not model and hasattr(config, "to_dict"):
            module.config = quiet.setdefault(id(config), _silenced(copy.deepcopy(config)))
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _silenced(module)
    after = _states(model.train())
    model.train(training)
    difference = ((after - before).norm() / before.norm()).item()
    if not difference < 1e-3 * (1 if model.dtype.itemsize >= 4 else 50):
        raise UserError(
            f"model.dropout false: {type(model).__name__} differs in training mode (by {difference:.1%}) "
            "for a reason that srft does not know; with model.dropout true it is trained as it is"
        )


def _silenced(owner: Any) -> Any:
    """The module or config, its rates (floats; a choice of other modules is none) set to 0."""
    for name, value in list(vars(owner).items()):
        if RATE.search(name) and isinstance(value, float):
            setattr(owner, name, 0.0)
    return owner


def _states(model: "PreTrainedModel") -> Tensor:
    ids = torch.arange(24, device=model.device)[None] * 7 % model.config.get_text_config().vocab_size
    return hidden_states(model, ids).double()
