"""Task instruct: files become parts, padded batches and a loss on answers; scores by loss and by what the model writes."""

import json
import math

import pytest
import torch

from lowdim import models
from lowdim.errors import DataError, UnknownNameError
from lowdim.train.answers import IGNORED
from lowdim.train.generating import generate
from lowdim.train.metrics import METRICS
from lowdim.train.recipes import Recipe
from lowdim.train.tasks import load
from lowdim.train.tasks.instruct import instruction
from lowdim.train.tasks.labelled import PadLabels
from lowdim.train.tokenizers import byte_tokenizer
from tiny import llama

#: As SmolLM2-Instruct ships it.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
#: (masked, text) in turn, as written by hand.
BY_HAND = {
    "smollm2": [
        (True, f"{SYSTEM}<|im_start|>user\nHi, you<|im_end|>\n<|im_start|>assistant\n"),
        (False, "Hello!<|im_end|>"),
        (True, "\n<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"),
        (False, "It is 2.<|im_end|>"),
        (True, "\n"),
    ],
    "plain": [
        (True, "### User\nHi, you\n\n### Assistant\n"),
        (False, "Hello!<|end|>"),
        (True, "\n\n### User\n1 + 1?\n\n### Assistant\n"),
        (False, "It is 2.<|end|>"),
        (True, "\n\n"),
    ],
}
TALK = [
    {"role": "user", "content": "Hi, you"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "It is 2."},
]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sums(count, start=0):
    return [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(start, start + count)]


