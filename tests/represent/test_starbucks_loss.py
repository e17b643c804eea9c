import copy

import numpy as np
import pytest
import torch
from torch import nn

import vectors
from lowdim.represent import StarbucksLoss
from lowdim.represent.starbucks.encoder import final_norm
from lowdim.represent.starbucks.pairs import check_pairs, default_pairs
from lowdim.testing.small_encoder import small_encoder

st = pytest.importorskip("sentence_transformers", reason="the losses and the encoder are sentence-transformers'")
losses = st.sentence_transformer.losses
PAIRS = ((1, 4), (2, 8), (3, 16))


@pytest.fixture(scope="module")
def encoder():
    return small_encoder().double()


@pytest.fixture
def model(encoder):
    return copy.deepcopy(encoder)


def columns(model):
    return [model.preprocess(texts) for texts in (["the cat sat", "a red bird sang on a tree"], ["a dog ran", "blue mat"])]


def of_vectors(case):
    from transformers import BertConfig, BertModel

    h = case.hyperparameters
    model = small_encoder(layers=h["layers"], width=h["hidden"])
    config = BertConfig(
        vocab_size=h["vocab"],
        hidden_size=h["hidden"],
        num_hidden_layers=h["layers"],
        num_attention_heads=h["heads"],
        intermediate_size=h["intermediate"],
        max_position_embeddings=h["positions"],
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    bert = BertModel(config).double()
    bert.load_state_dict({name[6:]: value for name, value in case.tensors.items() if name.startswith("state.")})
    model[0].model = bert
    base = {"mnrl": losses.MultipleNegativesRankingLoss, "cosent": losses.CoSENTLoss}[h["inner"]](model)
    weights = {name: h[name] for name in ("kl_div_weight", "kl_temperature", "last_layer_weight")}
    features = [{key: case[f"{key}.{i}"] for key in ("input_ids", "attention_mask")} for i in (0, 1)]
    return StarbucksLoss(model, base, h["pairs"], **weights), bert, features


@pytest.mark.parametrize("name", ["loss_mnrl", "loss_cosent"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_vectors(name, checkpointing):
    case = vectors.load("starbucks", name)
    loss, bert, features = of_vectors(case)
    if checkpointing:
        bert.activation_checkpointing_enable()
        bert.train()
    value = loss(features, case["labels"])
    case.close(value, "loss")
    value.backward()
    for key in case.tensors:
        if key.startswith("grad."):
            case.close(bert.get_parameter(key[5:]).grad, key)
    sgd = torch.optim.SGD(loss.parameters(), case.hyperparameters["lr"])
    for _ in range(case.hyperparameters["steps"]):
        sgd.zero_grad()
        loss(features, case["labels"]).backward()
        sgd.step()
    for key in case.tensors:
        if key.startswith("after2."):
            case.close(bert.get_parameter(key[7:]), key)


@pytest.mark.parametrize("detach", [False, True])
def test_formula_and_gradient(model, detach):
    model.eval()
    labels = torch.tensor([0.2, 0.9], dtype=torch.float64)
    base = losses.CosineSimilarityLoss(model)
    weights = {"last_layer_weight": 2.0, "kl_div_weight": 0.7, "kl_temperature": 0.4}
    got = StarbucksLoss(model, base, PAIRS, detach_teacher=detach, **weights)(columns(model), labels)

    states = []  # of both columns, from transformers itself
    for features in columns(model):
        inputs = {name: features[name] for name in ("input_ids", "attention_mask")}
        hidden = model[0].auto_model(**inputs, output_hidden_states=True).hidden_states
        mask = features["attention_mask"][..., None].double()
        states.append([(h * mask).sum(1) / mask.sum(1) for h in hidden])

    def squared_error(layer, dim):
        a, b = (side[layer][:, :dim] for side in states)
        cosines = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
        return (cosines - labels.float()).square().mean()  # as sentence-transformers reads labels

    want = 2.0 * squared_error(3, 16)
    for layer, dim in PAIRS[:-1]:
        p, q = (torch.cat([side[n][:, :dim] for side in states]).softmax(1) for n in (3, layer))
        p = p.detach() if detach else p
        want = want + squared_error(layer, dim) + 0.4 * 0.7 * (p * (p.log() - q.log())).sum() / 4
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-12)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(*(torch.autograd.grad(value, parameters, allow_unused=True) for value in (got, want))):
        if b is not None:  # the pooler of BERT takes no part
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_states_of_inner_layers_pass_the_norm_that_follows_the_last():
    model = small_encoder(architecture="modernbert").eval()
    base, labels = losses.CosineSimilarityLoss(model), torch.tensor([0.2, 0.9])
    alone = StarbucksLoss(model, base, [(1, 4), (3, 16)], last_layer_weight=0.0, kl_div_weight=0.0)(columns(model), labels)
    a, b = [], []
    for features, side in zip(columns(model), (a, b)):
        inputs = {name: features[name] for name in ("input_ids", "attention_mask")}
        encoder = model[0].auto_model
        state = encoder.final_norm(encoder(**inputs, output_hidden_states=True).hidden_states[1])
        mask = features["attention_mask"][..., None].float()
        side.append(((state * mask).sum(1) / mask.sum(1))[:, :4])
    want = (torch.cosine_similarity(a[0], b[0]) - labels).square().mean()
    assert float(alone.detach()) == pytest.approx(float(want.detach()), rel=1e-5)


def test_without_the_divergence(model):
    base, y = losses.CoSENTLoss(model.eval()), torch.tensor([0.2, 0.9])
    without = StarbucksLoss(model, base, PAIRS, kl_temperature=0.0)(columns(model), y)
    assert without == StarbucksLoss(model, base, PAIRS, kl_div_weight=0.0)(columns(model), y)


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_the_model_is_as_it_was_also_after_an_error(architecture):
    model = small_encoder(architecture=architecture)
    assert (final_norm(model[0].auto_model) is not None) == (architecture == "modernbert")

    class Failing(nn.Module):
        def forward(self, features, labels):
            model(features[0])
            raise RuntimeError("on purpose")

    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="on purpose"):
        StarbucksLoss(model, Failing(), PAIRS)(columns(model))
    assert "forward" not in vars(model)
    assert "forward" not in vars(model[0])
    assert not model[0].auto_model.config.output_hidden_states
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    features = columns(model)
    StarbucksLoss(model, losses.MultipleNegativesRankingLoss(model), PAIRS)(features)
    assert all("all_layer_embeddings" not in column for column in features), "the caller's features are not written to"


def test_wrapped_models_and_half_precision(model):
    wrapped = nn.DataParallel(model.bfloat16().eval(), device_ids=[])
    loss = StarbucksLoss(wrapped, losses.CoSENTLoss(model), PAIRS)
    value = loss(columns(model), torch.tensor([0.1, 0.8]))
    assert torch.isfinite(value)
    wide = StarbucksLoss(model.float(), losses.CoSENTLoss(model), PAIRS)(columns(model), torch.tensor([0.1, 0.8]))
    assert value.item() == pytest.approx(wide.item(), rel=0.05)


def test_default_pairs():
    assert default_pairs(12, 768) == ((2, 24), (4, 48), (6, 96), (8, 192), (10, 384), (12, 768))
    assert default_pairs(1, 8) == ((1, 8),)
    for layers, width in ((3, 16), (22, 768), (40, 2), (6, 1)):
        assert check_pairs(default_pairs(layers, width), layers, width)[-1] == (layers, width)


def test_model_card(model):
    loss = StarbucksLoss(model, losses.CoSENTLoss(model), None)
    assert loss.get_config_dict()["pairs"] == [[1, 4], [2, 8], [3, 16]]
    assert loss.get_config_dict()["loss"] == "CoSENTLoss"
    assert "2410.13230" in loss.citation


@pytest.mark.parametrize(
    ("kind", "word", "pairs"),
    [
        (ValueError, "the last of pairs must be the whole model, (3, 16)", [(1, 4), (2, 8)]),
        (ValueError, "layers in [1, 3]", [(0, 4), (3, 16)]),
        (ValueError, "layers in [1, 3]", [(1, 4), (4, 16)]),
        (ValueError, "dimensions in [1, 16]", [(1, 0), (3, 16)]),
        (ValueError, "dimensions in [1, 16]", [(1, 4), (3, 17)]),
        (ValueError, "must grow", [(1, 4), (1, 8), (3, 16)]),
        (ValueError, "must grow", [(1, 16), (3, 16)]),
        (ValueError, "none", []),
        (TypeError, "two integers", [(1, 4.0), (3, 16)]),
        (TypeError, "two integers", [(1, 4, 2)]),
        (TypeError, "pairs", 3),
    ],
)
def test_pairs_that_are_refused(model, kind, word, pairs):
    with pytest.raises(kind) as error:
        StarbucksLoss(model, losses.CoSENTLoss(model), pairs)
    assert word in str(error.value)


def test_other_refusals(model):
    base = losses.CoSENTLoss(model)
    with pytest.raises(TypeError, match="must not cache gradients: CachedMultipleNegativesRankingLoss"):
        StarbucksLoss(model, losses.CachedMultipleNegativesRankingLoss(model), PAIRS)
    with pytest.raises(TypeError, match="needs a SentenceTransformer; got Linear"):
        StarbucksLoss(nn.Linear(2, 2), base, PAIRS)
    with pytest.raises(ValueError, match="kl_div_weight"):
        StarbucksLoss(model, base, PAIRS, kl_div_weight=-1.0)
    with pytest.raises(ValueError, match=r"dimensions in \[1, 16\]"):
        StarbucksLoss(model, base)  # the default is for 12 layers and 768 dimensions


@pytest.mark.slow
def test_it_trains_in_the_trainer_of_sentence_transformers(tmp_path):
    from datasets import Dataset

    model = small_encoder()
    rows = Dataset.from_dict(
        {"a": ["the cat sat", "a red bird"] * 8, "b": ["a cat", "a blue bird sang"] * 8, "label": [0.1, 0.9] * 8}
    )
    arguments = st.SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=8, learning_rate=1e-2, report_to=[], save_strategy="no", logging_steps=1, use_cpu=True
    )
    trainer = st.SentenceTransformerTrainer(
        model, arguments, train_dataset=rows, loss=StarbucksLoss(model, losses.CoSENTLoss(model), PAIRS)
    )
    trainer.train()
    falling = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert np.mean(falling[-2:]) < np.mean(falling[:2])


def test_one_pass_serves_all_pairs(model):
    calls = []
    model[0].auto_model.embeddings.register_forward_hook(lambda *_: calls.append(1))
    StarbucksLoss(model, losses.CoSENTLoss(model), PAIRS)(columns(model), torch.tensor([0.2, 0.9]))
    assert len(calls) == 2  # one for each column
    model(columns(model)[0])
    assert len(calls) == 3
