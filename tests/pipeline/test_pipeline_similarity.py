"""The task of sentence encoders: cosines of mean-pooled states against scores, and a pipeline over a tiny BERT."""

import json
import random

import pytest
import torch
from scipy.stats import spearmanr

import tiny
from lowdim.errors import DataError
from lowdim.pipeline import PipelineRecipe, run_pipeline
from lowdim.pipeline.similarity import similarity
from lowdim.pipeline.subject import load_subject

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:few calibration tokens")
WORDS = (*tiny.PLAIN, *tiny.GOOD, *tiny.BAD)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A sentence encoder and pairs whose score is the number of words that both texts have."""
    folder = tmp_path_factory.mktemp("similarity")
    tiny.save_bert(folder / "bert", pooled=True)
    draw = random.Random(0)
    rows = []
    for _ in range(60):
        one = draw.sample(WORDS, 6)
        shared = draw.randint(0, 6)
        two = one[:shared] + draw.sample([word for word in WORDS if word not in one], 6 - shared)
        rows.append({"sentence1": " ".join(one), "sentence2": " ".join(two), "score": shared})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def recipe(place, **changes):
    common = {"model": str(place / "bert"), "task": "similarity", "data": str(place / "pairs.jsonl"), "samples": 16}
    return PipelineRecipe(**{**common, "steps": [{"step": "quantize"}], "out": str(place / "out"), **changes})


def cosines(model, rows):
    """Row by row, without padding."""
    found = []
    for row in rows:
        sides = [model(torch.tensor(row[side])[None]).last_hidden_state[0].mean(0) for side in ("first", "second")]
        found.append(float(torch.cosine_similarity(*sides, dim=0)))
    return found


@torch.no_grad()
def test_the_score_is_the_rank_correlation_of_cosines(place):
    subject = load_subject(recipe(place))
    model = subject.dense()
    rows = subject.task.test
    assert {len(row["first"]) for row in rows} == {8}
    want = spearmanr([row["labels"] for row in rows], cosines(model, rows)).statistic
    found = subject.task.score(model, rows, subject.metric)
    assert found.value == pytest.approx(want, abs=1e-6)
    assert len(found.values) == len(rows)
    batch = subject.task.collate(subject.task.train[:5])
    wanted = torch.tensor([row["labels"] / 6 for row in subject.task.train[:5]])
    loss = (torch.tensor(cosines(model, subject.task.train[:5])) - wanted).square().mean()
    assert float(subject.task.loss_fn(model, batch)) == pytest.approx(float(loss), rel=1e-4)


def test_a_pipeline_over_an_encoder(place):
    pytest.importorskip("torchao")
    steps = [
        {"step": "decompose", "budget": "0.85x", "options": {"exclude": ["embed", "pooler", "attention"]}},
        {"step": "tune", "steps": 3, "lr": 1e-3},
        {"step": "quantize", "scheme": "int8"},
        {"step": "export"},
    ]
    record = run_pipeline(recipe(place, steps=steps))
    assert record.metric == "spearman"
    assert all(-1 <= step.score <= 1 and step.cache_bytes is None for step in record.steps)
    assert record.steps[-1].disk_bytes < 0.8 * record.steps[0].disk_bytes
    folder = place / "out" / "model"
    assert (folder / "1_Pooling" / "config.json").is_file()
    subject = load_subject(recipe(place))
    again = transformers.AutoModel.from_pretrained(folder).eval()
    assert subject.task.evaluate(again, subject.task.test, subject.metric) == pytest.approx(record.steps[-1].score, abs=1e-6)


def test_bad_data(place, tmp_path):
    single = tmp_path / "single.jsonl"
    single.write_text("\n".join(json.dumps({"text": f"the film {i}", "score": i}) for i in range(9)), encoding="utf-8")
    with pytest.raises(DataError, match="single texts; task similarity needs pairs"):
        load_subject(recipe(place, data=str(single)))
    flat = tmp_path / "flat.jsonl"
    rows = [{"sentence1": f"the film {a} {b}", "sentence2": "a plot", "score": 2.0} for a in WORDS for b in WORDS[:2]]
    flat.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "bert")
    with pytest.raises(DataError, match="all scores are 2"):
        similarity(tokenizer, [flat])
    with pytest.raises(DataError, match="needs a sentence-transformers model"):
        load_subject(recipe(place, model="stories260k"))
