import copy

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import vectors
from lowdim.represent import StarbucksCollator, StarbucksPretraining, nested_whole_word_masks
from lowdim.testing.represent_case import RepresentCase
from lowdim.testing.small_encoder import small_encoder

transformers = pytest.importorskip("transformers", reason="the model is transformers' BERT")
PAIRS = ((1, 4), (2, 8))
BATCH = ("input_ids", "attention_mask", "labels", "decoder_input_ids", "decoder_labels")


def bert(**sizes):
    small = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 20, "num_hidden_layers": 2}
    config = transformers.BertConfig(
        max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **{**small, **sizes}
    )
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(config)


def batch():
    g = torch.Generator().manual_seed(1)
    ids, other = torch.randint(5, 20, (2, 6), generator=g), torch.randint(5, 20, (2, 6), generator=g)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    labels, decoder_labels = torch.full((2, 6), -100), torch.full((2, 6), -100)
    labels[:, 2], decoder_labels[:, 1:3] = 7, 9
    return dict(zip(BATCH, (ids, mask, labels, other, decoder_labels)))


class TestPretraining(RepresentCase):
    def make(self):
        model = bert()
        for layer in model.bert.encoder.layer:
            layer.attention.self.key.bias = None  # its gradient is 0: a softmax does not see it
        return StarbucksPretraining(model, PAIRS)

    def loss(self, module, dtype):
        unused = (module.model.bert.embeddings.token_type_embeddings.weight,)
        return module(**batch()).loss + 0 * sum(p.sum().float() for p in unused)

    def expected(self, module):
        rows, net = batch(), module.model.bert
        head = module.model.cls.predictions

        def ce(hidden, dim, labels):
            w, b = head.transform.dense.weight[:, :dim], head.transform.dense.bias
            t = head.transform.LayerNorm(torch.nn.functional.gelu(hidden[..., :dim] @ w.T + b))
            logits = t @ net.embeddings.word_embeddings.weight.T + head.bias
            picked = logits.log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
            return t, -picked[labels >= 0].mean()

        states = net(rows["input_ids"], rows["attention_mask"], output_hidden_states=True).hidden_states
        bias = torch.where(rows["attention_mask"] > 0, 0.0, -torch.inf).double()[:, None, None]
        total = torch.zeros((), dtype=torch.float64)
        for layer, dim in ((1, 4), (2, 8)):
            t, mlm = ce(states[layer], dim, rows["labels"])
            seen = net.embeddings(input_ids=rows["decoder_input_ids"])
            seen = torch.cat([t[:, :1], seen[:, 1:]], 1)
            _, mae = ce(module.decoder[0](seen, bias), 8, rows["decoder_labels"])
            total = total + (mlm + mae) / 2
        return total / 2

    def refusals(self):
        return [
            (TypeError, "must be a BertForMaskedLM; got BertModel", lambda: StarbucksPretraining(bert().bert, PAIRS)),
            (ValueError, "decoder_layers", lambda: StarbucksPretraining(bert(), PAIRS, decoder_layers=3)),
            (ValueError, "the whole model, (2, 8)", lambda: StarbucksPretraining(bert(), [(1, 4)])),
            (ValueError, "dimensions in [1, 8]", lambda: StarbucksPretraining(bert())),  # the default is for 768
        ]

    test_every_parameter_gets_a_finite_gradient = None  # the sums over words that no batch holds have none; see below


