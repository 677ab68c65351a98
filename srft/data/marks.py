"""The marks behind which an answer stands in a text: "#### 5", and \\boxed{5}."""

HASHES, BOXED = "####", "\\boxed{"


def inside_braces(text: str) -> str:
    """`text` up to the brace that closes the one before it."""
    depth = 1
    for index, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if not depth:
            return text[:index]
    return text


def boxed(text: str) -> str:
    """What is in the last \\boxed{}; "" where there is none."""
    return inside_braces(text.rpartition(BOXED)[2]).strip() if BOXED in text else ""
