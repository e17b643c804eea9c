"""A comparison by the command line for each task: data that is made here, two methods, a verdict, a page and a winner."""

import html
import json
import random

import pytest

import tiny
from images import save_digits, save_vit
from snippets import exit_code

pytestmark = pytest.mark.slow  # each row is a small comparison of its own

ROWS = 60


def lines(place, rows):
    place.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return place


def sentences(count=ROWS):
    return tiny.sentences(count, seed=3)


def of_one_column(folder, bert):
    return bert, lines(folder / "texts.jsonl", [{"text": text, "label": label} for text, label in sentences()])


def of_pairs(folder, bert):
    """Whether two sentences have the same mood."""
    texts = sentences(2 * ROWS)
    rows = [
        {"sentence1": one, "sentence2": two, "label": "same" if mood == other else "different"}
        for (one, mood), (two, other) in zip(texts[:ROWS], random.Random(0).sample(texts[ROWS:], ROWS))
    ]
    return bert, lines(folder / "pairs.jsonl", rows)


def of_several_labels(folder, bert):
    rows = [{"text": text, "label": [mood, "long"] if len(text.split()) > 7 else [mood]} for text, mood in sentences()]
    return bert, lines(folder / "several.jsonl", rows)


def of_numbers(folder, bert):
    """How many words of a text are good ones."""
    rows = [{"text": text, "score": float(sum(word in tiny.GOOD for word in text.split()))} for text, _ in sentences()]
    return bert, lines(folder / "numbers.jsonl", rows)


def of_answers(folder, bert):
    sums = [(a, b) for a in range(1, 9) for b in range(1, 9)]
    rows = [{"prompt": f"What is {a} and {b}?", "completion": f"It is {a + b}."} for a, b in sums]
    return "stories260k", lines(folder / "sums.jsonl", rows)


def of_documents(folder, bert):
    draw = random.Random(0)
    words = ["the dog", "a girl", "saw", "the sun", "and", "went home", "was happy", "with a ball"]
    place = folder / "story.txt"
    place.write_text("\n\n".join(" ".join(draw.choices(words, k=40)) + "." for _ in range(60)), encoding="utf-8")
    return "stories260k", place


def of_bytes(folder, bert):
    return "llama-tiny", of_documents(folder, bert)[1]


def of_images(folder, bert):
    return save_vit(folder / "vit"), save_digits(folder / "digits", 150)


def of_tags(folder, bert):
    """Good and bad words are entities."""
    tags = {**dict.fromkeys(tiny.GOOD, "B-GOOD"), **dict.fromkeys(tiny.BAD, "B-BAD")}
    rows = [text.split() for text, _ in sentences()]
    place = folder / "tags.conll"
    place.write_text("\n".join("".join(f"{word} {tags.get(word, 'O')}\n" for word in row) for row in rows), encoding="utf-8")
    return bert, place


#: Name -> how model and data are made, the task, further options, the metric, and rows that nobody trained.
JOBS = {
    "classify": (of_one_column, "classify", [], "accuracy", {"majority-class"}),
    "pairs": (of_pairs, "classify", ["--text", "sentence1,sentence2"], "accuracy", {"majority-class"}),
    "several labels": (of_several_labels, "classify", [], None, None),
    "regress": (of_numbers, "regress", ["--label", "score"], "spearman", {"mean-answer"}),
    "instruct": (
        of_answers,
        "instruct",
        ["--metric", "exact-match", "--answer-pattern", "number"],
        "exact-match",
        {"untouched"},
    ),
    "causal-lm": (of_documents, "causal-lm", ["--max-length", "32"], "perplexity", {"untouched", "unigram"}),
    "pretrain": (of_bytes, "pretrain", ["--max-length", "32", "--methods", "full,galore"], "perplexity", None),
    "image": (of_images, "image", [], "accuracy", {"majority-class"}),
    "tokens": (of_tags, "tokens", [], None, None),
}


@pytest.mark.parametrize("job", JOBS)
def test_a_comparison_of_each_task(job, tmp_path, bert_folder):
    make, task, options, metric, untrained = JOBS[job]
    model, data = make(tmp_path, bert_folder)
    methods = [] if "--methods" in options else ["--methods", "lora,full"]
    small = ["--rates", "1", "--sizes", "1", "--seeds", "2", "--steps", "6", "--batch-size", "4", *methods]
    out = tmp_path / "out"
    command = ["compare", "--model", str(model), "--data", str(data), "--task", task, *small, *options, "--out", str(out)]
    assert exit_code(command) == 0

    record = json.loads((out / "comparison.json").read_text())
    assert record["task"] == task
    assert metric in (None, record["metric"]["name"])
    trained = {row["name"]: row for row in record["methods"] if not row.get("trivial")}
    assert len(trained) == 2
    assert all(row["status"] == "ok" and len(row["scores"]) == 2 for row in trained.values())
    trivial = {row["name"] for row in record["methods"] if row.get("trivial")}
    assert untrained is None or untrained <= trivial
    judged = record["judgement"]
    assert judged["headline"]
    assert set(judged["may_be_best"]) & {*trained, *trivial}
    able = set(judged["may_be_best"]) & set(trained)
    assert (record["winner"] is not None) == bool(able), "what is shown to be worse than no training is not handed over"
    if able:
        assert record["winner"]["method"] in able
        assert (out / record["winner"]["folder"]).is_dir()
    assert judged["headline"].rstrip(".") in html.unescape((out / "report.html").read_text(encoding="utf-8"))
    assert exit_code([*command, "--resume"]) == 0
    again = json.loads((out / "comparison.json").read_text())
    assert again == record, "nothing is trained or written again"
