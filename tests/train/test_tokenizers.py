"""Byte and character tokenizers: nothing is lost, nothing is special by accident, and others can load them."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowdim.train.tasks import language_modelling
from lowdim.train.tokenizers import END, PAD, UNKNOWN, byte_tokenizer, character_tokenizer

ALPHABET = "First Citizen:\nBefore we proceed any further, hear me speak. é中😀\t\r\x00\u0301\u200d\ufffd<|>"
OPTIONS = {"truncation": False, "add_special_tokens": False, "verbose": False}  # as `language_modelling` calls


@pytest.fixture(scope="module")
def by_byte():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def by_character():
    return character_tokenizer(ALPHABET)


def ids(tokenizer, text):
    return tokenizer(text, **OPTIONS)["input_ids"]


# Round trips


@given(text=st.text())
def test_bytes_of_any_text(by_byte, text):
    found = ids(by_byte, text)
    assert found == list(text.encode())
    assert by_byte.decode(found) == text


@given(text=st.text(st.sampled_from(ALPHABET)))
def test_known_characters_come_back(by_character, text):
    found = ids(by_character, text)
    order = sorted(set(ALPHABET))
    assert found == [order.index(c) for c in text]
    assert by_character.decode(found) == text


@given(text=st.text())
def test_unknown_characters_are_one_token_each(by_character, text):
    found = ids(by_character, text)
    assert len(found) == len(text)
    assert [i == by_character.unk_token_id for i in found] == [c not in ALPHABET for c in text]


@given(text=st.text(min_size=1))
def test_a_texts_own_tokenizer_knows_all_of_it(text):
    tokenizer = character_tokenizer(text)
    assert tokenizer.decode(ids(tokenizer, text)) == text
    assert len(tokenizer) == len(set(text)) + 3


@pytest.mark.parametrize(
    "text", ["  two  spaces ", "\r\n\n", " .", "can 't , do n't", "e\u0301", "\ufeffbom", "▁Ġ", "<0x41>", ""]
)
def test_nothing_is_normalised(by_byte, text):
    tokenizers = [by_byte] + ([character_tokenizer(text)] if text else [])
    for tokenizer in tokenizers:
        assert tokenizer.decode(ids(tokenizer, text)) == text


# Special tokens


def test_vocabulary_of_bytes(by_byte):
    assert len(by_byte) == 258
    assert (by_byte.eos_token, by_byte.eos_token_id, by_byte.pad_token, by_byte.pad_token_id) == (END, 256, PAD, 257)
    assert (by_byte.unk_token, by_byte.bos_token) == (None, None)
    assert by_byte.padding_side == "right"


def test_vocabulary_of_characters():
    tokenizer = character_tokenizer("hello")
    assert tokenizer.convert_ids_to_tokens(range(7)) == ["e", "h", "l", "o", UNKNOWN, END, PAD]
    assert (tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (4, 5, 6)


def test_texts_may_come_in_parts():
    assert character_tokenizer(iter(["cab", "", "abd"])).get_vocab() == character_tokenizer("cabd").get_vocab()


@pytest.mark.parametrize("name", [END, PAD, UNKNOWN])
def test_the_names_of_special_tokens_are_text(by_byte, name):
    for tokenizer in (by_byte, character_tokenizer(name)):
        found = ids(tokenizer, f"{name}{name}")
        assert len(found) == 2 * len(name)
        assert not set(found) & set(tokenizer.all_special_ids)


def test_special_tokens_can_be_left_out_of_what_is_read(by_byte):
    assert by_byte.decode([104, 105, 256, 257]) == f"hi{END}{PAD}"
    assert by_byte.decode([104, 105, 256, 257], skip_special_tokens=True) == "hi"


def test_bytes_that_are_no_text(by_byte):
    """A model may write anything: what is valid stays readable."""
    assert by_byte.decode([104, 0xFF, 105]) == "h\ufffdi"
    assert by_byte.decode([0xC3]) == "\ufffd"


def test_batches_are_padded(by_byte):
    batch = by_byte(["a", "bcd"], padding=True)
    assert batch["input_ids"] == [[97, 257, 257], [98, 99, 100]]
    assert batch["attention_mask"] == [[1, 0, 0], [1, 1, 1]]
    assert by_byte(["abc"], truncation=True, max_length=2)["input_ids"] == [[97, 98]]


# Files


@pytest.mark.parametrize("make", [byte_tokenizer, lambda: character_tokenizer(ALPHABET)], ids=["bytes", "characters"])
def test_others_load_it_without_our_code(make, tmp_path):
    tokenizer, text = make(), f"speak {END} é?"
    tokenizer.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json"}
    code = (
        "import sys; from transformers import AutoTokenizer\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "found = t(sys.argv[2], add_special_tokens=False)['input_ids']\n"
        "assert 'lowdim' not in sys.modules\n"
        "print([found, len(t), t.eos_token_id, t.pad_token_id, t.unk_token_id, t.decode(found)])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), text], capture_output=True, text=True, check=True)
    found = ids(tokenizer, text)
    special = [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
    assert done.stdout.strip() == str([found, len(tokenizer), *special, tokenizer.decode(found)])


# Use


@pytest.mark.parametrize("kind", ["bytes", "characters"])
def test_language_modelling_takes_them(kind, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("to be, or not to be: that is the question\n" * 40)
    text = file.read_text()
    tokenizer = byte_tokenizer() if kind == "bytes" else character_tokenizer(text)
    task = language_modelling(tokenizer, [file], max_length=16)
    seen = [row for part in (task.train, task.validation, task.test) for row in part["input_ids"]]
    assert {len(row) for row in seen} == {16}
    assert all(tokenizer.decode(row).replace(END, "\n") in f"{text}\n" for row in seen)


@pytest.mark.parametrize("kind", ["bytes", "characters"])
def test_a_megabyte_in_one_piece(kind):
    """A corpus may be one document; in quadratic time this test would take hours."""
    text = ("It was the best of times, it was the worst of times. " * 20_000)[:1_000_000]
    tokenizer = byte_tokenizer() if kind == "bytes" else character_tokenizer(text)
    found = ids(tokenizer, text)
    assert len(found) == 1_000_000
    assert tokenizer.decode(found) == text


# Wrong input


@pytest.mark.parametrize("text", ["", [], ["", ""]])
def test_no_text(text):
    with pytest.raises(ValueError, match="text must hold at least one character"):
        character_tokenizer(text)


def test_a_lone_surrogate():
    with pytest.raises(ValueError, match=r"lone surrogate '\\ud800'"):
        character_tokenizer("a\ud800")