def test_the_decoder_is_a_trained_copy_and_the_batch_stays():
    module, rows = StarbucksPretraining(bert(), PAIRS), batch()
    first = module.model.bert.encoder.layer[0].attention.self.query.weight
    mine = module.decoder[0].attention.self.query.weight
    assert torch.equal(first, mine)
    assert first is not mine
    before = copy.deepcopy(rows)
    module(**rows).loss.backward()
    assert all(torch.equal(rows[name], before[name]) for name in rows)
    without = [name for name, p in module.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert without == []


def test_no_masked_token_gives_no_nan():
    rows = batch()
    rows["labels"].fill_(-100)
    rows["decoder_labels"].fill_(-100)
    assert StarbucksPretraining(bert(), PAIRS)(**rows).loss.item() == 0


def test_vectors():
    case = vectors.load("starbucks", "pretraining")
    h = case.hyperparameters
    model = bert(
        vocab_size=h["vocab"],
        hidden_size=h["hidden"],
        num_hidden_layers=h["layers"],
        num_attention_heads=h["heads"],
        intermediate_size=h["intermediate"],
        type_vocab_size=1,
    )
    model.bert.embeddings.position_embeddings = torch.nn.Embedding(h["positions"], h["hidden"])
    model = model.double()
    state = {name[6:]: value for name, value in case.tensors.items() if name.startswith("state.")}
    missing = model.load_state_dict(state, strict=False)
    assert set(missing.missing_keys) == {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}  # tied
    module = StarbucksPretraining(model, h["pairs"])
    loss = module(**{name: case[name] for name in BATCH}).loss
    case.close(loss, "loss")
    loss.backward()
    case.close(model.bert.embeddings.word_embeddings.weight.grad, "grad.word_embeddings")
    case.close(model.cls.predictions.transform.dense.weight.grad, "grad.transform_dense")
    case.close(module.decoder[0].attention.self.query.weight.grad, "grad.decoder_query")
    case.close(model.bert.encoder.layer[0].attention.self.query.weight.grad, "grad.encoder_query")


def test_masks_are_the_authors():
    case = vectors.load("starbucks", "masks")
    shares = {name: case.hyperparameters[name] for name in ("encoder_probability", "decoder_probability")}
    for row in range(case.hyperparameters["rows"]):
        encoder, decoder = nested_whole_word_masks(case[f"word_ids.{row}"], order=case[f"order.{row}"], **shares)
        assert torch.equal(encoder.long(), case[f"encoder_mask.{row}"])
        assert torch.equal(decoder.long(), case[f"decoder_mask.{row}"])


def test_masks_are_nested_and_whole():
    words = torch.tensor([-1, 0, 0, 0, 1, 2, 2, 3, 4, 4, 5, 6, -1])
    for seed in range(20):
        encoder, decoder = nested_whole_word_masks(words, generator=torch.Generator().manual_seed(seed))
        assert bool((decoder | ~encoder).all())
        assert not decoder[words < 0].any()
        for word in range(7):
            assert len(set(decoder[words == word].tolist())) == len(set(encoder[words == word].tolist())) == 1
        assert encoder.sum() <= 3
        assert decoder.sum() <= 5
    assert [int(mask.sum()) for mask in nested_whole_word_masks(torch.arange(40), max_predictions=4)] == [4, 4]
    assert not any(mask.any() for mask in nested_whole_word_masks(torch.tensor([-1, -1])))
    assert all(mask.shape == (0,) for mask in nested_whole_word_masks(torch.empty(0, dtype=torch.int64)))


def test_the_budget_counts_tokens_and_a_word_that_is_too_long_is_passed_over():
    words = torch.tensor([-1, 0, 0, 0, 0, 1, 2, 2, 3, -1])  # 10 tokens: 2 for the encoder, 4 for the decoder
    encoder, decoder = nested_whole_word_masks(words, order=torch.tensor([1, 0, 2, 3]))
    assert words[encoder].tolist() == [1, 3]  # word 2 fits into the decoder's budget only
    assert words[decoder].tolist() == [1, 2, 2, 3]  # word 0 would be the fifth token, words 2 and 3 are not


def test_masks_that_are_refused():
    words = torch.tensor([0, 1, 2])
    for bad in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="encoder_probability"):
            nested_whole_word_masks(words, encoder_probability=bad)
    with pytest.raises(ValueError, match="permutation of the 3 words"):
        nested_whole_word_masks(words, order=torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="vector"):
        nested_whole_word_masks(words[None])


@pytest.fixture(scope="module")
def tokenizer():
    return small_encoder(layers=1).tokenizer


