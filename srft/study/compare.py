"""`srft compare`: methods beside each other, as one table and one page, from runs, from a study, or from their records.

It writes into a directory of its own: index.html, table.md, comparison.json, and in runs/ the record of each run, from
which the same is made again where the runs themselves are not.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srft.errors import UserError
from srft.intervals import Crossed, shown, shown_signed
from srft.pages import require_packages
from srft.rundir import finite, named, read_status, write_whole
from srft.study.comparison import Cell, Column, Comparison, compare
from srft.study.matrix import BASE, directory_of, load_study
from srft.study.page import page
from srft.study.record import Record, is_base, is_run, read_record, record_of, written
from srft.study.runs import check_unchanged
from srft.tables import aligned, markdown

RECORDS, NUMBERS = "runs", "comparison.json"
COMPARISON = "comparison"  # where that of a study is, beside its runs


def main_compare(paths: Sequence[str], against: str = "", directory: str = "") -> Comparison:
    """`srft compare`: print the table and write the page.

    against: a method; default: of a comparison's directory what it was against, else the first method.
    directory: where to write; default as `place` says.
    """
    require_packages("a page")
    where = place(paths, directory)
    records, missing = gathered(paths)
    if not against and len(paths) == 1 and Path(paths[0]).is_dir():
        against = known(Path(paths[0])).get("against", "")
    comparison = compare(records, against)
    table, notes = rows_of(comparison), notes_of(comparison, missing)
    html = page(comparison, where.resolve().name, table, notes)
    (where / RECORDS).mkdir(parents=True, exist_ok=True)
    if [where] != [*map(Path, paths)]:  # there they are already
        for record in records:
            write_whole(where / RECORDS / f"{name_of(record)}.json", written(record))
    runs = [name_of(record) for record in records]
    numbers = json.dumps(as_json(comparison, runs, missing), indent=1, ensure_ascii=False)
    write_whole(where / NUMBERS, numbers + "\n")
    write_whole(where / "table.md", "\n\n".join([markdown(table), *notes]) + "\n")
    write_whole(where / "index.html", html)
    print("\n".join([*aligned(table), "", *notes, f"written: {where / 'index.html'}"]))
    return comparison


def name_of(record: Record) -> str:
    return BASE if record["method"] == BASE else f"{record['method']}-{record['seed']}"


# ---- where records come from


def gathered(paths: Sequence[str]) -> tuple[list[Record], list[str]]:
    """The records in their order, and what is not there yet. Methods of several studies have the study's name first."""
    groups, missing = [], []
    for path in map(Path, paths):
        found, lacking = of_path(path.expanduser())
        groups.append((path, found))
        missing += lacking
    several = [path for path, _ in groups if not is_one(path.expanduser())]
    if len(several) > 1:
        labels = labels_of(several)
        groups = [(path, [renamed(record, labels.get(path, "")) for record in found]) for path, found in groups]
    records = [record for _, found in groups for record in found]
    bases = [record for record in records if record["method"] == BASE]
    if any(base["sets"] != bases[0]["sets"] for base in bases):
        raise UserError(f"{' '.join(paths)}: their bases are not the same model, or were measured in different ways")
    return [record for record in records if record["method"] != BASE or record is bases[0]], missing


def is_one(path: Path) -> bool:
    """Is it a run, or the record of one? Else it is of several."""
    return path.suffix == ".json" or is_run(path) or is_base(path)


def labels_of(paths: Sequence[Path]) -> dict[Path, str]:
    """What tells studies from each other: the last part of their paths that differs, else their numbers too."""
    if len({path.expanduser().resolve() for path in paths}) < len(paths):
        raise UserError(f"{' '.join(map(str, paths))}: the same twice; name each once")
    named = {path: path.expanduser().absolute() for path in paths}
    parts = {path: (each.parent if each.name == COMPARISON else each).parts for path, each in named.items()}
    for place in range(1, min(map(len, parts.values()))):
        labels = {path: each[-place].removesuffix(".toml").lstrip(".") for path, each in parts.items()}
        if len({*labels.values()}) == len(paths):
            return labels
    return {path: f"{number}-{path.stem.lstrip('.')}" for number, path in enumerate(paths, 1)}


def renamed(record: Record, study: str) -> Record:
    return record if record["method"] == BASE or not study else {**record, "method": f"{study}.{record['method']}"}


