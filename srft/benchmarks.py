"""`srft eval`: a model on benchmark sets from files, or on held-out prompts, as a table with intervals.

    [[eval.sets]]
    file = "aime24.jsonl"       # whatever data.train_file may be; columns as data/columns.py knows them
    name = "AIME 24"            # of its row; default: that of the file
    group = "maths"             # sets of one group have a mean; default: how they are graded
    samples = 32                # default: eval.samples
    prompts = 10                # the first so many; default: eval.set_prompts
    columns = {answer = "key"}  # as data.columns

Sets are graded by math-verify, multiple-choice questions by the letter. Each of their prompts counts, also one that is
there twice; a completion that cannot be graded, since math-verify hangs on it, counts as wrong.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from srft.config import Config
from srft.data import Example, Problem, Prompter, build_prompter, fit, load_examples, read_examples
from srft.errors import UserError, nearest
from srft.evaluate import Unscored, evaluate, evaluation_of, held_out_problems, measured_on, sampled, scorer_for
from srft.evaluation import Evaluation, aligned, interval_of_mean, notes, rows_of_tasks, shown
from srft.likelihood import demonstration_loss
from srft.metrics import mean
from srft.model import EMBEDDED, POSITIONS, load_model, load_tokenizer
from srft.rewards import Scorer, build_reward
from srft.rollout import Engine, build_engine
from srft.rundir import append_line, create_eval_dir, finite, write_whole
from srft.settings import to_toml

Results = list[tuple["Benchmark", Evaluation]]
CHUNK = 1024  # completions that are generated and scored before they are written


@dataclass(frozen=True)
class Benchmark:
    """A row of the table. choices: it is graded by the letter."""

    name: str
    group: str
    samples: int
    examples: list[Example]

    @property
    def count(self) -> str:
        return f"{len(self.examples)} prompts × {self.samples} samples"


def load_sets(config: Config) -> list[Benchmark]:
    """What eval.sets names; raises UserError for what is wrong in it, and with file and line for a broken row."""
    sets = [load_set(entry, f"eval.sets[{place}]", config) for place, entry in enumerate(config.eval.sets, 1)]
    names = [each.name for each in sets]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"eval.sets: two sets are called {twice[0]!r}; give one of them another name")
    return sets


def load_set(entry: str | dict[str, Any], where: str, config: Config) -> Benchmark:
    known: dict[str, Any] = {
        "file": (str, list),
        "name": str,
        "group": str,
        "samples": int,
        "prompts": int,
        "columns": dict,
    }
    entry = {"file": entry} if isinstance(entry, str) else dict(entry)
    for key, value in entry.items():
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, known)} (keys: {', '.join(known)})")
        if not isinstance(value, known[key]) or isinstance(value, bool) or (known[key] is int and value < 1):
            kinds = {int: "a whole number of 1 at least", dict: "a table", str: "text"}
            raise UserError(f"{where}: {key}: expected {kinds.get(known[key], 'the name of a file')}, found {value!r}")
    if not entry.get("file"):
        raise UserError(f"{where}: file: a value is needed")
    data = dataclasses.replace(config.data, columns=entry.get("columns", {}), turns="last")
    try:
        examples = [row[-1] for row in read_examples(entry["file"], data, "eval.sets")]
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    for each in examples:
        if each.answer is None:
            others = ", ".join(each.columns) or "none"
            raise UserError(
                f"{where}: {each.source}: no answer is known, so nothing can be graded (other columns: {others}); name "
                "the column that has it: columns = {answer = …}"
            )
    most = entry.get("prompts") or config.eval.set_prompts or None
    group = entry.get("group") or ("letter" if all(each.choices for each in examples) else "math-verify")
    name = entry.get("name") or examples[0].task
    return Benchmark(name, group, entry.get("samples", config.eval.samples), examples[:most])


def held_out_set(config: Config) -> Benchmark:
    """The held-out prompts of a run as the only set."""
    examples = load_examples(config.data, "eval", config.eval.prompts) if config.eval.prompts else []
    if not examples:
        raise UserError("eval.prompts: there is no held-out prompt to evaluate on")
    return Benchmark("held-out", "", config.eval.samples, examples)


def main_eval(config: Config, checkpoint: str | None = None) -> list[Evaluation]:
    """`srft eval` of `checkpoint` (a model's directory or name; default `model.path`): print and write the table.

    Everything is written as soon as it is known. Raises UserError for what is wrong before the model is loaded.
    """
    model = dataclasses.replace(config.model, path=checkpoint) if checkpoint else config.model
    check_checkpoint(checkpoint)
    option = "--checkpoint" if checkpoint else "model.path"
    sets = load_sets(config) or [held_out_set(config)]
    scorer = scorer_of(config, sets)
    tokenizer, positions = load_tokenizer(model, option)
    prompter = build_prompter(tokenizer, config.data)
    problems = [problems_of(config, prompter, each, scorer, positions) for each in sets]
    directory = create_eval_dir(config.eval.dir)
    loaded = load_model(model, option, tokenizer)
    engine = build_engine(config.rollout.engine, loaded)
    print(f"{', '.join(f'{each.name}: {each.count}' for each in sets)}; writing to {directory}", flush=True)
    write_whole(directory / "config.toml", to_toml(dataclasses.replace(config, model=model)))
    results: Results = []
    for benchmark, own in zip(sets, problems):
        loss = demonstration_loss(loaded, own, config.train.token_budget)  # none where a set has none of them
        try:
            measured = measure(engine, own, prompter, scorer, benchmark, config, loss, directory)
        except Unscored as error:
            if len(sets) == 1:
                raise
            print(f"warning: {benchmark.name} is left out: {error}", file=sys.stderr)
            continue
        results.append((benchmark, measured))
        write_scores(directory, model.path, config, results)
    if not results:
        raise Unscored("eval.sets: no completion of any set was scored; the warnings above say why")
    print("\n".join([*aligned(rows_of(results)), *notes_of(results)]))
    print(f"written: {directory / 'table.md'}" if config.eval.sets else json.dumps(as_json(model.path, results)))
    return [measured for _, measured in results]


def check_checkpoint(checkpoint: str | None) -> None:
    """Raise UserError for a slip of the pen in a path; asked for it, a hub's client would retry for half a minute."""
    if checkpoint not in (None, EMBEDDED) and Path(checkpoint).parent.is_dir() and not Path(checkpoint).exists():
        by_name = checkpoint.count("/") < 2 and not checkpoint.startswith((".", "/", "~"))
        advice = f"give one; a model of a hub is --model.path {checkpoint}" if by_name else "give one"
        raise UserError(f"--checkpoint {checkpoint!r}: there is no such directory; {advice}")


def scorer_of(config: Config, sets: Sequence[Benchmark]) -> Scorer | None:
    if not config.eval.sets:
        return scorer_for(build_reward(config.reward, config.data), config, sets[0].examples)
    return build_reward(dataclasses.replace(config.reward, name="math_verify", weights=[]), config.data)


def problems_of(
    config: Config, prompter: Prompter, benchmark: Benchmark, scorer: Scorer | None, positions: float
) -> list[Problem]:
    if not config.eval.sets:
        return held_out_problems(config, prompter, benchmark.examples, scorer, positions)
    generated = config.rollout.max_new_tokens
    return fit(prompter, benchmark.examples, config.data, False, {POSITIONS: positions}, generated)


def measure(
    engine: Engine,
    problems: list[Problem],
    prompter: Prompter,
    scorer: Scorer | None,
    benchmark: Benchmark,
    config: Config,
    loss: tuple[float, int],
    directory: Path,
) -> Evaluation:
    """One set. Its completions are written some at a time; how many that are does not change them."""
    settings = dataclasses.replace(config.eval, samples=benchmark.samples)
    generated = config.rollout.max_new_tokens
    if scorer is None:
        return evaluate(engine, problems, prompter, None, settings, generated, loss)
    size = max(1, CHUNK // benchmark.samples)
    generations: list[dict[str, Any]] = []
    with tqdm(total=len(problems), desc=benchmark.name, unit="prompt", leave=False, dynamic_ncols=True) as bar:
        for start in range(0, len(problems), size):
            chunk = problems[start : start + size]
            numbers = range(start, start + len(chunk))
            for each in sampled(engine, chunk, prompter, scorer, settings, generated, numbers=numbers):
                generations.append(each)
                append_line(directory / "generations.jsonl", {"set": benchmark.name, **each})
            bar.update(len(chunk))
    on = measured_on(problems, settings, generated)
    if not config.eval.sets:
        return evaluation_of(generations, scorer, settings, on, loss)
    scored = evaluation_of(generations, scorer, settings, on, loss).scored
    graded = [{**each, "rewards": [reward or 0.0 for reward in each["rewards"]]} for each in generations]
    return dataclasses.replace(evaluation_of(graded, scorer, settings, on, loss), scored=scored)


def write_scores(directory: Path, model: str, config: Config, results: Results) -> None:
    write_whole(directory / "scores.json", json.dumps(as_json(model, results), indent=1, ensure_ascii=False) + "\n")
    how = (
        f"{model}: temperature {config.eval.temperature:g}, top-p {config.eval.top_p:g}, at most "
        f"{config.rollout.max_new_tokens} tokens, seed {config.eval.seed}. Intervals are of 95 %, over prompts."
    )
    parts = [how, markdown(rows_of(results)), *notes_of(results)]
    write_whole(directory / "table.md", "\n\n".join(part for part in parts if part) + "\n")


def as_json(model: str, results: Results) -> dict[str, Any]:
    """Of held-out prompts their scores, else those of each set and the means of groups."""
    plain = [
        {name: value for name, value in measured.as_dict().items() if name != "generations"} for _, measured in results
    ]
    if not results[0][0].group:
        return finite({"model": model, **plain[0]})
    for scores in plain:
        if len(scores["tasks"]) == 1:
            del scores["tasks"]  # the set itself
    sets = [{"set": each.name, "group": each.group, **scores} for (each, _), scores in zip(results, plain)]
    return finite({"model": model, "sets": sets, "means": list(means_of(results))})


def means_of(results: Results) -> Iterator[dict[str, Any]]:
    """Of each group of several sets the mean of their avg@k, in which each set counts alike."""
    for group in dict.fromkeys(benchmark.group for benchmark, _ in results):
        own = [measured for benchmark, measured in results if benchmark.group == group]
        if len(own) > 1:
            rewards = [each.reward for each in own]
            interval = interval_of_mean(rewards, [each.interval for each in own])
            yield {"group": group, "sets": len(own), "reward": mean(rewards), "interval": interval}


def rows_of(results: Results) -> list[list[str]]:
    """The cells of the table: the sets of each group, and their mean; of held-out prompts their tasks."""
    if not results[0][0].group:
        return rows_of_tasks(results[0][1])
    rows = [["set", "prompts", "k", "avg@k", "95 %", "pass@k", "95 %", "finished", "tokens"]]
    means = {each["group"]: each for each in means_of(results)}
    for group in dict.fromkeys(benchmark.group for benchmark, _ in results):
        for benchmark, found in results:
            if benchmark.group == group:
                k = found.samples
                measured = [f"{found.reward:.3f}", shown(found.interval)]
                passed = [f"{found.pass_at[k]:.3f}", shown(found.pass_intervals[k])]
                ends = [f"{found.finished:.3f}", f"{found.tokens:.1f}"]
                rows.append([benchmark.name, str(found.prompts), str(k), *measured, *passed, *ends])
        if mean_of_group := means.get(group):
            cells = [f"{mean_of_group['reward']:.3f}", shown(mean_of_group["interval"])]
            rows.append([f"{group}: mean of {mean_of_group['sets']}", "", "", *cells, "", "", "", ""])
    return rows


def notes_of(results: Results) -> list[str]:
    """What is said below the table."""
    if not results[0][0].group:
        return notes(results[0][1])
    lines = [(benchmark.name, note) for benchmark, found in results for note in notes(found, "count as wrong")]
    return [f"{name}: {note}" for name, note in lines]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Nothing of no rows."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([*lines[:1], *["|---|" + "---:|" * (len(rows[0]) - 1) for _ in lines[:1]], *lines[1:]])
