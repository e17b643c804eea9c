"""Write what `labels.yaml`, `regress-similarity.yaml` and `embed-replace.yaml` read: requests, pairs and scenes.

    python recipes/make_texts.py [FOLDER]

The folder (`lowdim-data` if none is named) gets 400 requests, `requests.jsonl`, each with a list of what it is about, and 600
pairs of descriptions, `pairs.jsonl`, each with the number of their five parts that say the same. `scenes.jsonl` holds 800
descriptions, each with where and when it happens as its topic: one of 12.
"""

import json
import random
import sys
from pathlib import Path

PARTS = {
    "delivery": ("my parcel is late", "the courier left it in the rain", "where is my order", "it went to the wrong street"),
    "refund": ("I want my money back", "please cancel the payment", "you charged me twice", "I return it for a full refund"),
    "account": ("I cannot log in", "my password does not work", "please change my email", "close my account"),
    "praise": ("thank you for the quick help", "the shop is lovely", "I am very happy with it", "great service as always"),
}
OPENINGS = ("hello", "good morning", "dear team", "hi there", "hello again", "good evening", "to whom it may concern")
ITEMS = ("the blue lamp", "a pair of boots", "two books", "the garden chair", "a kettle", "the red coat", "a radio", "my phone")
SCENE = (
    (("a man", "a fellow"), ("a woman", "a lady"), ("a child", "a kid"), ("a dog", "a puppy")),
    (("walks", "strolls"), ("sleeps", "naps"), ("sings", "hums"), ("waits", "stands")),
    (("in a park", "in a garden"), ("on a street", "on a road"), ("at home", "in a house"), ("by the sea", "on the shore")),
    (("in the morning", "at dawn"), ("at night", "after dark"), ("at noon", "at midday")),
    (("in the rain", "in a shower"), ("in the sun", "in the sunshine"), ("in the snow", "in a snowfall")),
)


def request(draw: random.Random) -> dict[str, object]:
    """A request about one to three things."""
    own = sorted(draw.sample(sorted(PARTS), draw.choice((1, 1, 2, 3))))
    said = [draw.choice(PARTS[label]) for label in own]
    draw.shuffle(said)
    return {"text": f"{draw.choice(OPENINGS)}, I bought {draw.choice(ITEMS)}: {' and '.join(said)}", "labels": own}


def pair(draw: random.Random) -> dict[str, object]:
    """Two descriptions, and how many of their parts say the same, perhaps in other words."""
    one = [draw.choice(part) for part in SCENE]
    two = [said if draw.random() < 0.5 else draw.choice(part) for said, part in zip(one, SCENE)]
    first, second = (" ".join(draw.choice(said) for said in scene) for scene in (one, two))
    return {"sentence1": first, "sentence2": second, "score": sum(a == b for a, b in zip(one, two))}


def scene(draw: random.Random) -> dict[str, object]:
    """A description, and where and when it happens."""
    parts = [draw.choice(part) for part in SCENE]
    return {"text": " ".join(draw.choice(said) for said in parts), "topic": f"{parts[2][0]} {parts[3][0]}"}


def main(folder: Path) -> None:
    """Write the files."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, make in (("requests.jsonl", 400, request), ("pairs.jsonl", 600, pair), ("scenes.jsonl", 800, scene)):
        rows = [json.dumps(make(draw)) for _ in range(count)]
        (folder / name).write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "lowdim-data"))
