"""Instruction data: rows become conversations, and only answers are trained on."""

import pytest

from lowdim.errors import DataError
from lowdim.train.answers import IGNORED, encode_conversation, prompt_of, use_template
from lowdim.train.conversations import FORMATS, Turn, conversation_of, format_of
from lowdim.train.tokenizers import byte_tokenizer

#: As Qwen and SmolLM2 have it; a system message is added where there is none.
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe kind<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
#: As Mistral has it: no invitation, answers end with the end token.
BRACKETS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}"
    "{% else %}{{ raise_exception('no system messages') }}{% endif %}{% endfor %}"
)
#: Answers before the last lose what is in brackets, as reasoning in some templates.
FORGETFUL = (
    "{% for m in messages %}{% set c = m['content'].split(']')[-1] if not loop.last else m['content'] %}"
    "{{ m['role'] + ': ' + c + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
DROPS = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
TALK = [Turn("user", "Hi, you"), Turn("assistant", "Hello!"), Turn("user", "1 + 1?"), Turn("assistant", "It is 2.")]


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


def trained(tokenizer, encoded):
    """The trained tokens as texts, one for each run of them."""
    runs, before = [], IGNORED
    for label in encoded.labels:
        if label != IGNORED:
            runs = [*runs, []] if before == IGNORED else runs
            runs[-1].append(label)
        before = label
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("row", "name", "want"),
    [
        ({"prompt": "a", "completion": "b"}, "prompt and completion", ["a", "b"]),
        ({"id": 7, "question": "a", "answer": "b"}, "question and answer", ["a", "b"]),
        ({"question": "a", "answer": "b", "context": "c"}, "question and answer", ["c\n\na", "b"]),
        ({"instruction": "a", "input": "", "output": "b"}, "instruction and output", ["a", "b"]),
        ({"instruction": "a", "input": "x", "output": "b"}, "instruction and output", ["a\n\nx", "b"]),
        ({"Instruction": "a", "Response": "b", "category": "qa"}, "instruction and response", ["a", "b"]),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages", ["a", "b"]),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "conversations", ["a", "b"]),
        (
            {"messages": '[{"role": "user", "content": "a"}, {"role": "model", "content": "b"}]'},
            "messages",
            ["a", "b"],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}]},
            "messages",
            ["a", "b"],
        ),
        ({"system": "s", "prompt": "a", "completion": "b"}, "prompt and completion", ["s", "a", "b"]),
    ],
)
def test_rows_of_each_format(row, name, want):
    form = format_of(row, "a.jsonl")
    turns = conversation_of(row, form, "a.jsonl, row 1")
    assert form.name == name
    assert [turn.content for turn in turns] == want
    assert [turn.role for turn in turns[-2:]] == ["user", "assistant"]


def test_every_format_is_found_by_its_own_columns():
    for form in FORMATS:
        assert format_of(form.needed, "a.csv") is form


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["text", "label"], "a.csv has columns text, label; `instruct` reads one of: messages"),
        (["prompt", "chosen", "rejected"], "holds preferences"),
        (["question", "answer", "messages"], "can be read in two ways: messages .* and question and answer"),
    ],
)
def test_columns_that_are_not_one_format(columns, message):
    with pytest.raises(DataError, match=message):
        format_of(columns, "a.csv")