def test_the_collator_masks_and_pads(tokenizer):
    texts = ["the cat sat on the old mat under a tree", "a dog ran"]
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in texts]
    one, two = (StarbucksCollator(tokenizer, seed=3)(rows) for _ in range(2))
    assert tuple(one) == BATCH
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert {tuple(value.shape) for value in one.values()} == {(2, 16)}
    assert one["attention_mask"].sum(1).tolist() == [12, 5]
    for inputs, labels in (("input_ids", "labels"), ("decoder_input_ids", "decoder_labels")):
        for i, row in enumerate(rows):
            kept = one[labels][i, : len(row["input_ids"])] < 0
            original = torch.tensor(row["input_ids"])
            assert torch.equal(one[inputs][i, : len(original)][kept], original[kept])
            assert torch.equal(one[labels][i, : len(original)][~kept], original[~kept])
            assert (one[labels][i, len(original) :] == -100).all()
    assert not torch.equal(StarbucksCollator(tokenizer, seed=4)(rows)["labels"], one["labels"])


def test_most_masked_tokens_become_the_mask(tokenizer):
    row = {"input_ids": [2, *range(5, 21), *range(5, 18), 3]}
    collate = StarbucksCollator(tokenizer, decoder_probability=0.9)
    counts = {"mask": 0, "kept": 0, "all": 0}
    for _ in range(60):
        found = collate([row])
        where = found["decoder_labels"][0] >= 0
        became, was = found["decoder_input_ids"][0][where], found["decoder_labels"][0][where]
        counts["mask"] += int((became == tokenizer.mask_token_id).sum())
        counts["kept"] += int((became == was).sum())
        counts["all"] += int(where.sum())
    assert counts["mask"] / counts["all"] == pytest.approx(0.8, abs=0.04)
    assert counts["kept"] / counts["all"] == pytest.approx(0.1, abs=0.03)


def test_word_pieces_and_words_that_the_row_brings(tokenizer):
    collate = StarbucksCollator(tokenizer)
    collate._continues = collate._continues.clone()
    collate._continues[7] = True  # as if the word began with ##
    assert collate._words({}, torch.tensor([2, 6, 7, 8, 3])).tolist() == [-1, 2, 2, 3, -1]
    assert collate._words({"word_ids": [None, 0, 1, 1, None]}, torch.tensor([2, 6, 7, 8, 3])).tolist() == [-1, 0, 1, 1, -1]


@pytest.mark.slow
def test_workers_draw_apart_and_anew_in_each_epoch(tokenizer):
    rows = [{"input_ids": [2, *range(5, 21), 3]}] * 4
    loader = DataLoader(rows, 1, collate_fn=StarbucksCollator(tokenizer), num_workers=2)  # type: ignore[arg-type]
    epochs = [[tuple(found["decoder_labels"][0].tolist()) for found in loader] for _ in range(2)]
    assert len(set(epochs[0])) > 2
    assert epochs[0] != epochs[1]


def test_the_collator_refuses(tokenizer):
    with pytest.raises(ValueError, match="decoder_probability"):
        StarbucksCollator(tokenizer, decoder_probability=1.5)
    with pytest.raises(ValueError, match="at least one text"):
        StarbucksCollator(tokenizer)([])
    other = copy.deepcopy(tokenizer)
    other.mask_token = None
    with pytest.raises(ValueError, match="mask_token_id"):
        StarbucksCollator(other)


@pytest.mark.slow
def test_it_trains_in_the_trainer_of_transformers(tokenizer, tmp_path):
    module = StarbucksPretraining(bert(vocab_size=len(tokenizer)), PAIRS)
    rows = [dict(tokenizer(text)) for text in ("the cat sat", "a dog ran", "a bird sang", "the old cat") * 4]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, report_to=[], save_steps=4, logging_steps=1, use_cpu=True, remove_unused_columns=False
    )
    trainer = transformers.Trainer(module, arguments, train_dataset=rows, data_collator=StarbucksCollator(tokenizer))
    trainer.train()
    assert all(entry["loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)
    state = trainer.model.state_dict()
    assert "model.cls.predictions.decoder.weight" not in state  # tied: the file holds the words once
    again = StarbucksPretraining(bert(vocab_size=len(tokenizer)), PAIRS)
    again.load_state_dict(load_file(tmp_path / "checkpoint-4" / "model.safetensors"))
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    module.model.save_pretrained(tmp_path / "bert")
    assert transformers.BertModel.from_pretrained(tmp_path / "bert").config.num_hidden_layers == 2
