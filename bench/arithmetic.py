"""Writes the shipped arithmetic questions: `python bench/arithmetic.py > src/lowdim/assets/arithmetic/questions.jsonl`."""

from __future__ import annotations

import json
import random

ROWS, SEED = 400, 0
NAMES = ("Tom", "Lily", "Max", "Mia", "Ben", "Sara", "Tim", "Anna")
THINGS = ("apples", "toys", "balls", "books", "cars", "dolls", "cookies", "stones")


def question(draw: random.Random) -> dict[str, str]:
    """A question about a sum or a difference below ten, and its answer."""
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    if draw.random() < 0.5:
        first = draw.randint(1, 8)
        second = draw.randint(1, 9 - first)
        asked, sign, result = f"{name} has {first} {thing} and gets {second} more.", "+", first + second
    else:
        first = draw.randint(2, 9)
        second = draw.randint(1, first - 1)
        asked, sign, result = f"{name} has {first} {thing} and gives {second} away.", "-", first - second
    return {
        "question": f"{asked} How many {thing} does {name} have now?",
        "answer": f"{first} {sign} {second} = {result}\n#### {result}",
    }


def main() -> None:
    """Print the questions, each once."""
    draw = random.Random(SEED)
    rows: dict[str, str] = {}
    while len(rows) < ROWS:
        rows.update([tuple(question(draw).values())])
    for asked, answer in rows.items():
        print(json.dumps({"question": asked, "answer": answer}))


if __name__ == "__main__":
    main()
