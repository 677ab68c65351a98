"""Examples from files: rows.py reads them, columns.py knows what their columns are.

for examples in read_examples("train.jsonl", config.data): …      # those of one row, of its last turn at the end
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from srft.config import DataConfig
from srft.data.columns import ALIASES, Columns
from srft.data.examples import Example
from srft.data.rows import Row, files_of, read_rows
from srft.errors import UserError, nearest


@dataclass
class Reading:
    """What was read.

    examples: those of each row.   broken: the errors of broken rows.   columns: how many rows have each column.
    uses: of each part of an example, how many rows have it from which column.
    """

    examples: list[list[Example]] = field(default_factory=list)
    broken: list[UserError] = field(default_factory=list)
    uses: dict[str, Counter] = field(default_factory=dict)
    columns: Counter = field(default_factory=Counter)

    @property
    def renamed(self) -> str:
        """Which columns were taken for what, where by other names than our own: "demonstration from 'solution'"."""
        return "; ".join(
            f"{name} from {' and '.join(map(repr, self.uses[name]))}"
            for name in ALIASES
            if name in self.uses and not set(self.uses[name]) <= {name, "messages"}
        )


def names(files: str | list[str]) -> list[str]:
    return [files] if isinstance(files, str) else list(files)


def digest_of_files(config: DataConfig) -> str:
    """A text that is the same for the same bytes; "" where there are none, as of tasks and of what a hub holds."""
    found, read = hashlib.sha256(), False
    for option in ("train_file", "eval_file"):
        for name in names(getattr(config, option) or []):
            for file in files_of(name, f"data.{option}")[0]:
                if read:  # where one ends and the next begins
                    found.update(f"\0{option}\0".encode())
                with open(file, "rb") as stream:
                    while block := stream.read(1 << 20):
                        found.update(block)
                        read = True
    return found.hexdigest()[:16] if read else ""


def rows_of(files: str | list[str], option: str = "data.train_file") -> Iterator[Row]:
    for each in names(files):
        yield from read_rows(each, option)


def read_all(files: str | list[str], config: DataConfig, option: str = "data.train_file") -> Reading:
    """Every row of the files, broken ones collected; raises UserError for a file that cannot be read."""
    columns, reading = Columns(config.columns, config.turns, config.choice_seed), Reading()
    for row in rows_of(files, option):
        try:
            taken = columns.taken(row)
            reading.examples.append(columns.examples(row, taken))
        except UserError as error:
            reading.broken.append(error)
            continue
        reading.columns.update(map(str, row.value))
        for name, column in taken.items():
            reading.uses.setdefault(name, Counter())[column] += 1
            reading.columns[column] += column not in row.value  # a column within a table
    return reading


def read_examples(files: str | list[str], config: DataConfig, option: str = "data.train_file") -> list[list[Example]]:
    """The examples of each row, in the order of the files.

    A broken row is refused with file and line, or with data.broken = "drop" left out with a warning. Prints which
    columns were taken for what, where by other names than ours.
    """
    reading = read_all(files, config, option)
    shown = ", ".join(names(files))
    if reading.broken and (config.broken == "error" or not reading.examples):
        more = f" (the first of {len(reading.broken)} broken rows; `srft data check` names all)"
        raise UserError(f"{reading.broken[0]}{more if len(reading.broken) > 1 else ''}") from reading.broken[0]
    if reading.renamed:
        print(f"{shown}: {reading.renamed}")
    if reading.broken:
        found = f"{len(reading.broken)} of {len(reading.examples) + len(reading.broken)} rows are broken and left out"
        print(f"warning: {shown}: {found}, the first: {reading.broken[0]}", file=sys.stderr)
    for name, column in config.columns.items():
        if column and option != "data.eval_file" and not reading.columns[column]:
            there = ", ".join(reading.columns)
            raise UserError(
                f"{shown}: data.columns.{name}: no row has a column {column!r}{nearest(column, reading.columns)}; "
                f"found columns: {there}"
            )
    return reading.examples
