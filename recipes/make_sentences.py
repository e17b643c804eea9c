"""Write what `recipes/tokens.yaml` reads: sentences with people, places and companies, made from templates.

    python recipes/make_sentences.py [FOLDER]

The folder (`lowdim-data` if none is named) gets 600 sentences to train on, `sentences.conll`, and 200 to test on,
`sentences-test.conll`: a word and its tag in each line, an empty line between sentences. No name stands in both, so none can be
learned by heart.
"""

import random
import sys
from pathlib import Path

TEMPLATES = (
    "{person} moved from {place} to {place} last year .",
    "The office of {company} in {place} opens on Monday .",
    "{person} joined {company} after ten years at {company} .",
    "Last week {person} and {person} met in {place} .",
    "{company} said that {person} will lead its work in {place} .",
    "It rained in {place} all day .",
    "Shares of {company} fell after the report .",
    "Nobody at the meeting had read the report .",
    "{person} wrote that the food in {place} was cold .",
    "The train to {place} was late , said {person} of {company} .",
)
PEOPLE = """
    Anna Adler, Boris Berg, Clara Costa, David Dahl, Emma Evans, Felix Fischer, Greta Grant, Henry Holm, Irene Ivers,
    Jonas Jensen, Karin Keller, Lewis Lind, Maria Moreau, Nils Novak
"""
PLACES = "Bergen, Lisbon, Oslo, Kyoto, Porto, Turin, Leeds, Ghent, New York, Cape Town, San Jose, Saint Malo"
COMPANIES = """
    Northwind, Helix Labs, Brightwater, Atlas Steel, Corvid, Meridian Foods, Quill Press, Ironbridge, Solace Energy,
    Tern Airways, Vega Motors, Wexford
"""
TAGS = {"{person}": "PER", "{place}": "LOC", "{company}": "ORG"}


def sentence(draw: random.Random, names: dict[str, list[str]]) -> list[tuple[str, str]]:
    """One sentence as words with tags."""
    found = []
    for word in draw.choice(TEMPLATES).split():
        if word not in TAGS:
            found.append((word, "O"))
            continue
        for place, part in enumerate(draw.choice(names[word]).split()):
            found.append((part, f"{'I' if place else 'B'}-{TAGS[word]}"))
    return found


def halves(draw: random.Random) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Names for the first sentences, and others for the last."""
    written = {"{person}": PEOPLE, "{place}": PLACES, "{company}": COMPANIES}
    lists = {kind: [name.strip() for name in names.split(",")] for kind, names in written.items()}
    for names in lists.values():
        draw.shuffle(names)
    return {kind: names[4:] for kind, names in lists.items()}, {kind: names[:4] for kind, names in lists.items()}


def main(folder: Path) -> None:
    """Write the sentences to train on, and those to test on."""
    draw = random.Random(0)
    known, unknown = halves(draw)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, names in (("sentences.conll", 600, known), ("sentences-test.conll", 200, unknown)):
        rows = ("".join(f"{word}\t{tag}\n" for word, tag in sentence(draw, names)) for _ in range(count))
        (folder / name).write_text("\n".join(rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "lowdim-data"))
