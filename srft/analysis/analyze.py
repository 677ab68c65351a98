"""`srft analyze`: what training changed in models, as a page and as JSON."""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from srft.analysis.crossing import CrossEngine
from srft.analysis.distances import distances, plane
from srft.analysis.gradients import gradients
from srft.analysis.models import BASE, DEMONSTRATIONS, Subject, subjects
from srft.analysis.page import page, table_of
from srft.analysis.reading import Reading, read
from srft.analysis.shift import Shift, by_entropy, by_position, histogram, shift, summary
from srft.analysis.texts import TASK, Places, Set, Text, Written, learnable, places_of, texts_of, write
from srft.analysis.weights import changed, share
from srft.benchmarks import load_sets
from srft.config import Config, ModelConfig
from srft.data import Prompter, build_prompter, fit, load_examples
from srft.errors import UserError
from srft.eval import scorers_of
from srft.evaluate import scorer_for
from srft.model import POSITIONS, LoadedModel, load_model, load_tokenizer, merged
from srft.pages import require_packages
from srft.rewards import build_reward
from srft.rollout import build_engine
from srft.rundir import create_eval_dir, finite, write_whole
from srft.settings import to_toml
from srft.tables import aligned

MAPPED = 512  # tokens by which models are compared, each with each other
ROUNDING = 1e-5  # nats by which a model may differ from itself
OF_SETS = ("samples", "temperature", "group")  # what an entry of eval.sets may say, and one of analyze.others may not
SHOWN = 3  # prompts whose texts are shown


def main_analyze(config: Config, base: str, runs: Sequence[str]) -> dict[str, Any]:
    """Write index.html and analysis.json into config.analyze.dir; returns what is in the latter.

    Raises UserError for what is wrong before a model is loaded.
    """
    require_packages("a page")
    found = subjects(base, runs, config.analyze.checkpoints)
    tokenizers = [load_tokenizer(settings_of(config, each.path), "srft analyze") for each in found]
    check_tokens(found, [tokenizer for tokenizer, _ in tokenizers])
    prompter = build_prompter(tokenizers[0][0], config.data)
    sets = sets_of(config, prompter, min(positions for _, positions in tokenizers))
    directory = create_eval_dir(config.analyze.dir, "analyze.dir")
    write_whole(directory / "config.toml", to_toml(config))
    print(
        f"{', '.join(f'{each.name}: {len(each.problems)} prompts' for each in sets)}; writing to {directory}",
        flush=True,
    )
    result = Analysis(config, found, sets, prompter).result()
    write_whole(directory / "analysis.json", json.dumps(finite(result), ensure_ascii=False) + "\n")
    write_whole(directory / "index.html", page(directory.resolve().name, result))
    print("\n".join([*aligned(table_of(result)), f"written: {directory / 'index.html'}"]))
    return result


def settings_of(config: Config, path: str) -> ModelConfig:
    return dataclasses.replace(config.model, path=path, lora_rank=0)


def check_tokens(found: Sequence[Subject], tokenizers: Sequence[Any]) -> None:
    """Raise UserError where a token is not the same to all: what models say of it could not be compared."""
    for each, tokenizer in zip(found, tokenizers):
        if tokenizer.get_vocab() != tokenizers[0].get_vocab():
            raise UserError(
                f"{each.path}: its tokenizer is another one than that of {found[0].path}; take models of one"
            )


def sets_of(config: Config, prompter: Prompter, positions: float) -> list[Set]:
    """The held-out prompts of the run and the other tasks of analyze.others, with their demonstrations."""
    count = config.analyze.prompts
    examples = load_examples(config.data, "eval", count)
    if not examples:
        raise UserError("analyze.prompts: there is no held-out prompt to analyse")
    for number, each in enumerate(config.analyze.others, 1):
        if strange := [key for key in OF_SETS if isinstance(each, dict) and key in each]:
            raise UserError(f"analyze.others[{number}].{strange[0]}: all sets are sampled alike; leave it out")
    own = [] if config.data.train_file else config.data.tasks
    others = [each for each in config.analyze.others if isinstance(each, str) or each.get("task") not in own]
    asked = dataclasses.replace(config, eval=dataclasses.replace(config.eval, sets=others, set_prompts=count))
    benchmarks = load_sets(asked, "analyze.others")
    if any(each.name == TASK for each in benchmarks):
        raise UserError(f"analyze.others: {TASK!r} is what the run's own prompts are called; give the set another name")
    named = [(TASK, examples), *((each.name, each.examples) for each in benchmarks)]
    scorers = [scorer_for(build_reward(config.reward, config.data), config, examples)]
    scorers += scorers_of(asked, benchmarks) if benchmarks else []
    generated = config.rollout.max_new_tokens
    return [
        Set(name, fit(prompter, each, config.data, True, {POSITIONS: positions}, generated), scorer)
        for (name, each), scorer in zip(named, scorers)
    ]


