"""`srft eval`: a model on benchmark sets, or on held-out prompts, as a table with intervals.

Sets of files are graded by math-verify, multiple-choice questions by the letter, sets of tasks by their own scorers. A
completion that cannot be graded, since math-verify hangs on it, counts as wrong.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from srft.benchmarks import Benchmark, load_sets
from srft.config import Config
from srft.data import Problem, Prompter, build_prompter, fit, load_examples
from srft.errors import UserError
from srft.evaluate import Unscored, evaluate, evaluation_of, held_out_problems, measured_on, sampled, scorer_for
from srft.evaluation import Evaluation, notes, rows_of_tasks
from srft.intervals import interval_of_mean, shown
from srft.learn.stages import parts_of
from srft.likelihood import demonstration_loss
from srft.metrics import mean
from srft.model import EMBEDDED, POSITIONS, load_model, load_tokenizer
from srft.rewards import Scorer, build_reward
from srft.rollout import Engine, build_engine
from srft.rundir import append_line, create_eval_dir, finite, write_whole
from srft.settings import to_toml
from srft.tables import aligned, markdown

Results = list[tuple[Benchmark, Evaluation]]
BATCHES = 4  # of eval.batch_size completions are generated and scored before they are written


def held_out_set(config: Config) -> Benchmark:
    """The held-out prompts of a run as the only set."""
    examples = load_examples(config.data, "eval", config.eval.prompts) if config.eval.prompts else []
    if not examples:
        raise UserError("eval.prompts: there is no held-out prompt to evaluate on")
    return Benchmark("held-out", "", config.eval.samples, examples, len(examples))


def main_eval(config: Config, checkpoint: str | None = None) -> list[Evaluation]:
    """`srft eval` of `checkpoint` (a model's directory or name; default `model.path`): print and write the table.

    Everything is written as soon as it is known. Raises UserError for what is wrong before the model is loaded.
    """
    model = dataclasses.replace(config.model, path=checkpoint or config.model.path, lora_rank=0)
    check_checkpoint(checkpoint)
    option = "--checkpoint" if checkpoint else "model.path"
    sets = load_sets(config) or [held_out_set(config)]
    scorers = scorers_of(config, sets)
    tokenizer, positions = load_tokenizer(model, option)
    prompter = build_prompter(tokenizer, config.data)
    problems = [problems_of(config, prompter, *each, positions) for each in zip(sets, scorers)]
    directory = create_eval_dir(config.eval.dir)
    loaded = load_model(model, option, tokenizer)
    engine = build_engine(config.rollout.engine, loaded)
    print(f"{', '.join(f'{each.name}: {each.count}' for each in sets)}; writing to {directory}", flush=True)
    write_whole(directory / "config.toml", to_toml(dataclasses.replace(config, model=model)))
    results: Results = []
    unscored: list[str] = []
    for benchmark, scorer, own in zip(sets, scorers, problems):
        loss = demonstration_loss(loaded, own, config.train.token_budget)  # none where a set has none of them
        try:
            measured = measure(engine, own, prompter, scorer, benchmark, config, loss, directory)
        except Unscored as error:
            if len(sets) == 1:
                raise
            unscored.append(f"{benchmark.name} is left out: {error}")
            print(f"warning: {unscored[-1]}", file=sys.stderr)
        else:
            results.append((benchmark, measured))
        if results:
            how = described(config, model.path, prompter.system_prompt)
            write_scores(directory, how, results, as_json(model.path, results, unscored), unscored)
    if not results:
        raise Unscored("eval.sets: no completion of any set was scored; the warnings above say why")
    print("\n".join([*aligned(rows_of(results)), *notes_of(results), *unscored]))
    print(f"written: {directory / 'table.md'}" if config.eval.sets else json.dumps(as_json(model.path, results)))
    return [measured for _, measured in results]


def check_checkpoint(checkpoint: str | None) -> None:
    """Raise UserError for a slip of the pen in a path; asked for it, a hub's client would retry for half a minute."""
    if checkpoint not in (None, EMBEDDED) and Path(checkpoint).parent.is_dir() and not Path(checkpoint).exists():
        by_name = checkpoint.count("/") < 2 and not checkpoint.startswith((".", "/", "~"))
        advice = f"give one; a model of a hub is --model.path {checkpoint}" if by_name else "give one"
        raise UserError(f"--checkpoint {checkpoint!r}: there is no such directory; {advice}")


def scorers_of(config: Config, sets: Sequence[Benchmark]) -> list[Scorer | None]:
    """What grades each set."""
    if not config.eval.sets:
        return [scorer_for(build_reward(config.reward, config.data), config, sets[0].examples)]
    verified = build_reward(dataclasses.replace(config.reward, name="math_verify", weights=[]), config.data)
    own = dataclasses.replace(config.reward, name="reasoning_gym", weights=[])
    told = config.data.system_prompt or ("" if config.data.train_file else None)  # as the prompter has it
    made = dataclasses.replace(config.data, train_file=None, eval_file=None, columns={}, system_prompt=told)
    return [
        verified
        if each.task_args is None
        else build_reward(own, dataclasses.replace(made, tasks=[each.examples[0].task], task_args=each.task_args))
        for each in sets
    ]


def problems_of(
    config: Config, prompter: Prompter, benchmark: Benchmark, scorer: Scorer | None, positions: float
) -> list[Problem]:
    if not config.eval.sets:
        return held_out_problems(config, prompter, benchmark.examples, scorer, positions, parts_of(config))
    # A question that is cut is another one.
    data = dataclasses.replace(config.data, overlong="drop" if benchmark.drops else "error")
    return fit(prompter, benchmark.examples, data, False, {POSITIONS: positions}, config.rollout.max_new_tokens)


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
    """One set. Its completions are written some at a time; how many that are does not change them.

    Those of held-out prompts are scored in one call, as in a run: a reward may compare them with each other.
    """
    temperature = config.eval.temperature if benchmark.temperature is None else benchmark.temperature
    settings = dataclasses.replace(config.eval, samples=benchmark.samples, temperature=temperature)
    generated = config.rollout.max_new_tokens
    if scorer is None:
        return evaluate(engine, problems, prompter, None, settings, generated, loss)
    size = max(1, BATCHES * settings.batch_size // benchmark.samples) if config.eval.sets else len(problems)
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


def described(config: Config, model: str, told: str | None) -> str:
    """How was measured. told: what the model is told before each prompt."""
    sampling = f"temperature {config.eval.temperature:g}, top-p {config.eval.top_p:g}, seed {config.eval.seed}"
    line = f"{model}: {sampling}, at most {config.rollout.max_new_tokens} tokens. Intervals are of 95 %, over prompts."
    return line + (f" The model is told: {' '.join(told.split())}" if told else "")


def write_scores(directory: Path, how: str, results: Results, scores: dict[str, Any], unscored: Sequence[str]) -> None:
    write_whole(directory / "scores.json", json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
    parts = [how, markdown(rows_of(results)), *notes_of(results), *unscored]
    write_whole(directory / "table.md", "\n\n".join(part for part in parts if part) + "\n")


def as_json(model: str, results: Results, unscored: Sequence[str] = ()) -> dict[str, Any]:
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
    left_out = {"left_out": list(unscored)} if unscored else {}
    return finite({"model": model, "sets": sets, "means": list(means_of(results)), **left_out})


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
    lines = []
    for benchmark, found in results:
        if benchmark.rows > found.prompts:
            left_out = f"{benchmark.rows - found.prompts} of {benchmark.rows} rows are left out"
            lines.append(f"{benchmark.name}: {left_out}, which are broken, without an answer, or too long")
        if benchmark.temperature is not None:
            lines.append(f"{benchmark.name}: temperature {benchmark.temperature:g}")
        lines += [f"{benchmark.name}: {note}" for note in notes(found, "count as wrong")]
    return lines
