"""`lowdim diagnose`."""

import json

from lowdim import models


def test_diagnose(call, refused, finished, tmp_path):
    assert call("export", finished, tmp_path / "merged", "--format", "merged")[0] == 0
    base = models.resolve("stories260k").path
    common = ["diagnose", "intruders", "--base", base, "--tuned"]
    code, out, err = call(*common, tmp_path / "merged", "--k", "2", "--out", tmp_path / "r.json")
    assert (code, err) == (0, "")
    assert "intruder dimensions among the first 2" in out
    assert json.loads((tmp_path / "r.json").read_text())
    (tmp_path / "mine.json").write_text('{"mine": 1}')
    assert "was not written by lowdim" in refused(*common, tmp_path / "merged", "--out", tmp_path / "mine.json")
    assert call(*common, tmp_path / "merged", "--k", "2", "--out", tmp_path / "r.json")[0] == 0
    assert (
        call(*common, tmp_path / "merged", "--option", "k=2", "--option", "threshold=5e-1", "--out", tmp_path / "s.json")[0]
        == 0
    )
    assert (tmp_path / "s.json").read_text() == (tmp_path / "r.json").read_text()
    assert "diagnostic must be one of batch-lr, farms, generalization-dynamics, intrinsic-dimension, intruders" in refused(
        "diagnose", "intruder", "--base", base, "--tuned", base
    )
    assert "option k of intruders must be a whole number >= 1; got 0" in refused(*common, base, "--k", "0")
    assert "option threshold of intruders must be a number in (0, 1]; got 2" in refused(*common, base, "--threshold", "2")
    assert "intruders has no option 'treshold'; nearest: threshold (a number in (0, 1])" in refused(
        *common, base, "--option", "treshold=0.2"
    )
    assert "intruders measures --base and --tuned; missing: --tuned" in refused("diagnose", "intruders", "--base", base)
    assert "option k of intruders is given more than once" in refused(*common, base, "--k", "1", "--option", "k=2")
    assert "intruders does not take MODEL; it measures --base and --tuned" in refused("diagnose", "intruders", base)
    assert "no such folder" in refused("diagnose", "intruders", "--base", "./nowhere", "--tuned", base)


def test_farms(call, refused, finished, tmp_path):
    base = models.resolve("stories260k").path
    code, out, err = call("diagnose", "farms", base, "--option", "rows=32", "--out", tmp_path / "f.json")
    assert (code, err) == (0, "")
    assert "alpha" in out
    record = json.loads((tmp_path / "f.json").read_text())
    assert len(record["layers"]) > 5
    assert "embed" in record["skipped"]["model.embed_tokens.weight"]
    assert call("diagnose", "farms", finished / "adapter", "--option", "rows=32")[0] == 0  # an adapter's folder, on its base
    assert "farms measures MODEL; missing: MODEL" in refused("diagnose", "farms")
    assert "farms does not take --base" in refused("diagnose", "farms", base, "--base", base)
    assert "option rows of farms must be a whole number >= 1; got 0" in refused("diagnose", "farms", base, "--option", "rows=0")


def test_lora_limits(call, refused, finished, tmp_path):
    code, out, _ = call("diagnose", "lora-limits", finished, "--data", "lowdim:shakespeare", "--out", tmp_path / "l.json")
    assert code == 0
    assert "heads below" in out
    heads = json.loads((tmp_path / "l.json").read_text())["heads"]
    assert max(head["limits"]["norms"]["q_adapter"] for head in heads) > 0
    assert "lora-limits measures MODEL and --data; missing: --data" in refused("diagnose", "lora-limits", finished)


