"""What is in a data file, before a model is trained on it: `srft data check FILE…`.

Counts, which columns were taken for what, lengths, repeated prompts, what of the held-out prompts is in the training
file too, and every broken row with file and line. Without a tokenizer lengths are characters.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from srft.config import Config
from srft.data.columns import ALIASES
from srft.data.examples import Example, prompt_hash
from srft.data.files import Reading, names, read_all
from srft.data.load import sides
from srft.data.prompts import Prompter, build_prompter
from srft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Lengths = list[tuple[int, str]]  # of a text, and where it is
BAR = 40
SHOWN = 20  # broken rows of a file that are named


def check(config: Config, tokenizer: "PreTrainedTokenizerBase | None" = None) -> None:
    """Print what is in data.train_file and data.eval_file; raises UserError at the end where a row is broken."""
    data = config.data
    prompter = build_prompter(tokenizer, data) if tokenizer else None
    reading = read_all(data.train_file, data)
    broken = list(told(", ".join(names(data.train_file)), reading, prompter, config))
    rows, held_out = reading, None
    if data.eval_file:
        held_out = read_all(data.eval_file, data, "data.eval_file")
        broken += told(", ".join(names(data.eval_file)), held_out, prompter, config)
    if reading.examples:
        print("\n".join(leaks(rows.examples, held_out.examples if held_out else None)))
    if broken:
        count = len(reading.broken) + len(reading.examples)
        count += len(held_out.broken) + len(held_out.examples) if held_out else 0
        advice = 'data.broken = "drop" leaves them out'
        if len(broken) == count:
            advice = 'name the columns: data.columns = {prompt = "…", demonstration = "…"}'
        raise UserError(f"{len(broken)} of {count} rows are broken; {advice}")


def told(file: str, reading: Reading, prompter: Prompter | None, config: Config) -> Iterator[UserError]:
    """Print about one file; yields what is broken in it."""
    examples = [each for row in reading.examples for each in row]
    broken = list(reading.broken)
    prompts, demonstrations, refused = lengths(examples, prompter)
    broken += refused
    print(f"{file}: {len(reading.examples) + len(reading.broken)} rows, {len(reading.broken)} of them broken")
    for line in (*parts(reading, examples), *repeats(reading.examples)):
        print(f"  {line}")
    unit = "tokens" if prompter else "characters"
    for name, found in (("prompts", prompts), ("demonstrations", demonstrations)):
        for line in histogram(f"{name}, {unit}", found):
            print(f"  {line}")
    if prompter:
        most = config.data.max_prompt_tokens
        if long := sum(length > most for length, _ in prompts):
            print(f"  {long} prompts are longer than data.max_prompt_tokens {most}: data.overlong")
    for error in broken[:SHOWN]:
        print(f"  broken: {error}")
    if len(broken) > SHOWN:
        print(f"  broken: and {len(broken) - SHOWN} more")
    yield from broken


def parts(reading: Reading, examples: list[Example]) -> Iterator[str]:
    """Of each part of an example, the columns it was taken from."""
    for name, groups in ALIASES.items():
        if name in reading.uses:
            columns = ", ".join(f"{column} ({count} rows)" for column, count in reading.uses[name].most_common())
            yield f"{name:<14} from {columns}"
        elif name in ("demonstration", "answer") and examples:
            known = ", ".join(alias for group in groups for alias in group)
            yield f'{name:<14} none; known names: {known}; or data.columns = {{{name} = "…"}}'
    with_both = f"{sum(e.demonstration is not None for e in examples)} demonstrations"
    yield f"{len(examples)} examples, {with_both}, {sum(e.answer is not None for e in examples)} answers"
    others = [name for name in reading.columns if any(name in each.columns for each in examples[:1000])]
    if others:
        yield f"reward functions get the columns {', '.join(others)}"


def lengths(examples: list[Example], prompter: Prompter | None) -> tuple[Lengths, Lengths, list[UserError]]:
    prompts, demonstrations, refused = [], [], []
    for each in examples:
        try:
            problem = prompter.problem(each) if prompter else None
        except UserError as error:
            refused.append(error)
            continue
        prompts.append((len(problem.prompt) if problem else len(written(each)), each.where))
        if each.demonstration is not None:
            demonstrations.append((len(problem.demonstration if problem else each.demonstration), each.where))
    return prompts, demonstrations, refused


def written(example: Example) -> str:
    return "\n".join(turn["content"] or "" for turn in example.messages)


def histogram(title: str, found: Lengths) -> Iterator[str]:
    """Bins that double; bars as long as they have members."""
    if not found:
        return
    sizes = sorted(length for length, _ in found)
    longest = max(found)
    middle, most = (sizes[int(share * (len(sizes) - 1))] for share in (0.5, 0.99))
    yield f"{title}: shortest {sizes[0]}, median {middle}, 99 % up to {most}, longest {longest[0]} ({longest[1]})"
    counts: dict[int, int] = defaultdict(int)
    for size in sizes:
        counts[max(3, (size - 1).bit_length()) if size else 3] += 1
    for power in sorted(counts):
        bar = "█" * -(-BAR * counts[power] // max(counts.values()))
        yield f"  up to {2**power:>7}  {counts[power]:>7}  {bar}".rstrip()


def repeats(rows: list[list[Example]]) -> Iterator[str]:
    """Prompts that come more than once: with the same demonstration, and with different answers."""
    by_prompt: dict[int, list[Example]] = defaultdict(list)
    for row in rows:
        by_prompt[prompt_hash(row[-1])].append(row[-1])
    several = [group for group in by_prompt.values() if len(group) > 1]
    same = [g for g in several if len({(e.demonstration, e.answer) for e in g}) < len(g)]
    torn = [g for g in several if len({e.answer for e in g} - {None}) > 1]
    for groups, what in (
        (several, "prompts come more than once"),
        (same, "of them with the same demonstration and answer"),
        (torn, "of them with different answers"),
    ):
        if groups:
            yield f"{len(groups)} {what}, such as {' and '.join(each.where for each in groups[0][:2])}"


def leaks(rows: list[list[Example]], apart: list[list[Example]] | None) -> Iterator[str]:
    """Held-out prompts that are in the training file, exactly, which is put right, or but for spaces and signs."""
    train, held_out = sides(rows, apart)
    yield f"{len(train)} examples to train on, {len(held_out)} prompts held out"
    if not train:
        yield "nothing is left to train on: every prompt is held out"
    there = {prompt_hash(row[-1]): row[-1] for row in rows}
    if apart is not None:
        exact = [each for each in held_out if prompt_hash(each) in there]
        yield from examples_of(
            exact, there, "held-out prompts are in the training file too; it is trained without them"
        )
    near = {bare(each): each for each in train}
    alike = [each for each in held_out if bare(each) in near]
    other = {prompt_hash(each): near[bare(each)] for each in alike}
    yield from examples_of(alike, other, "held-out prompts differ from one of training by spaces, case or signs alone")


def examples_of(found: list[Example], other: dict[int, Example], what: str) -> Iterable[str]:
    return [f"{len(found)} {what}, such as {found[0].where} and {other[prompt_hash(found[0])].where}"] if found else []


def bare(example: Example) -> str:
    texts = ["".join(filter(str.isalnum, (turn["content"] or "").casefold())) for turn in example.messages]
    return json.dumps(texts if any(texts) else example.messages)
