"""The one exception that means "what you gave cannot work, and here is what to do"."""

import difflib
import errno
from collections.abc import Collection, Iterable


class UserError(Exception):
    """A wrong input. The message names the argument or file:line, what was found, what was expected and what to do.

    The command line prints the message without a traceback and exits with 2.
    """


def missing(package: str, purpose: str = "", extra: str = "train") -> UserError:
    """The error for an optional package that is not installed: `raise missing("gguf", "this file") from error`."""
    needed = f" for {purpose}" if purpose else ""
    return UserError(f"the package {package!r} is needed{needed}: pip install 'srft-kernels[{extra}]'")


def check_known(table: Iterable[str], keys: Collection[str], where: str) -> None:
    """Raise UserError, beginning with `where`, for a key of a table that is not one of `keys`."""
    for key in table:
        if key not in keys:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, keys)} (keys: {', '.join(keys)})")


def nearest(name: str, known: Iterable[str], count: int = 1) -> str:
    """`"; did you mean 'x'?"` with the `count` known names closest to `name`, or nothing when none is close."""
    known = list(known)
    begun = [each for each in known if len(name) > 2 and each.lower().startswith(name.lower())]
    close = begun[:count] or difflib.get_close_matches(name, known, count, cutoff=0.55)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def first_line(error: BaseException) -> str:
    """The first line of another library's message, to be quoted; the error's type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def disk_full(error: BaseException) -> str:
    """What to do about it, as the end of a sentence, where the error says that a disk or a quota is full; else ""."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if not full and not any(words in str(error) for words in ("No space left", "quota exceeded")):
        return ""
    return "; the disk is full: free some of it, or keep less with run.keep_checkpoints"