def test_all(call, refused, finished, tmp_path):
    common = ("diagnose", "all", finished, "--base", "stories260k", "--option", "rows=32")
    code, out, _ = call(*common, "--data", "lowdim:shakespeare", "--k", "4", "--out", tmp_path / "page")
    assert code == 0
    assert "intruders" in out
    record = json.loads((tmp_path / "page" / "diagnose.json").read_text())
    assert record["k"] == 4
    assert record["on_data"]["lora-limits"]["heads"]
    curvature = record["on_data"]["batch-lr"]
    assert curvature["measured_lr"] == 2 / curvature["measured_largest"]
    assert curvature["largest_bound"] >= 0
    assert "a labelled text file" in record["not_measured"]["generalization-dynamics"]
    assert max(row["strength"] for row in record["layers"]) > 0
    assert "What tuning did to stories260k" in (tmp_path / "page" / "diagnose.html").read_text()
    assert (tmp_path / "page" / "layers.csv").read_text().startswith("name,shape,alpha")
    assert "is not empty" in refused(*common, "--out", tmp_path / "page")
    assert "missing: MODEL" in refused("diagnose", "all")
    assert "option rows of all must be a whole number >= 1" in refused("diagnose", "all", "stories260k", "--option", "rows=0")
    assert "all has no option 'row'" in refused("diagnose", "all", "stories260k", "--option", "row=3")
    assert "--base" in refused("diagnose", "all", "stories260k", "--tuned", "stories260k")


def test_curvature(call, refused, tmp_path):
    short = ["--option", "samples=8", "--option", "max_length=16", "--option", "steps=3", "--option", "batches=1"]
    common = ["diagnose", "batch-lr", "stories260k", "--data", "lowdim:shakespeare", *short]
    code, out, err = call(*common, "--batch-size", "4", "--optimizer", "adam", "--out", tmp_path / "b.json")
    assert (code, err) == (0, "")
    assert "largest stable rate of adam" in out
    record = json.loads((tmp_path / "b.json").read_text())
    assert (record["batch_size"], record["n_data"], record["optimizer"]) == (4, 8, "adam")
    assert "batch-lr needs --option batch_size=…, a whole number >= 1: rows of a batch" in refused(*common)
    assert "batch-lr measures MODEL and --data; missing: --data" in refused("diagnose", "batch-lr", "stories260k")
    assert "batch_size must be an int in [1, 8]; got 9" in refused(*common, "--batch-size", "9")


def test_all_on_labelled_texts(call, bert_folder, two_classes, tmp_path):
    code, _, _ = call("diagnose", "all", bert_folder, "--data", two_classes, "--option", "rows=8", "--out", tmp_path / "page")
    assert code == 0
    found = json.loads((tmp_path / "page" / "diagnose.json").read_text())["on_data"]["generalization-dynamics"]
    assert found["best_time"] is not None
    assert found["frozen_dim"] == found["features"] - found["rank"]
    assert "Over-training of a readout" in (tmp_path / "page" / "diagnose.html").read_text()


def test_generalization(call, bert_folder, two_classes, tmp_path):
    common = ["diagnose", "generalization-dynamics", bert_folder, "--data", two_classes, "--option", "samples=40"]
    code, out, err = call(*common, "--layer", "bert.embeddings", "--out", tmp_path / "g.json")
    assert (code, err) == (0, "")
    assert "30 samples" in out
    assert json.loads((tmp_path / "g.json").read_text())["samples"] == 30


def test_intrinsic_dimension(call, refused, bert_folder, two_classes, tmp_path):
    made = {
        "model": str(bert_folder),
        "task": "classify",
        "method": "full",
        "data": [str(two_classes)],
        "out": str(tmp_path / "o"),
    }
    (tmp_path / "r.yaml").write_text(json.dumps({**made, "steps": 2, "batch_size": 8, "max_length": 16, "limit": 40}))
    common = ["diagnose", "intrinsic-dimension", tmp_path / "r.yaml"]
    code, out, err = call(*common, "--dims", "4,16", "--search", "bisect", "--seeds", "1", "--out", tmp_path / "i.json")
    assert (code, err) == (0, "")
    assert "trainings done, at most" in out
    assert json.loads((tmp_path / "i.json").read_text())["measured"] <= 2
    assert "dims must be an int >= 1; got 0" in refused(*common, "--dims", "0")
