"""Every case in its order, and the groups that are measured in a way of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .busy import NAMES as WAYS_TO_WAIT
from .busy import busy_case, measure_busy
from .cases import Case, cases
from .measure import Row
from .packing import NAMES as WAYS_TO_PACK
from .packing import measure_packing, packing_case
from .sharded import NAMES, measure_sharded, sharded_case
from .step import LOSSES, measure_step, step_case


class Group(NamedTuple):
    """measure: as `measure.measure`, but for case and providers, which it knows."""

    case: Callable[[str], Case]
    measure: Callable[..., list[Row]]
    providers: tuple[str, ...]


OWN = {
    "training step": Group(step_case, measure_step, tuple(LOSSES)),
    "packed rows": Group(packing_case, measure_packing, WAYS_TO_PACK),
    "beside busy programs": Group(busy_case, measure_busy, tuple(WAYS_TO_WAIT)),
    "sharded": Group(sharded_case, measure_sharded, NAMES),
}


def every_case(device: str) -> list[Case]:
    """Those of cases.py, and the groups of their own behind the first ones, which compare everybody."""
    found = cases(device)
    main = next((i for i, case in enumerate(found) if case.group == "masked batches"), len(found))
    return [*found[:main], *(group.case(device) for group in OWN.values()), *found[main:]]


def check_group(part: str, device: str) -> None:
    """ValueError where no group has this in its name: what is asked for would be measured by nobody."""
    groups = dict.fromkeys(case.group for case in every_case(device))
    if not any(part in group for group in groups):
        raise ValueError(f"--group {part!r} is in the name of no group of the bench: {', '.join(groups)}")
