"""`lowdim compress`."""

import json
import re

import pytest

from lowdim import models


def test_compress(call, refused, tmp_path):
    common = ["compress", "--model", "stories260k", "--data", "lowdim:shakespeare", "--samples", "64", "--max-length", "32"]
    code, out, err = call(*common, "--out", tmp_path / "small", "--param-ratio", "0.8")
    assert (code, err) == (0, "")
    assert "perplexity on held-out blocks" in out
    files = {p.name for p in (tmp_path / "small").iterdir()}
    assert files >= {"config.json", "model.safetensors", "compression.json", "tokenizer.json"}
    record = json.loads((tmp_path / "small" / "compression.json").read_text())
    assert record["parameters"][1] < record["parameters"][0]
    assert models.load_model(str(tmp_path / "small"), "causal-lm")
    assert "is not empty" in refused(*common, "--out", tmp_path / "small")
    assert record["param_ratio"] == 0.8
    assert set(record["ranks"].values()) == {int(0.8 * i * o / (i + o)) for i, o in ((64, 32), (64, 64), (64, 172))}
    message = refused(*common, "--out", tmp_path / "x", "--param-ratio", "0")
    assert "option param_ratio of lord must be a number in (0, 1] or null; got 0" in message
    assert "--method must be one of lord, " in refused(*common, "--out", tmp_path / "x", "--method", "svd")
    assert "nm-decay acts while a model trains: a recipe of lowdim run with method: nm-decay" in refused(
        *common, "--out", tmp_path / "x", "--method", "nm-decay"
    )
    assert "--samples must be" in refused(*common[:5], "--out", tmp_path / "x", "--samples", "0")
    assert not (tmp_path / "x").exists()


def test_compress_the_cache(call, refused, tmp_path):
    """No weight changes; the ranks come back from the folder."""
    common = ["compress", "--model", "stories260k", "--data", "lowdim:shakespeare", "--samples", "16", "--max-length", "32"]
    common += ["--method", "matryoshka-kv", "--option", "key_ranks=4", "--option", "value_ranks=6"]
    code, out, err = call(*common, "--out", tmp_path / "small")
    assert (code, err) == (0, "")
    assert "320 -> 200 cached numbers per token" in out  # 5 layers, 4 KV heads of 8
    again = models.load_model(str(tmp_path / "small"), "causal-lm")
    assert again.model.layers[4].self_attn.lowdim_kv.ranks == ((4,) * 4, (6,) * 4)
    record = json.loads((tmp_path / "small" / "compression.json").read_text())
    assert record["perplexity"][0] != record["perplexity"][1]
    assert "leaves every weight as it is" in refused(*common, "--out", tmp_path / "dense", "--dense")
    assert not (tmp_path / "dense").exists()


def test_compress_by_weights(call, tmp_path):
    from lowdim.compress import LowRankLinear

    common = ["compress", "--model", "stories260k", "--data", "lowdim:shakespeare", "--method", "welore", "--max-length", "32"]
    code, out, err = call(*common, "--out", tmp_path / "small", "--target", "0.6")
    assert (code, err) == (0, "")
    assert "layers replaced" in out
    assert "; threshold 0." in out
    record = json.loads((tmp_path / "small" / "compression.json").read_text())
    assert (record["method"], record["target"]) == ("welore", 0.6)
    assert record["ranks"]
    assert 0 < record["threshold"] < 1
    assert len(record["perplexity"]) == 2
    small = models.load_model(str(tmp_path / "small"), "causal-lm")
    ranks = {name: m.rank for name, m in small.named_modules() if isinstance(m, LowRankLinear)}
    assert ranks == record["ranks"]
    assert sum(p.numel() for p in small.parameters()) == record["parameters"][1]
    code, out, err = call(*common, "--out", tmp_path / "again", "--threshold", record["threshold"])
    assert (code, err) == (0, "")
    again = json.loads((tmp_path / "again" / "compression.json").read_text())
    assert (again["ranks"], again["target"]) == (record["ranks"], None)


def test_compress_then_tune(call, tmp_path):
    common = ["compress", "--model", "stories260k", "--data", "lowdim:shakespeare", "--method", "welore", "--max-length", "32"]
    tuning = ["--target", "0.6", "--tune-steps", "6", "--lr", "3e-3", "--samples", "64"]
    code, out, err = call(*common, *tuning, "--out", tmp_path / "small")
    assert (code, err) == (0, "")
    assert "(tuned)" in out
    record = json.loads((tmp_path / "small" / "compression.json").read_text())
    assert (record["tune_steps"], record["lr"], len(record["losses"])) == (6, 3e-3, 6)
    assert record["trained"] < record["parameters"][1]
    dense, compressed, tuned = record["perplexity"]
    assert dense < compressed
    assert tuned < compressed
    code, _, err = call(*common, "--tune-steps", "6", "--lr", "1e9", "--out", tmp_path / "x", "--target", "0.6")
    assert code != 0
    assert "try a smaller --lr than 1e+09" in err
    assert not (tmp_path / "x").exists()


def test_compress_then_teach(call, tmp_path):
    common = ["compress", "--model", "stories260k", "--data", "lowdim:shakespeare", "--method", "pela", "--max-length", "32"]
    code, out, err = call(*common, "--stage", "8", "--lr", "3e-3", "--samples", "64", "--out", tmp_path / "small")
    assert (code, err) == (0, "")
    assert "(taught)" in out
    record = json.loads((tmp_path / "small" / "compression.json").read_text())
    assert (record["stage_steps"], record["lr"], len(record["losses"])) == (8, 3e-3, 8)
    assert record["trained"] == record["parameters"][1]  # the whole student
    dense, compressed, taught = record["perplexity"]
    assert dense < compressed
    assert taught < 0.2 * compressed
    assert models.load_model(str(tmp_path / "small"), "causal-lm").num_parameters() == record["parameters"][1]


