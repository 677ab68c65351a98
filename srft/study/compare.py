"""`srft compare`: methods beside each other, as one table and one page, from runs, from a study, or from their records.

It writes into a directory of its own: index.html, table.md, comparison.json, and in runs/ the record of each run, from
which the same is made again where the runs themselves are not.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srft.errors import UserError
from srft.intervals import Crossed, shown
from srft.pages import require_packages
from srft.rundir import create_eval_dir, finite, write_whole
from srft.study.comparison import Cell, Column, Comparison, compare
from srft.study.matrix import BASE, load_study
from srft.study.page import page
from srft.study.record import Record, read_record, record_of, written
from srft.tables import aligned, markdown

RECORDS = "runs"


def main_compare(paths: Sequence[str], against: str = "", directory: str = "") -> Comparison:
    """`srft compare`: print the table and write the page. directory: where; default as `place` says."""
    require_packages("a page")
    records, missing = gathered(paths)
    comparison = compare(records, against)
    where = Path(directory).expanduser() if directory else place(paths)
    (where / RECORDS).mkdir(parents=True, exist_ok=True)
    for record in records:
        write_whole(where / RECORDS / f"{name_of(record)}.json", written(record))
    table = rows_of(comparison)
    notes = notes_of(comparison, missing)
    write_whole(
        where / "comparison.json", json.dumps(as_json(comparison, records), indent=1, ensure_ascii=False) + "\n"
    )
    write_whole(where / "table.md", "\n\n".join([markdown(table), *notes]) + "\n")
    write_whole(where / "index.html", page(comparison, where.resolve().name, table, notes))
    print("\n".join([*aligned(table), "", *notes, f"written: {where / 'index.html'}"]))
    return comparison


def name_of(record: Record) -> str:
    return BASE if record["method"] == BASE else f"{record['method']}-{record['seed']}"


# ---- where records come from


def gathered(paths: Sequence[str]) -> tuple[list[Record], list[str]]:
    """The records in their order, and what is not there yet."""
    records, missing = [], []
    for path in paths:
        if path.endswith(".toml"):
            for trial in load_study(path).trials:
                if trial.trained and trial.measured:
                    records.append({**record_of(trial.directory), "method": trial.method})
                else:
                    missing.append(trial.directory.name)
        else:
            records += of_path(Path(path).expanduser())
    return records, missing


def of_path(path: Path) -> list[Record]:
    """Of a run, of a record, or of all records of a comparison."""
    if path.suffix == ".json":
        return [read_record(path)]
    if not path.exists():
        raise UserError(f"{path}: there is no such run, study or record")
    if (path / RECORDS).is_dir() and not (path / "config.toml").is_file():
        try:
            order = json.loads((path / "comparison.json").read_text(encoding="utf-8"))["runs"]
        except (OSError, ValueError, KeyError):
            order = []
        files = sorted((path / RECORDS).glob("*.json"))
        files.sort(key=lambda file: order.index(file.stem) if file.stem in order else len(order))
        if files:
            return [read_record(file) for file in files]
    return [record_of(path)]


def place(paths: Sequence[str]) -> Path:
    """Of a study beside its runs; of records where they are; else comparisons/ and the time."""
    if len(paths) == 1 and paths[0].endswith(".toml"):
        return load_study(paths[0]).directory / "comparison"
    if len(paths) == 1 and (Path(paths[0]).expanduser() / RECORDS).is_dir():
        return Path(paths[0]).expanduser()
    return create_eval_dir("comparisons/{time}")


# ---- the table


def rows_of(comparison: Comparison) -> list[list[str]]:
    """The cells of the table, the methods in the order of what they came to."""
    outcome, against = comparison.outcome, comparison.against
    others = [each for each in beside(comparison) if each is not outcome]
    header = ["method", "seeds", outcome.score, "95 %", f"− {against}", "95 %", f"than {against}"]
    rows = [[*header, *(f"{each.name}" for each in others), "updates", "trained", "generated", "seconds"]]
    for method in comparison.ordered:
        cell = outcome.cells.get(method.name)
        more = [f"{each.cells[method.name].score.mean:.3f}" if method.name in each.cells else "–" for each in others]
        budget = [f"{value:,.0f}" for value in method.budget.values()]
        if method.name == BASE:
            budget = ["–"] * len(budget)
        seeds = "–" if method.name == BASE else str(len(method.runs))
        rows.append([method.name, seeds, *cells_of(cell), *more, *budget])
    return rows


def beside(comparison: Comparison) -> list[Column]:
    """What the table shows beside the outcome: avg@k of the other sets, or of groups of several, where there are."""
    averages = [each for each in comparison.columns if each.score.startswith("avg")]
    joined = [each for each in averages if each.score == "avg"]
    return joined or averages[1:3]


def cells_of(cell: Cell | None) -> list[str]:
    if cell is None:
        return ["–"] * 5
    own = [f"{cell.score.mean:.3f}", shown(cell.score.interval)]
    return [*own, *difference_of(cell.difference), cell.verdict]


def difference_of(difference: Crossed | None) -> list[str]:
    if difference is None:
        return ["", ""]
    low, high = difference.interval
    return [f"{difference.mean:+.3f}", f"{low:+.3f} … {high:+.3f}"]


def notes_of(comparison: Comparison, missing: Sequence[str]) -> list[str]:
    """What is said below the table."""
    outcome = comparison.outcome
    lines = [
        f"{outcome.score} of {outcome.prompts} prompts of {outcome.name}. Intervals of 95 % are over seeds and prompts "
        f"(differences to {comparison.against} paired by both). Trained and generated: tokens of a run; seconds: of "
        "its steps, without evaluations."
    ]
    seeds = {method.name: len(method.runs) for method in comparison.methods.values() if method.name != BASE}
    if few := [name for name, count in seeds.items() if count < 3 and max(seeds.values()) > 1]:
        told = "How much seeds differ is taken from all methods with several."
        lines.append(f"Fewer than three seeds: {', '.join(few)}. {told}")
    elif max(seeds.values()) == 1:
        lines.append(
            "One seed each: how much other seeds would differ is not known, and intervals are over prompts alone."
        )
    count = sum(1 for cell in outcome.cells.values() if cell.verdict)
    if count > 1:
        lines.append(f"Of {count} verdicts about equal methods one in 20 would be wrong by chance.")
    if missing:
        lines.append(f"Not finished: {', '.join(missing)}.")
    return [*lines, *(f"Made with {each}." for each in comparison.machines)]


def as_json(comparison: Comparison, records: Sequence[Record]) -> dict[str, Any]:
    """Every number of the page."""

    def plain(cell: Cell) -> dict[str, Any]:
        found = {"score": cell.score.mean, "interval": cell.score.interval}
        if cell.difference:
            found |= {"difference": cell.difference.mean, "difference_interval": cell.difference.interval}
            found |= {"verdict": cell.verdict}
        return found

    columns = [
        {
            "set": each.name,
            "score": each.score,
            "prompts": each.prompts,
            "methods": {name: plain(cell) for name, cell in each.cells.items()},
        }
        for each in comparison.columns
    ]
    methods = {name: {"seeds": sorted(method.runs), **method.budget} for name, method in comparison.methods.items()}
    runs = [name_of(record) for record in records]
    return finite({"against": comparison.against, "runs": runs, "methods": methods, "columns": columns})
