"""Demonstrations of which a part is wrong: the train file of wrong.toml.

python studies/wrong.py runs/wrong.jsonl        # 0.3 of them; another share is the second argument
"""

import dataclasses
import json
import random
import sys
from pathlib import Path

from srft.data import Example, load_examples
from srft.study import load_study


def wrong(example: Example, chance: random.Random) -> str:
    """Its demonstration, but for a result that is off by 1 to 9."""
    answer = str(int(example.answer) + chance.choice([-1, 1]) * chance.randint(1, 9))
    steps, _, _ = example.demonstration.rpartition(" = ")
    return f"{steps} = {answer}\n#### {answer}"


def main(file: str, share: str = "0.3") -> None:
    data = load_study(str(Path(__file__).with_name("chain_sum.toml"))).trials[0].config.data
    if not 0 <= (part := float(share)) <= 1:
        raise SystemExit(f"share: expected a number from 0 to 1, found {share}")
    chance = random.Random(0)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", encoding="utf-8") as out:
        for example in load_examples(dataclasses.replace(data, size=0, seed=0), "train"):
            shown = wrong(example, chance) if chance.random() < part else example.demonstration
            row = {"prompt": example.prompt, "demonstration": shown, "answer": example.answer}
            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
