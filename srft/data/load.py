"""Examples to learn from and to be measured on, from files or from generated tasks.

    train, held_out = load_sides(config.data, config.data.size, config.eval.prompts)
    held_out = load_examples(config.data, "eval", config.eval.prompts)      # one side alone

A hash of the prompt decides which side it is on, so train and eval never share one, whatever the seeds and sizes, and
evaluating an old checkpoint never meets its training prompts.
"""

import dataclasses
import itertools
import random

from srft.config import DataConfig
from srft.data.examples import HELD_OUT, Example, Split, prompt_hash
from srft.data.files import names, read_examples
from srft.data.tasks import generate
from srft.errors import UserError


def load_examples(config: DataConfig, split: Split, count: int = 0) -> list[Example]:
    """At most `count` examples of one side, every prompt once, in an order fixed by the seed; 0: as many as there are.

    Fewer come back where a file or a small task has no more distinct prompts. Raises UserError for a file that cannot
    be read, a broken row, a missing column, an unknown task, and a side without any example.
    """
    if not from_files(config):
        examples = generate(config, split, count)
        return with_few(examples, config.demonstrations) if split == "train" else examples
    train, held_out = read_sides(config)
    return with_few(train[: count or None], config.demonstrations) if split == "train" else held_out[: count or None]


def load_sides(config: DataConfig, size: int, prompts: int) -> tuple[list[Example], list[Example]]:
    """What `load_examples` gives for either side, files read once."""
    if not from_files(config):
        return with_few(generate(config, "train", size), config.demonstrations), generate(config, "eval", prompts)
    train, held_out = read_sides(config)
    return with_few(train[: size or None], config.demonstrations), held_out[: prompts or None]


def with_few(examples: list[Example], count: int) -> list[Example]:
    """The examples, of which the first `count` that have a demonstration keep it; −1: all."""
    numbers = itertools.accumulate(example.demonstration is not None for example in examples)
    kept = len(examples) if count < 0 else count
    return [
        example if number <= kept else dataclasses.replace(example, demonstration=None, turn=None)
        for example, number in zip(examples, numbers)
    ]


def from_files(config: DataConfig) -> bool:
    """Raises UserError for a name that is empty, as a variable of a shell may be: generated tasks are not meant."""
    for option in ("train_file", "eval_file"):
        given = getattr(config, option)
        if given is not None and not (given and all(map(str.strip, names(given)))):
            raise UserError(
                f"data.{option}: expected the name of a file, found {given!r}; leave the option out for none"
            )
    return config.train_file is not None or config.eval_file is not None


def read_sides(config: DataConfig) -> tuple[list[Example], list[Example]]:
    """Both sides of the files, each in its order."""
    if not config.train_file:
        raise UserError("data.train_file: data.eval_file alone was given; name a file to train on too")
    rows = read_examples(config.train_file, config)
    apart = read_examples(config.eval_file, config, "data.eval_file") if config.eval_file else None
    train, held_out = sides(rows, apart)
    if not train:
        found = f"it has one prompt, two are needed, since one in {HELD_OUT} is held out"
        if config.eval_file:
            found = "every prompt of it is also in data.eval_file"
        shown = ", ".join(names(config.train_file))
        raise UserError(f"{shown}: nothing is left to train on: {found}")
    # Evaluation keeps a seed of its own: what is measured stays the same when the training seed changes.
    random.Random(config.seed).shuffle(train)
    random.Random(config.eval_seed).shuffle(held_out)
    return train, held_out


def sides(rows: list[list[Example]], apart: list[list[Example]] | None) -> tuple[list[Example], list[Example]]:
    """What is trained on and what is held out, of the rows of the one file and, where there is one, of the other.

    A row goes to one side with all of its turns. What it is measured on is its last one, each prompt once; a prompt may
    be trained on with several demonstrations.
    """
    if apart is None:
        hashes = sorted({prompt_hash(row[-1]) for row in rows})
        chosen = set(hashes[: max(1, len(hashes) // HELD_OUT)])
        apart = [row for row in rows if prompt_hash(row[-1]) in chosen]
    held_out = {prompt_hash(row[-1]): row[-1] for row in apart}
    kept = [row for row in rows if prompt_hash(row[-1]) not in held_out]
    train = [each for row in kept for each in row if prompt_hash(each) not in held_out]
    return train, list(held_out.values())