def test_compress_with_stages_of_its_own(call, refused, tmp_path):
    common = ["compress", "--model", "stories260k", "--data", "lowdim:shakespeare", "--method", "lr2vq", "--max-length", "32"]
    assert "layer model.layers.0.mlp.down_proj has 172" in refused(*common, "--out", tmp_path / "x")
    sizes = ["--option", "subvector_size=4", "--option", "codebook_size=32", "--option", "clustering_dim=3"]
    training = ["--option", "train_steps=6", "--option", "lr=3e-3", "--samples", "64", "--tune-steps", "4"]
    code, out, err = call(*common, *sizes, *training, "--out", tmp_path / "small")
    assert (code, err) == (0, "")
    assert "906,240 -> 50,520 bytes in them" in out  # five bits for four weights, and a small table for each layer
    assert "; ratio 17.9" in out
    record = json.loads((tmp_path / "small" / "compression.json").read_text())
    assert set(record["ranks"].values()) == {None}
    assert len(record["losses"]) == 4
    assert len(record["perplexity"]) == 3
    assert models.load_model(str(tmp_path / "small"), "causal-lm")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--target", "0.5"], "lord has no option 'target' (welore has); nearest: "),
        (["--option", "param_rato=0.5"], "lord has no option 'param_rato'; nearest: param_ratio (a number in (0, 1] or null)"),
        (["--method", "welore", "--param-ratio", "0.7"], "welore has no option 'param_ratio' (lord has); nearest: "),
        (["--option", "rank=8", "--option", "rank_ratio=0.5"], "exactly one of rank, rank_ratio and param_ratio must be given"),
        (["--option", "rank=8", "--option", "rank=9"], "option rank of lord is given more than once"),
        (["--option", "rank=eight"], "option rank of lord must be a whole number >= 1 or a mapping or null; got 'eight'"),
        (["--option", "centered=2"], "option centered of lord must be true or false; got 2"),
        (["--option", "rank"], "--option must be name=value; got 'rank'"),
        (["--option", "rank={"], "option rank of lord: '{' is not YAML"),
        (["--tune-steps", "5"], "--tune-steps: lord leaves no parameters to tune"),
        (["--method", "welore", "--target", "0.5", "--threshold", "0.2"], "exactly one of target and threshold must be given"),
        (["--method", "welore", "--target", "1"], "option target of welore must be a number in (0, 1) or null; got 1"),
        (["--method", "welore", "--threshold", "2"], "option threshold of welore must be a number in [0, 1] or null"),
        (["--method", "welore", "--samples", "5"], "--samples is only used for tuning, since welore needs no samples"),
        (["--method", "welore", "--lr", "0.1"], "--lr is only used for tuning; add --tune-steps"),
        (["--method", "welore", "--stage", "5"], "--stage: welore has no stage in which the dense model teaches"),
        (
            ["--method", "pela", "--tune-steps", "5"],
            "--tune-steps: pela leaves no parameters to tune; fine-tune",
        ),
        (["--method", "pela", "--samples", "5"], "--samples is only used for tuning, since pela needs no samples; add --stage"),
        (["--method", "wina", "--samples", "5"], "only used for tuning, since wina needs no samples; leave it out"),
        (
            ["--method", "wina", "--stage", "5"],
            "--stage: wina has no stage in which the dense model teaches; --method pela has one",
        ),
        (["--method", "pela", "--stage", "0"], "--stage must be an int >= 1"),
        (["--method", "welore", "--tune-steps", "0"], "--tune-steps must be an int >= 1"),
        (["--method", "welore", "--tune-steps", "5", "--lr", "0"], "--lr must be a finite number"),
    ],
)
def test_compress_refuses_what_it_would_not_use(options, part, refused, tmp_path):
    common = ["compress", "--model", "stories260k", "--data", "lowdim:shakespeare", "--out", tmp_path / "x"]
    assert part in refused(*common, *options)
    assert not (tmp_path / "x").exists()


def test_compress_with_ratios_by_layer(call, refused, tmp_path):
    """Each layer's share is printed and recorded; the mean is that of the method."""
    common = ["compress", "--model", "stories260k", "--data", "lowdim:shakespeare", "--max-length", "32", "--method", "wina"]
    code, out, err = call(*common, "--out", tmp_path / "small", "--ratios", "farms", "--option", "sparsity=0.4")
    assert (code, err) == (0, "")
    record = json.loads((tmp_path / "small" / "compression.json").read_text())
    shares = record["sparsity"]
    assert record["ratios"] == "farms"
    assert len(shares) == 35
    assert max(shares.values()) - min(shares.values()) > 0.05
    for name, share in shares.items():
        assert re.search(rf"{re.escape(name)} .* {share:.0%} of its inputs left out", out)
    size = {"q_proj": 64 * 64, "o_proj": 64 * 64, "k_proj": 32 * 64, "v_proj": 32 * 64}
    sizes = {name: size.get(name.rpartition(".")[2], 172 * 64) for name in shares}
    assert abs(sum(shares[n] * sizes[n] for n in shares) / sum(sizes.values()) - 0.4) < 1e-9
    assert "lord has no ratio by layer; wina has" in refused(*common[:-1], "lord", "--out", tmp_path / "x", "--ratios", "farms")
    assert "--ratios must be one of uniform, farms" in refused(*common, "--out", tmp_path / "x", "--ratios", "farm")
    assert not (tmp_path / "x").exists()
