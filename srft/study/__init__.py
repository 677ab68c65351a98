"""Studies: the same job by several methods and seeds, and methods beside each other.

matrix.py      STUDY.toml: which runs there are, in which order
runs.py        `srft study`: one after the other, each measured; what is finished is skipped
record.py      what is kept of a run to compare it
comparison.py  scores with intervals, differences, budgets and curves of methods
compare.py     `srft compare`: the table, and the files; page.py and compare.html: the page
"""

from srft.study.compare import main_compare
from srft.study.matrix import load_study
from srft.study.runs import run_study

__all__ = ["load_study", "main_compare", "run_study"]