def of_path(path: Path) -> tuple[list[Record], list[str]]:
    """Of a study, a run, a record, or all records of a comparison; and what of it is not there yet."""
    if path.suffix == ".toml":
        study = load_study(str(path))
        trials = study.trials
        try:
            check_unchanged(trials)
        except UserError as error:
            raise UserError(f"{error}; as it was run: srft compare {study.directory}") from error
        done = [trial for trial in trials if trial.trained and trial.measured]
        missing = [trial.directory.name for trial in trials if trial not in done]
        return [{**record_of(each.directory, each.config), "method": each.method} for each in done], missing
    if path.suffix == ".json":
        return [read_record(path)], []
    if not path.exists():
        raise UserError(f"{path}: there is no such run, study or record")
    if (path / NUMBERS).is_file():
        before = known(path)
        found = [read_record(path / RECORDS / f"{name}.json") for name in before["runs"]]
        return found, before.get("missing", [])
    if path.is_dir() and not is_run(path) and not is_base(path):
        inside = sorted(each for each in path.iterdir() if is_run(each) or is_base(each))
        done = [each for each in inside if is_base(each) or (read_status(each) or {}).get("state") == "finished"]
        if done:
            return [record_of(each) for each in done], [each.name for each in inside if each not in done]
    return [record_of(path)], []


def known(directory: Path) -> dict[str, Any]:
    """What an earlier comparison wrote there; nothing where none did."""
    try:
        found = json.loads((directory / NUMBERS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / NUMBERS}: cannot be read: {error}") from error
    kinds = {"missing": list, "against": str}
    fits = isinstance(found, dict) and isinstance(found.get("runs"), list)
    if not fits or any(not isinstance(found.get(key, kind()), kind) for key, kind in kinds.items()):
        raise UserError(f"{directory / NUMBERS}: expected what srft compare wrote, with runs and missing as lists")
    return found


def place(paths: Sequence[str], directory: str) -> Path:
    """A directory to write into: of a study beside its runs, of a comparison there; else comparisons/ and the time.

    Raises UserError where it holds anything that this command did not write.
    """
    first = Path(paths[0]).expanduser()
    if directory:
        where = named(directory, "--dir")
    elif len(paths) == 1 and first.suffix == ".toml":
        where = directory_of(paths[0]) / COMPARISON
    elif len(paths) == 1 and (first / NUMBERS).is_file():
        where = first
    else:
        where = named("comparisons/{time}", "--dir")
    if where.exists() and not where.is_dir():
        raise UserError(f"--dir: {where} is a file; name a directory")
    if where.is_dir() and any(where.iterdir()) and not (where / NUMBERS).is_file():
        raise UserError(f"--dir: {where} is not empty, and no comparison is in it; name another directory")
    return where


# ---- the table


def rows_of(comparison: Comparison) -> list[list[str]]:
    """The cells of the table, the methods in the order of what they came to."""
    outcome, against = comparison.outcome, comparison.against
    others, cells = beside(comparison), outcome.cells(against)
    means = [{name: each.score.mean for name, each in column.cells(against).items()} for column in others]
    header = ["method", "seeds", outcome.score, "95 %", f"− {against}", "95 %", f"than {against}"]
    rows = [[*header, *(f"{each.name}" for each in others), "updates", "trained", "generated", "seconds"]]
    for method in comparison.ordered:
        cell = cells.get(method.name)
        more = [f"{each[method.name]:.3f}" if method.name in each else "–" for each in means]
        known = method.name != BASE
        budget = [f"{n:,.0f}" if known and not math.isnan(n) else "–" for n in method.budget.values()]
        seeds = "–" if method.name == BASE else str(len(method.runs))
        rows.append([method.name, seeds, *cells_of(cell), *more, *budget])
    return rows


def beside(comparison: Comparison) -> list[Column]:
    """What the table shows beside the outcome: avg@k of the other sets, or of groups of several, where there are."""
    averages = [each for each in comparison.columns if each.score.startswith("avg")]
    joined = [each for each in averages if each.score == "avg"]
    return joined or [each for each in averages if each is not comparison.outcome][:2]


def cells_of(cell: Cell | None) -> list[str]:
    if cell is None:
        return ["–"] * 5
    own = [f"{cell.score.mean:.3f}", shown(cell.score.interval)]
    return [*own, *difference_of(cell.difference), cell.verdict]


def difference_of(difference: Crossed | None) -> list[str]:
    if difference is None:
        return ["", ""]
    return [f"{difference.mean:+.3f}", shown_signed(difference.interval)]


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
    count = sum(1 for cell in outcome.cells(comparison.against).values() if cell.verdict)
    if count > 1:
        lines.append(f"Of {count} verdicts about equal methods one in 20 would be wrong by chance.")
    if missing:
        lines.append(f"Not finished: {', '.join(missing)}.")
    lines += comparison.remarks
    return [*lines, *(f"Made with {each}." for each in comparison.machines)]


def as_json(comparison: Comparison, runs: Sequence[str], missing: Sequence[str]) -> dict[str, Any]:
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
            "methods": {name: plain(cell) for name, cell in each.cells(comparison.against).items()},
        }
        for each in comparison.columns
    ]
    methods = {name: {"seeds": sorted(method.runs), **method.budget} for name, method in comparison.methods.items()}
    told = {"against": comparison.against, "runs": runs, "missing": missing}
    return finite({**told, "methods": methods, "columns": columns})