def turns_of(*pairs):
    return {"messages": [{"role": role, "content": text} for role, text in pairs]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": ""}, "turn 2, by the assistant, is empty"),
        ({"prompt": "a", "completion": None}, "turn 2, by the assistant, is empty"),
        ({"prompt": " ", "completion": "b"}, "column 'prompt' is empty"),
        ({"prompt": "a", "completion": {"x": 1}}, "column 'completion' must hold text"),
        (turns_of(("user", "a")), "must end with an answer"),
        (turns_of(("assistant", "a"), ("user", "b")), "turn 1 must be by the user; got assistant"),
        (turns_of(("user", "a"), ("user", "b")), "turn 2 must be by the assistant; got user"),
        (turns_of(("user", "a"), ("system", "b"), ("assistant", "c")), "a system message must come first"),
        (turns_of(("user", "a"), ("tool", "b")), "turn 2: the role must be one of system, user, assistant; got 'tool'"),
        ({"messages": "hello"}, "must hold a list of turns"),
        ({"messages": ["hello"]}, "must hold a list of turns"),
        ({"messages": []}, "must end with an answer; got 0 turns"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "only text can be trained on; got parts of type image",
        ),
    ],
)
def test_rows_that_are_no_conversation(row, message):
    with pytest.raises(DataError, match=rf"a\.jsonl, row 3.*{message}"):
        conversation_of(row, format_of(row, "a.jsonl"), "a.jsonl, row 3")


@pytest.mark.parametrize(
    ("template", "want"),
    [
        (CHATML, ["Hello!<|im_end|>", "It is 2.<|im_end|>"]),
        (BRACKETS, [" Hello!<|end|>", " It is 2.<|end|>"]),
        (None, ["Hello!<|end|>", "It is 2.<|end|>"]),
    ],
)
def test_only_answers_are_trained_on_with_the_token_that_ends_them(tokenizer, template, want):
    tokenizer.chat_template = template
    assert use_template(tokenizer) == (template is None)
    encoded = encode_conversation(tokenizer, TALK, 1000)
    end = tokenizer.eos_token
    assert trained(tokenizer, encoded) == [text.replace("<|end|>", end) for text in want]
    assert tokenizer.decode(encoded.input_ids) == tokenizer.apply_chat_template([t.to_dict() for t in TALK], tokenize=False)
    assert all(label in (IGNORED, token) for label, token in zip(encoded.labels, encoded.input_ids, strict=True))
    assert encoded.cut == 0


def test_the_labels_are_those_masked_by_hand(tokenizer):
    use_template(tokenizer)
    encoded = encode_conversation(tokenizer, TALK[:2], 1000)
    prompt = list(b"### User\nHi, you\n\n### Assistant\n")
    answer = [*b"Hello!", tokenizer.eos_token_id]
    shift = tokenizer("a", add_special_tokens=False)["input_ids"][0] - ord("a")
    plain = [n if n == tokenizer.eos_token_id else n + shift for n in answer]
    assert encoded.input_ids[: len(prompt)] == [n + shift for n in prompt]
    assert encoded.labels[: len(prompt)] == [IGNORED] * len(prompt)
    assert encoded.labels[len(prompt) : len(prompt) + len(plain)] == plain
    assert set(encoded.labels[len(prompt) + len(plain) :]) <= {IGNORED}
    assert prompt_of(tokenizer, TALK[:1]) == "### User\nHi, you\n\n### Assistant\n"


def test_a_long_conversation_loses_its_start(tokenizer):
    use_template(tokenizer)
    whole = encode_conversation(tokenizer, TALK, 1000)
    short = encode_conversation(tokenizer, TALK, 30)
    assert short.cut == len(whole.input_ids) - 30
    assert short.input_ids == whole.input_ids[-30:]
    assert trained(tokenizer, short) == ["It is 2." + tokenizer.eos_token]


@pytest.mark.parametrize(
    ("template", "turns", "length", "message"),
    [
        (DROPS, TALK, 1000, "row 2: the tokenizer's chat template drops the answer 'Hello!'"),
        (FORGETFUL, [TALK[0], Turn("assistant", "[hm] Hello!"), *TALK[2:]], 1000, "writes answer 1 otherwise"),
        (BRACKETS, [Turn("system", "s"), *TALK], 1000, "does not take this conversation .no system messages."),
        (None, TALK, 1, "row 2: no whole answer is left in 1 tokens"),
    ],
)
def test_conversations_that_cannot_be_trained_on(tokenizer, template, turns, length, message):
    tokenizer.chat_template = template
    use_template(tokenizer)
    with pytest.raises(DataError, match=message):
        encode_conversation(tokenizer, turns, length, "a.jsonl, row 2")
