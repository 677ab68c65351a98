"""The code that the README shows runs as written."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_run_in_order():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 2
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["out"].loss.isfinite() and names["hidden"].grad.isfinite().all()


def test_every_preset_is_named():
    import srft_kernels as sk

    text = README.read_text(encoding="utf-8")
    presets = [name for name in vars(sk.presets) if name in sk.__all__ and name.islower()]
    assert presets and all(f"`{name}`" in text for name in presets)
