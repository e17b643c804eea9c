import json

import numpy as np
import pytest
import torch
from torch import nn

from lowdim.represent import shrink_encoder
from lowdim.testing.small_encoder import small_encoder

st = pytest.importorskip("sentence_transformers", reason="what is cut is a SentenceTransformer")
TEXTS = ["the cat sat", "a dog ran under the old tree", "blue", "a red bird sang"]


@pytest.fixture(scope="module", params=[("bert", False), ("bert", True), ("modernbert", True)], ids=str)
def encoder(request):
    return small_encoder(architecture=request.param[0], normalize=request.param[1])


@torch.no_grad()
def of_whole(model, layers, dim):
    """The embedding at (layers, dim) from the whole model's hidden states."""
    found = []
    for text in TEXTS:
        features = model.preprocess([text])
        encoder = model[0].auto_model
        inputs = {name: features[name] for name in ("input_ids", "attention_mask")}
        states = encoder(**inputs, output_hidden_states=True).hidden_states
        state = states[layers]
        if hasattr(encoder, "final_norm") and layers < len(states) - 1:
            state = encoder.final_norm(state)
        pooled = state[0].mean(0)
        found.append(nn.functional.normalize(pooled, dim=0)[:dim] if len(model) == 3 else pooled[:dim])
    return torch.stack(found).numpy()


@pytest.mark.parametrize(("layers", "dim"), [(2, 5), (3, 16)])
@pytest.mark.parametrize("head", ["truncate", "dense"])
def test_a_cut_model_is_the_whole_one_at_that_pair(encoder, layers, dim, head, tmp_path):
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    small = shrink_encoder(encoder, layers, dim, head=head)
    types = getattr(encoder[0].auto_model.config, "layer_types", [])
    assert getattr(small[0].auto_model.config, "layer_types", []) == types[:layers]
    want = of_whole(encoder, layers, dim)
    if head == "dense":
        want = want / np.linalg.norm(want, axis=1, keepdims=True)
    assert np.abs(small.encode(TEXTS) - want).max() < 1e-6
    small.save_pretrained(str(tmp_path))
    loaded = st.SentenceTransformer(str(tmp_path), trust_remote_code=False, device="cpu")
    assert np.array_equal(loaded.encode(TEXTS), small.encode(TEXTS))
    assert loaded.get_embedding_dimension() == dim
    kinds = [module["type"] for module in json.loads((tmp_path / "modules.json").read_text())]
    assert all(kind.startswith("sentence_transformers.") for kind in kinds)
    # The whole model is as it was.
    assert len(encoder.state_dict()) == len(before)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert encoder.get_embedding_dimension() == 16


def test_dense_gives_unit_vectors_and_truncate_does_not(encoder):
    lengths = [np.linalg.norm(shrink_encoder(encoder, 2, 4, head=head).encode(TEXTS), axis=1) for head in ("dense", "truncate")]
    assert np.allclose(lengths[0], 1, atol=1e-6)
    assert not np.allclose(lengths[1], 1, atol=1e-3)
    unit = shrink_encoder(encoder, 2, 4).encode(TEXTS, normalize_embeddings=True)
    assert np.allclose(unit, shrink_encoder(encoder, 2, 4, head="dense").encode(TEXTS), atol=1e-6)


def test_lists_of_layers_in_the_configuration_are_cut():
    config = shrink_encoder(small_encoder(architecture="modernbert"), 2, 4)[0].auto_model.config
    assert config.num_hidden_layers == len(config.layer_types) == 2


def test_a_model_that_is_cut_already():
    once = shrink_encoder(small_encoder(), 2, 8)
    twice = shrink_encoder(once, 1, 4)
    assert np.array_equal(twice.encode(TEXTS), shrink_encoder(small_encoder(), 1, 4).encode(TEXTS))
    with pytest.raises(ValueError, match=r"dim must be an int in \[1, 8\]"):
        shrink_encoder(once, 1, 9)


def test_refusals(encoder):
    for layers in (0, 4, 1.0):
        with pytest.raises(ValueError, match=r"layers must be an int in \[1, 3\]"):
            shrink_encoder(encoder, layers, 4)
    with pytest.raises(ValueError, match=r"dim must be an int in \[1, 16\]"):
        shrink_encoder(encoder, 1, 17)
    with pytest.raises(ValueError, match="head must be one of truncate, dense"):
        shrink_encoder(encoder, 1, 4, head="cut")
    with pytest.raises(TypeError, match="got Linear"):
        shrink_encoder(nn.Linear(2, 2), 1, 1)
    with pytest.raises(TypeError, match="first module is a Transformer"):
        shrink_encoder(st.SentenceTransformer(modules=[st.sentence_transformer.modules.LayerNorm(4)]), 1, 1)


def test_layers_that_are_in_no_list():
    model = small_encoder(layers=2)
    model[0].auto_model.config.num_hidden_layers = 5
    with pytest.raises(TypeError, match="no list of its 5 layers"):
        shrink_encoder(model, 1, 4)