def smollm2_tokenizer():
    """Bytes, with SmolLM2's template and the tokens that it writes."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = SMOLLM2
    return tokenizer


def ids_by_hand(tokenizer, text):
    """A byte is its own id; a special token one more."""
    names = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>", "<|end|>") if name in text}
    ids, place = [], 0
    while place < len(text):
        name = next((name for name in names if text.startswith(name, place)), None)
        ids += [names[name]] if name else text[place].encode()
        place += len(name) if name else 1
    return ids


@pytest.mark.parametrize("kind", ["smollm2", "plain"])
def test_the_batch_is_that_masked_by_hand_and_its_loss_that_computed_by_hand(kind, tmp_path):
    tokenizer = smollm2_tokenizer() if kind == "smollm2" else byte_tokenizer()
    file = lines(
        tmp_path / "talks.jsonl", [{"messages": [*TALK[:2], {**TALK[2], "content": f"{i}?"}, TALK[3]]} for i in range(9)]
    )
    held = lines(tmp_path / "held.jsonl", [{"messages": TALK}, {"messages": TALK[2:]}])
    task = instruction(tokenizer, [file], evaluation=held, max_length=400)
    ids, labels = [], []
    for masked, text in BY_HAND[kind]:
        own = ids_by_hand(tokenizer, text)
        ids += own
        labels += [IGNORED] * len(own) if masked else own
    batch = task.collate([task.test[0], task.test[1]])
    width, short = len(ids), len(task.test[1]["input_ids"])
    assert batch["input_ids"][0].tolist() == ids
    assert batch["labels"][0].tolist() == labels
    assert batch["attention_mask"].tolist() == [[1] * width, [1] * short + [0] * (width - short)]
    assert batch["input_ids"][1, short:].tolist() == [tokenizer.pad_token_id] * (width - short)
    assert batch["labels"][1, short:].tolist() == [IGNORED] * (width - short)

    model = llama(2, max_position_embeddings=512).eval()
    model.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"][:1], attention_mask=torch.ones(1, width, dtype=torch.long)).logits[0]
    places = [place for place, label in enumerate(labels) if label != IGNORED]
    each = [float(torch.logsumexp(logits[place - 1], 0) - logits[place - 1, labels[place]]) for place in places]
    alone = task.collate([task.test[0]])
    assert task.loss_fn(model, alone).item() == pytest.approx(sum(each) / len(each), rel=1e-5)
    assert task.count_items(alone) == len(each)
    with torch.no_grad():
        summed, count = task.outcomes(model, batch, METRICS["loss"])[0]
    assert (summed, count) == (pytest.approx(sum(each), rel=1e-5), len(each))


FORMATS = {
    "jsonl": lambda path, rows: lines(path, rows),
    "json": lambda path, rows: path.write_text(json.dumps(rows)),
    "csv": lambda path, rows: path.write_text(
        "question,answer\n" + "".join('"{question}","{answer}"\n'.format(**row) for row in rows)
    ),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_files_of_each_kind_say_which_columns_they_use(kind, tmp_path):
    path = tmp_path / f"sums.{kind}"
    FORMATS[kind](path, sums(12))
    task = instruction(byte_tokenizer(), [path])
    assert sum(task.sizes().values()) == 12
    assert task.columns[0].sentence == f"{path}: the prompt is column 'question', the answer column 'answer'"
    assert task.columns[0].to_dict() == {"source": str(path), "text": ["question", "answer"], "label": None, "unused": []}
    assert task.example.startswith("«### User\\nWhat is ")
    assert "\\n\\n### Assistant\\n» It is " in task.example
    assert task.processor.chat_template.startswith("{% for message in messages %}"), "it is saved with the tokenizer"


def test_turns_in_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{"source": "me", "messages": [{**TALK[0], "content": f"Hi {i}"}, TALK[1]]} for i in range(9)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "talks.parquet")
    task = instruction(byte_tokenizer(), [tmp_path / "talks.parquet"])
    assert sum(task.sizes().values()) == 9
    assert "the turns are column 'messages' (not used: source)" in task.columns[0].sentence


def test_columns_are_named_by_text(tmp_path):
    rows = [{"q": f"{i}?", "a": str(i), "question": f"What {i}?", "answer": "no"} for i in range(9)]
    file = lines(tmp_path / "a.jsonl", rows)
    task = instruction(byte_tokenizer(), [file], text="q,a")
    assert sorted(row["asked"] for part in (task.train, task.validation, task.test) for row in part) == [
        f"{i}?" for i in range(9)
    ]
    assert task.columns[0].roles.unused == ("question", "answer")
    with pytest.raises(UnknownNameError, match=r"--text: .*a.jsonl has no column 'qq'; nearest: q"):
        instruction(byte_tokenizer(), [file], text="qq,a")
    with pytest.raises(DataError, match="name each column once"):
        instruction(byte_tokenizer(), [file], text="q,q")
    both = lines(tmp_path / "both.jsonl", [{**row, "response": "yes"} for row in rows])
    with pytest.raises(DataError, match=r"read in two ways.*--text question,answer or --text question,response"):
        instruction(byte_tokenizer(), [both])


def test_no_prompt_is_in_two_parts(tmp_path):
    rows = [*sums(40), *sums(10)]
    rows += [{"question": f" WHAT is {i} +  1?", "answer": f"{i + 1}!"} for i in range(10)]
    task = instruction(byte_tokenizer(), [lines(tmp_path / "a.jsonl", rows)])
    parts = [
        {row["asked"].strip().lower().replace("  ", " ") for row in part} for part in (task.train, task.validation, task.test)
    ]
    assert [len(part) for part in parts] == [27, 5, 8]
    assert len(set.union(*parts)) == 40
    assert sum(task.sizes().values()) == 50, "other answers to a prompt stay with it"
    assert "10 duplicate conversations were left out (they may differ in case, spaces or Unicode form)" in task.notes


def test_a_conversation_and_its_continuation_are_in_one_part(tmp_path):
    long = [{"messages": [{**TALK[0], "content": f"Hi {i}"}, *TALK[1:]]} for i in range(20)]
    begun = [{"messages": row["messages"][:2]} for row in long]
    task = instruction(byte_tokenizer(), [lines(tmp_path / "a.jsonl", [*long, *begun])])
    firsts = [{task.processor.decode(row["input_ids"]).split("\n")[1] for row in part} for part in (task.train, task.test)]
    assert not firsts[0] & firsts[1]
    assert len(task.train) == 2 * len(firsts[0])


def test_separate_files(tmp_path):
    file = lines(tmp_path / "a.jsonl", sums(20))
    choice, test = lines(tmp_path / "v.jsonl", sums(6, 15)), lines(tmp_path / "t.jsonl", sums(5, 18))
    task = instruction(byte_tokenizer(), [file], validation=choice, evaluation=test)
    asked = [[int(row["asked"].split()[2]) for row in part] for part in (task.train, task.validation, task.test)]
    assert [sorted(part) for part in asked] == [list(range(15)), [15, 16, 17], [18, 19, 20, 21, 22]]
    assert "8 conversations have the prompt of one in a separate file and were left out of the other parts" in task.notes
    with pytest.raises(DataError, match="nothing is left of the validation file: all of its prompts are in the test file"):
        instruction(byte_tokenizer(), [file], validation=test, evaluation=test)
    with pytest.raises(DataError, match=r"a.jsonl has 0 different prompts that are in no separate file; at least 2 are needed"):
        instruction(byte_tokenizer(), [file], evaluation=file)
    with pytest.raises(DataError, match="at least 3 are needed"):
        instruction(byte_tokenizer(), [lines(tmp_path / "two.jsonl", sums(2))])


def test_long_rows_lose_the_start_of_their_prompt_and_are_counted(tmp_path):
    rows = [*sums(10), {"question": "x" * 300, "answer": "yes"}, {"question": "why", "answer": "z" * 300}]
    task = instruction(byte_tokenizer(), [lines(tmp_path / "a.jsonl", rows)], max_length=100)
    assert "1 of 12 conversations are longer than 100 tokens and lost their start (--max-length)" in task.notes
    assert "1 of 12 conversations have no whole answer in 100 tokens and were left out (--max-length)" in task.notes
    long = next(row for part in (task.train, task.validation, task.test) for row in part if row["answer"] == "yes")
    assert len(long["input_ids"]) == 100
    assert long["input_ids"][-6:-2] == [*b"yes", task.processor.eos_token_id]
    with pytest.raises(DataError, match=r"row 1: no whole answer is left in 8 tokens \(--max-length\), and in no other row"):
        instruction(byte_tokenizer(), [lines(tmp_path / "b.jsonl", sums(5))], max_length=8)


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (
            "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}",
            None,
            "drops the answer",
        ),
        (None, {"question": "a", "answer": "b", "messages": TALK}, "can be read in two ways: messages"),
    ],
)
def test_bad_rows(template, row, message, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=message):
        instruction(tokenizer, [lines(tmp_path / "bad.jsonl", [*sums(9), *([row] if row else [])])])


def test_empty_answers_are_left_out_and_counted(tmp_path):
    rows = [*sums(9), {"question": "Why?", "answer": " "}, {"question": None, "answer": "So"}]
    task = instruction(byte_tokenizer(), [lines(tmp_path / "a.jsonl", rows)])
    assert sum(task.sizes().values()) == 9
    assert task.notes[0].startswith("2 of 11 rows have an empty prompt or answer and were left out (")
    assert "row 10: turn 2, by the assistant, is empty" in task.notes[0]
    empty = lines(tmp_path / "b.jsonl", [{**row, "answer": ""} for row in sums(5)])
    with pytest.raises(DataError, match=r"no row of .*b.jsonl has both a prompt and an answer: .*row 1: turn 2"):
        instruction(byte_tokenizer(), [empty])


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="neither a chat template nor an end token"):
        instruction(tokenizer, [lines(tmp_path / "a.jsonl", sums(9))])


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"metric": "exact-match", "answer_pattern": "#### .*"}, ValueError, r"must have one group, in parentheses.* with 0"),
        ({"metric": "exact-match", "answer_pattern": "(a)(b)"}, ValueError, "must have one group, in parentheses.* with 2"),
        ({"metric": "exact-match", "answer_pattern": "(a"}, ValueError, r"number or a regular expression; got '\(a'"),
        (
            {"metric": "exact-match", "answer_pattern": "@@ (.*)"},
            DataError,
            r"'@@ \(\.\*\)' matches none of the \d+ expected answers",
        ),
        ({"answer_pattern": "number"}, ValueError, "add --metric exact-match"),
    ],
)
def test_bad_patterns_are_refused_before_training(keys, error, message, tmp_path):
    recipe = Recipe(model="stories260k", task="instruct", data=[str(lines(tmp_path / "a.jsonl", sums(20)))], **keys)
    with pytest.raises(error, match=message):
        load(recipe, byte_tokenizer())


@pytest.fixture(scope="module")
def stories():
    return models.load_tokenizer("stories260k"), models.load_model("stories260k", "causal-lm")


@pytest.mark.parametrize("kind", ["stories260k", "llama"])
def test_answers_in_batches_padded_on_the_left_are_those_of_one_prompt_at_a_time(kind, stories):
    draw = torch.Generator().manual_seed(0)
    model = stories[1] if kind == "stories260k" else llama(2).eval()
    vocabulary = model.config.vocab_size
    prompts = [torch.randint(3, vocabulary, (n,), generator=draw).tolist() for n in (1, 9, 4, 17, 2, 30, 5)]
    alone = [generate(model, [prompt], most=12, stop=[2])[0] for prompt in prompts]
    for pad in (0, 7):
        assert generate(model, prompts, most=12, stop=[2], pad=pad, batch_size=4) == alone
    by_hand = []
    for prompt in prompts:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(12):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        new = ids[len(prompt) :]
        by_hand.append(new[: new.index(2)] if 2 in new else new)
    assert alone == by_hand


def test_generation_ends_at_a_stop_and_leaves_the_model_in_its_mode(stories):
    tokenizer, model = stories
    ids = tokenizer("Once upon a")["input_ids"]
    whole = generate(model, [ids], most=8)[0]
    assert generate(model.train(), [ids], most=8, stop=[whole[3]])[0] == whole[:3]
    assert model.training
    model.eval()


def test_the_exact_match_counts_what_the_pattern_finds(stories, tmp_path, monkeypatch):
    from lowdim.train.tasks import instruct

    tokenizer, model = stories
    file = lines(tmp_path / "a.jsonl", sums(25))
    task = instruction(tokenizer, [file], pattern="number", exact=True)
    asked = {tuple(row["prompt"]): int(row["asked"].split()[2]) for row in task.test}

    def written(model, prompts, **options):
        return [tokenizer(f"I say ${asked[tuple(p)] + (asked[tuple(p)] % 2 == 0)}.0")["input_ids"] for p in prompts]

    monkeypatch.setattr(instruct, "generate", written)
    score = task.score(model, task.test, METRICS["exact-match"])
    hits = tuple(float(int(row["asked"].split()[2]) % 2 == 0) for row in task.test)
    assert score.values == hits
    assert score.value == sum(hits) / len(hits)
    assert 0 < score.value < 1
    samples = task.samples(model, 2)
    assert [sorted(sample) for sample in samples] == [["answer", "expected", "prompt"]] * 2
    assert samples[0]["prompt"] == task.test[0]["asked"]
    assert samples[0]["answer"].startswith("I say $")
    assert task.samples(model, 10**6)[len(task.test) :] == []


def test_an_untouched_model_scores_by_generation_and_a_broken_one_gives_nan(stories, tmp_path):
    tokenizer, model = stories
    task = instruction(tokenizer, [lines(tmp_path / "a.jsonl", sums(12))], exact=True, most=512)
    assert task.score(model, task.test, METRICS["exact-match"]).value == 0.0
    assert any("at most" in note and "tokens are written" in note for note in task.notes)
    broken = llama(1)
    torch.nn.init.constant_(broken.lm_head.weight, math.nan)
    broken.resize_token_embeddings(512)
    assert math.isnan(task.score(broken, task.test, METRICS["exact-match"]).value)


def test_the_perplexity_of_answers_is_that_of_all_their_tokens(stories, tmp_path):
    tokenizer, model = stories
    task = instruction(tokenizer, [lines(tmp_path / "a.jsonl", sums(30))])
    assert task.processor.chat_template.startswith("{{ bos_token }}"), "as the tokenizer begins its texts"
    with torch.no_grad():
        found = task.outcomes(model.eval(), task.collate(list(task.test)), METRICS["loss"])
    mean = sum(loss for loss, _ in found) / sum(count for _, count in found)
    score = task.score(model, task.test, METRICS["perplexity"])
    assert score.value == pytest.approx(math.exp(mean), rel=1e-4)
    assert sum(score.values) / len(score.values) == pytest.approx(-mean, rel=1e-4)


def test_padding_is_on_the_right_and_not_trained_on():
    batch = PadLabels(9, "right")([{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [3], "labels": [3]}])
    assert batch["input_ids"].tolist() == [[1, 2], [3, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [[-100, 2], [3, -100]]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_saves_the_template_and_what_the_model_writes(method, tmp_path):
    from transformers import AutoTokenizer

    from lowdim.jobs.export import ExportSettings, export
    from lowdim.train.run import load_run, run_recipe

    recipe = Recipe(
        model="stories260k",
        task="instruct",
        data=[str(lines(tmp_path / "a.jsonl", sums(12)))],
        method=method,
        steps=2,
        batch_size=4,
        metric="exact-match",
        answer_pattern="number",
        out=str(tmp_path / "run"),
    )
    record = run_recipe(recipe)
    assert record["before"] == record["before_test"] == 0.0
    assert len(record["samples"]) == 2
    assert len(record["kept"]) == 2
    kind = "adapter" if method == "lora" else "model"
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / kind)
    turns = [{"role": "user", "content": "What is 1 + 1?"}]
    text = saved.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<s>### User\nWhat is 1 + 1?\n\n### Assistant\n"
    if method == "lora":
        adapted, _, _ = load_run(tmp_path / "run")
        ids = saved(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        assert torch.isfinite(adapted.model(ids).logits).all()
        export(ExportSettings(adapter=tmp_path / "run", out=tmp_path / "merged", format="merged"))
        merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
        assert merged.chat_template == saved.chat_template
