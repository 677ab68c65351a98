"""report.html: one self-contained page about a run, made from the files in its directory alone.

Curves are SVG drawn by matplotlib, written into the page; nothing is fetched when it is opened.
"""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from srft.errors import UserError
from srft.evaluation import Evaluation
from srft.health import health
from srft.metrics import DESCRIPTIONS
from srft.pages import render, require_packages, svg
from srft.rundir import read_jsonl, read_status, write_whole
from srft.settings import toml_loads

Lines = dict[str, list[tuple[float, float]]]

# Title, the keys drawn in it, and what the y axis shows. Keys that a run does not have are left out.
FIRST = [
    ("Entropy", ["demo_entropy", "rollout_entropy"], "nats"),
    ("Weights", ["demo_weight", "rollout_weight"], "coefficients included"),
    ("Entropy weights", ["demo_entropy_weight", "rollout_entropy_weight"], ""),
]
CURVES = [
    ("Reward of the rollouts", ["reward_mean", "reward_demo", "informative"], ""),
    ("Loss", ["loss"], ""),
    ("Parts of the loss", ["demo_sft_loss", "demo_rl_loss", "rollout_loss"], "mean per token"),
    ("Length of a rollout", ["response_tokens"], "tokens"),
    ("Gradient norm", ["grad_norm"], ""),
    ("Learning rate", ["learning_rate"], ""),
    ("Drift from the sampling policy", ["clip_fraction", "approx_kl"], ""),
    ("Seconds per step", ["seconds_rollout", "seconds_train"], "s"),
]
SHOWN_PROMPTS = 8


def build(run_dir: Path) -> Path:
    """Write `run_dir/report.html` and return its path. Raises UserError where there is no run to report on."""
    run_dir = Path(run_dir)
    write_whole(run_dir / "report.html", html(run_dir))
    return run_dir / "report.html"


def html(run_dir: Path, live: str = "") -> str:
    """The page. live: what is written so far, where a server shows it anew when that changes (watch.py)."""
    if not (run_dir / "config.toml").is_file():
        raise UserError(f"{run_dir}: there is no config.toml in it, so it is not the directory of a run")
    require_packages("report.html")
    config = (run_dir / "config.toml").read_text(encoding="utf-8")
    steps = read_jsonl(run_dir / "metrics.jsonl")
    evaluations = [{"loss": None, **each} for each in read_jsonl(run_dir / "evaluation.jsonl")]
    evaluations = [e for e in evaluations if Evaluation.of(e).comparable(Evaluation.of(evaluations[-1]))]
    older = next((each.name for each in run_dir.glob("interrupted-*")), None)
    return render(
        "report.html",
        live=live,
        now=time.strftime("%H:%M:%S"),
        health=health(steps),
        name=run_dir.resolve().name,
        steps=steps,
        first=evaluations[0] if evaluations else None,
        last=evaluations[-1] if len(evaluations) > 1 else None,
        stages=stages(config, steps, evaluations),
        curves=curves(steps, evaluations),
        pairs=pairs(evaluations),
        stopped=stopped(read_status(run_dir), len(steps)),
        model=older,
        totals=totals(steps),
        descriptions=DESCRIPTIONS,
        samples=read_jsonl(run_dir / "samples.jsonl")[-12:],
        config=config,
    )


def stopped(status: dict[str, Any] | None, logged: int) -> str:
    """Why and where the run stopped; nothing of one that finished.   logged: steps in metrics.jsonl."""
    if not status or status["state"] == "finished":
        return ""
    step = status["step"] if status["state"] != "running" else max(logged, status["step"])
    where = f"after step {step} of {status['steps']}" if step else "before its first step"
    if status["state"] == "running":
        return f"still running, or killed without a word, {where}"
    by = f"by {status['reason']}" if status["state"] == "interrupted" else f"by an error: {status['reason']}"
    return f"stopped {where} {by}" + (f"; {status['resume']} goes on" if status["resume"] else "")


def stages(config: str, steps: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a run of several stages those that began: name, first and last step, and what they took and came to."""
    try:
        entries = toml_loads(config).get("train", {}).get("stages", [])
    except ValueError:  # somebody has written into it
        entries = []
    names = [each.get("name", "") if isinstance(each, dict) else each for each in entries]
    measured = {each["step"]: each for each in evaluations}
    rows = []
    for number, name in enumerate(names, 1):
        own = [each for each in steps if each.get("stage") == number]
        if own:
            first, last = own[0]["step"], own[-1]["step"]
            before, after = measured.get(first - 1), measured.get(last)
            rows.append(totals(own) | {"name": name, "first": first, "last": last, "before": before, "after": after})
    return rows


def changes_of_stage(steps: list[dict[str, Any]]) -> list[float]:
    """Where curves show that another stage begins."""
    return [b["step"] - 0.5 for a, b in itertools.pairwise(steps) if a.get("stage") != b.get("stage")]


def totals(steps: list[dict[str, Any]]) -> dict[str, str]:
    """What the training steps took, all together."""
    if not steps:
        return {}

    def total(key: str) -> float:
        return sum(step.get(key) or 0 for step in steps)

    rolled_out, demonstrated = total("rollout_tokens"), total("demo_tokens")
    known = {  # what there was none of is not shown
        "steps": str(len(steps)),
        "rollout": rolled_out and f"{total('seconds_rollout'):.0f} s",
        "training": f"{total('seconds_train'):.0f} s",
        "rollout tokens": rolled_out and f"{rolled_out:,.0f}",
        "demonstration tokens": demonstrated and f"{demonstrated:,.0f}",
        "peak memory": f"{max(step.get('peak_memory_mb') or 0 for step in steps):,.0f} MB",
    }
    return {name: text for name, text in known.items() if text}


def pairs(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For some held-out prompts, the first completion before and after training."""
    if not evaluations:
        return []
    before, after = evaluations[0]["generations"], evaluations[-1]["generations"]
    sides = [{"before": b, "after": a if len(evaluations) > 1 else None} for b, a in zip(before, after)]
    stride = max(1, len(sides) // SHOWN_PROMPTS)  # tasks follow one another: show some of each
    return sides[::stride][:SHOWN_PROMPTS]


def curves(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> list[dict[str, str]]:
    """[{title, svg}]; a figure with nothing in it is left out."""
    figures, changes = list(lines_of(FIRST, steps)), changes_of_stage(steps)
    if len(evaluations) > 1:
        for title, key, unit in (("Held-out reward", "reward", ""), ("Held-out loss", "loss", "nats per token")):
            points = [(each["step"], each[key]) for each in evaluations if each[key] is not None]
            figures.append((title, {title.lower(): points} if points else {}, unit))
    figures += lines_of(CURVES, steps)
    return [{"title": title, "svg": svg(title, lines, unit, changes)} for title, lines, unit in figures if lines]


def lines_of(curves: list[tuple[str, list[str], str]], steps: list[dict[str, Any]]) -> Iterator[tuple[str, Lines, str]]:
    """Title, lines that have something in them, and unit of each figure."""
    for title, keys, unit in curves:
        lines = {
            key.replace("_", " "): [(step["step"], step[key]) for step in steps if step.get(key) is not None]
            for key in keys
        }
        yield title, {name: points for name, points in lines.items() if points}, unit
