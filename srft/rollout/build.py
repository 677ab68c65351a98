"""Which engine a configuration names."""

from srft.errors import UserError
from srft.model import LoadedModel
from srft.rollout.engine import Engine


def build_engine(name: str, loaded: LoadedModel) -> Engine:
    """The engine called `name`, for the model that is trained or evaluated."""
    if name == "transformers":
        from srft.rollout.transformers_engine import TransformersEngine

        return TransformersEngine(loaded)
    raise UserError(f"rollout.engine: expected 'transformers', found {name!r}")
