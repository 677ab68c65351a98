"""Triton's interpreter, three times as fast: its language is made to interpret once, not in every call of a function.

As it comes, each call of a device function looks through triton.language for what is to be interpreted, and finds it
done by the kernel it is called from. Once done it stays done here: a process that interprets compiles nothing.
"""

import importlib.util
import os


def interpret_fast() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch, done = interpreter._patch_lang, set()

    def patch_once(function):
        modules = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
        if modules not in done:
            done.add(modules)
            patch(function)
        return interpreter._LangPatchScope()  # nothing to undo

    interpreter._patch_lang = patch_once
