"""docs/from-peft.md runs from its top to its end in one folder, and what it says of both libraries is so."""

import json

import pytest
import torch

from lowdim import models
from lowdim.testing.closeness import relative_error
from snippets import ROOT, Block, blocks, commands, exit_code

peft = pytest.importorskip("peft")

PAGE = ROOT / "docs" / "from-peft.md"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder and the names that the page leaves."""
    folder = tmp_path_factory.mktemp("page")
    lines = {int(where.rpartition(":")[2]): arguments for where, arguments in commands(PAGE)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        known: dict = {"__name__": "__main__"}
        for block in blocks(PAGE, "py", "console"):
            if block.language == "py":
                exec(compile("\n" * block.line + block.body, str(PAGE), "exec"), known)
            else:
                for line in range(block.line, block.line + block.body.count("\n") + 1):
                    if line in lines:
                        assert exit_code(lines[line]) == 0, lines[line]
        yield folder, known


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def bare():
    return models.load_model("stories260k", "causal-lm")


def test_the_page_runs_and_peft_agrees_with_what_came_in(ran):
    folder, known = ran
    want = logits(peft.PeftModel.from_pretrained(bare(), str(folder / "from-peft")), known["text"])
    assert relative_error(logits(known["adapted"].model, known["text"]), want) < 1e-5
    assert relative_error(want, logits(bare(), known["text"])) > 1e-3
    from transformers import AutoModelForCausalLM

    with models.quiet():
        merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
        again = peft.PeftModel.from_pretrained(bare(), str(folder / "again"))
    assert relative_error(logits(merged, known["text"]), want) < 1e-5
    assert relative_error(logits(again, known["text"]), want) < 1e-5


def test_both_trainings_have_the_same_size(ran):
    _, known = ran
    trained = sum(p.numel() for p in known["adapted"].trainable().values())
    model = peft.get_peft_model(bare(), peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_cut_is_recorded(ran):
    folder, known = ran
    for name in ("small", "small-too"):
        rows = json.loads((folder / name / "ranks.json").read_text())["layers"]
        assert {(row["rank"], row["whole_rank"]) for row in rows} == {(4, 8)}
    assert [row["error"] for row in rows] == [row["error"] for row in known["cut"].rows()]
    assert all(row["error"] <= 0.05 for row in json.loads((folder / "close" / "ranks.json").read_text())["layers"])


def test_cat_and_svd_are_what_combine_does(ran):
    folder, known = ran
    model = peft.PeftModel.from_pretrained(bare(), str(folder / "from-peft"), adapter_name="verse")
    model.load_adapter(str(folder / "for-peft"), "prose")
    layer = "model.layers.0.self_attn.q_proj"
    found = model.base_model.model.get_submodule(layer)
    for name, kind in (("both", "cat"), ("small", "svd")):
        model.add_weighted_adapter(["verse", "prose"], [0.7, 0.3], name, kind, **({"svd_rank": 4} if kind == "svd" else {}))
        got = known["adapters"][name].layers[layer].update.delta()
        assert relative_error(got, found.get_delta_weight(name)) < 1e-4, kind
    model.add_weighted_adapter(["verse", "prose"], [0.7, 0.3], "linear", "linear")
    assert relative_error(found.get_delta_weight("linear"), known["adapters"]["both"].layers[layer].update.delta()) > 0.05


def test_names_of_peft_that_the_page_uses_exist():
    text = PAGE.read_text(encoding="utf-8")
    from peft import PeftModel
    from peft.tuners.lora import LoraModel
    from peft.utils.hotswap import hotswap_adapter

    assert hotswap_adapter.__name__ in text
    for name in ("save_pretrained", "from_pretrained", "load_adapter", "set_adapter", "disable_adapter", "delete_adapter"):
        assert name in text
        assert hasattr(PeftModel, name)
    for name in ("merge_and_unload", "merge_adapter", "unmerge_adapter", "add_weighted_adapter"):
        assert name in text
        assert hasattr(LoraModel, name)


def test_every_block_of_the_page_is_run():
    languages = {block.language for block in _all_blocks()}
    assert languages == {"py", "console"}


def _all_blocks() -> list[Block]:
    return blocks(PAGE, *{"py", "python", "console", "bash", "sh", "text", "json", "yaml", ""})
