"""Examples to learn from and to be measured on, from files or from generated tasks.

    train = load_examples(config.data, "train", config.data.size)
    held_out = load_examples(config.data, "eval", config.eval.prompts)

A hash of the prompt decides which side it is on, so train and eval never share one, whatever the seeds and sizes, and
evaluating an old checkpoint never meets its training prompts.
"""

import random

from srft.config import DataConfig
from srft.data.examples import HELD_OUT, Example, Split, prompt_hash
from srft.data.files import read_rows
from srft.data.tasks import generate
from srft.errors import UserError


def load_examples(config: DataConfig, split: Split, count: int = 0) -> list[Example]:
    """At most `count` examples of one side, every prompt once, in an order fixed by the seed; 0: as many as there are.

    Fewer come back where a file or a small task has no more distinct prompts. Raises UserError for a file that cannot
    be read, a broken line, a missing column, an unknown task, and a side without any example.
    """
    if config.train_file or config.eval_file:
        return from_files(config, split, count)
    return generate(config, split, count)


def from_files(config: DataConfig, split: Split, count: int) -> list[Example]:
    if not config.train_file:
        raise UserError("data.train_file: data.eval_file alone was given; name a file to train on too")
    rows = list(read_rows(config.train_file))
    if config.eval_file:
        held_out = list(read_rows(config.eval_file))
        kept_apart = {prompt_hash(each) for each in held_out}
    else:
        hashes = sorted({prompt_hash(each) for each in rows})
        kept_apart = set(hashes[: max(1, len(hashes) // HELD_OUT)])
        held_out = [each for each in rows if prompt_hash(each) in kept_apart]
    train = [each for each in rows if prompt_hash(each) not in kept_apart]
    if not train:
        found = (
            "every prompt of it is also in data.eval_file" if config.eval_file else "it has one prompt, two are needed"
        )
        raise UserError(f"{config.train_file}: nothing is left to train on: {found} (one in {HELD_OUT} is held out)")
    # A prompt is measured once, but may be trained on with several demonstrations.
    examples = train if split == "train" else list({prompt_hash(each): each for each in held_out}.values())
    # Evaluation keeps a seed of its own: what is measured stays the same when the training seed changes.
    random.Random(config.seed if split == "train" else config.eval_seed).shuffle(examples)
    return examples[: count or None]