class Analysis:
    """All that is found. Two models are loaded at a time: the base, and one that is compared with it."""

    def __init__(self, config: Config, found: Sequence[Subject], sets: Sequence[Set], prompter: Prompter):
        self.config, self.subjects, self.sets, self.prompter = config, found, sets, prompter
        self.budget = config.train.token_budget
        self.base = self.load(found[0].path)

    def load(self, path: str) -> LoadedModel:
        return merged(load_model(settings_of(self.config, path), path))

    def models(self) -> Iterator[tuple[Subject, LoadedModel]]:
        for each in self.subjects:
            yield each, self.base if each is self.subjects[0] else self.load(each.path)

    def result(self) -> dict[str, Any]:
        written: dict[tuple[str, str], Written] = {}
        found: dict[str, dict[str, Any]] = {}
        for each, loaded in self.models():
            print(f"{each.name}: writes", flush=True)
            engine = build_engine(self.config.rollout.engine, loaded)
            written |= {(each.name, own.name): write(engine, own, self.prompter, self.config) for own in self.sets}
            found[each.name] = {"path": each.path, **self.of_written(each, loaded, written)}
            del engine, loaded  # before the next is loaded
        texts = texts_of(self.sets, written, self.config.analyze.tokens)
        places = places_of(texts)
        (mapped,) = np.nonzero((places.set == TASK) & np.isin(places.writer, [DEMONSTRATIONS, BASE]))
        chosen = torch.arange(0, len(mapped), math.ceil(len(mapped) / MAPPED))  # evenly, of all texts
        base = read(self.base, [text.sequence for text in texts], self.budget)
        points: list[tuple[str, int | None, Reading]] = []
        for each, loaded in self.models():
            print(f"{each.name}: is read", flush=True)
            reading = base if loaded is self.base else read(loaded, [text.sequence for text in texts], self.budget)
            own = shift(base, reading)
            counts = changed(self.base.model, loaded.model)
            found[each.name] |= self.of_shift(each, own, places, texts)
            found[each.name]["weights"] = counts and {"share": share(counts), "matrices": counts}
            found[each.name]["crossing"] = list(self.crossed(each, loaded, own, places, written))
            last = reading.of(torch.from_numpy(mapped)[chosen].to(reading.hidden.device))
            del loaded, reading, own
            points += [
                (each.name, step, self.read_mapped(path, texts, chosen)) for step, path in each.checkpoints.items()
            ]
            points.append((each.name, None, last))
        sets = {each.name: len(each.problems) for each in self.sets}
        sampled = {"samples": self.config.analyze.samples, "temperature": self.config.eval.temperature}
        print(f"map: {len(points)} models and checkpoints, each with each", flush=True)
        return {"sets": sets, "sampled": sampled, "models": found, "map": self.map(points)}

    def of_written(self, each: Subject, loaded: LoadedModel, written: dict[tuple[str, str], Written]) -> dict[str, Any]:
        """Rewards of its completions, and what gradients they have beside demonstrations."""
        own = {of_set.name: written[each.name, of_set.name] for of_set in self.sets}
        rewards = {name: {"reward": of_set.reward, "interval": of_set.interval} for name, of_set in own.items()}
        sequences = learnable(own[TASK], self.config)
        of_task = gradients(loaded, sequences, self.config.rollout.temperature, self.budget)
        return {"rewards": rewards, "gradients": {**vars(of_task), "share": of_task.share}}

    def of_shift(self, each: Subject, own: Shift, places: Places, texts: Sequence[Text]) -> dict[str, Any]:
        """Means by set and writer, figures of the task, and some texts with the change of each token."""
        means: dict[str, dict[str, Any]] = {}
        histograms = {}
        for name, writer in dict.fromkeys((text.set, text.writer) for text in texts):
            where = (places.set == name) & (places.writer == writer)
            means.setdefault(name, {})[writer] = summary(own.of(where), places.text[where])
            if name == TASK and writer in (DEMONSTRATIONS, BASE, each.name):
                histograms["own" if writer == each.name else writer] = histogram(own.change[where])
        task = (places.set == TASK) & np.isin(places.writer, [DEMONSTRATIONS, BASE, each.name])
        return {
            "shift": means,
            "histograms": histograms,
            "by_position": by_position(own.change[task], places.position[task]),
            "by_entropy": by_entropy(own.change[task], own.before[task]),
            "texts": list(self.shown(each, own, places, texts)),
        }

    def shown(self, each: Subject, own: Shift, places: Places, texts: Sequence[Text]) -> Iterator[dict[str, Any]]:
        """Its own completions of a few prompts and their demonstrations, token by token."""
        prompts = [id(problem) for problem in self.sets[0].problems[:SHOWN]]
        for number, text in enumerate(texts):
            if text.writer not in (DEMONSTRATIONS, each.name) or id(text.problem) not in prompts:
                continue
            where = places.text == number
            pieces = pieces_of(self.prompter.tokenizer, text.tokens)
            changes = [round(float(change), 3) for change in own.change[where]]
            yield {
                "prompt": text.problem.example.messages[-1]["content"],
                "writer": text.writer,
                "reward": text.reward,
                "tokens": list(zip(pieces, changes)),
            }

    def crossed(
        self, each: Subject, loaded: LoadedModel, own: Shift, places: Places, written: dict[tuple[str, str], Written]
    ) -> Iterator[dict[str, Any]]:
        """Rewards of the base with a share of the model's tokens, and of the model with a share of the base's."""
        task = self.sets[0]
        if task.scorer is None or loaded is self.base or not self.config.analyze.shares:
            return
        js = own.js[(places.set == TASK) & np.isin(places.writer, [BASE, each.name])]
        ends = written[BASE, TASK], written[each.name, TASK]
        for writer, models, (none, all_) in (
            (BASE, (self.base, loaded), ends),
            (each.name, (loaded, self.base), ends[::-1]),
        ):
            yield {"writer": writer, "swapped": 0.0, "reward": none.reward, "interval": none.interval}
            for part in sorted(set(self.config.analyze.shares)):
                print(f"{each.name}: {part:.0%} of the tokens swapped with {BASE}, {writer} writes", flush=True)
                engine = CrossEngine(*models, max(float(np.quantile(js, 1 - part)), ROUNDING))
                found = write(engine, task, self.prompter, self.config)
                swapped = engine.swapped / engine.tokens
                yield {"writer": writer, "swapped": swapped, "reward": found.reward, "interval": found.interval}
            yield {"writer": writer, "swapped": 1.0, "reward": all_.reward, "interval": all_.interval}

    def read_mapped(self, path: str, texts: Sequence[Text], chosen: torch.Tensor) -> Reading:
        """What a checkpoint says of the tokens of the map."""
        kept = [text for text in texts if text.set == TASK and text.writer in (DEMONSTRATIONS, BASE)]
        reading = read(self.load(path), [text.sequence for text in kept], self.budget)
        return reading.of(chosen.to(reading.hidden.device))

    def map(self, points: Sequence[tuple[str, int | None, Reading]]) -> dict[str, Any]:
        """Where each model is; the base is the first and the origin."""
        squares = distances([reading for *_, reading in points])
        places, shown = plane(squares)
        of_points = [
            {"model": name, "step": step, "x": float(x), "y": float(y), "js": float(square)}
            for (name, step, _), (x, y), square in zip(points, places, squares[0])
        ]
        return {"points": of_points, "shown": shown}


def pieces_of(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text of each token; of a character that is several, with the last of them."""
    pieces, begun = [], 0
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:end])
        whole = end == len(tokens) or not text.endswith("\ufffd")
        pieces.append(text[begun:] if whole else "")
        begun = len(text) if whole else begun
    return pieces
