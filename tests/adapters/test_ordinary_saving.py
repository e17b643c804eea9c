"""An adapted or compressed model that is saved the ordinary way: what is written loads again, or the right call is named."""

import copy

import pytest
import torch

import lowdim
import tiny
from lowdim.adapters import SAID, AdapterSet, LaMDA, LoRA, SoRA
from lowdim.errors import CheckpointError
from lowdim.testing.closeness import relative_error

transformers = pytest.importorskip("transformers")
IDS = torch.arange(3, 19).view(2, 8)


def llama(**changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tiny.llama(2, **changes)


def trained(adapted):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapted.trainable().values():
            parameter.add_((0.05 * torch.randn(parameter.shape, generator=generator)).to(parameter))
    return adapted


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("method", [LoRA(rank=2), LaMDA(rank=2), SAID(dimension=50)], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("way", ["save_pretrained", "push_to_hub", "deep copy"])
def test_an_adapted_model_is_refused_with_the_right_calls(method, way, tmp_path):
    adapted = trained(lowdim.adapt(llama(), method))
    model = copy.deepcopy(adapted.model) if way == "deep copy" else adapted.model
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has an adapter.*adapted\.save\(folder\).*adapted\.merge\(\)"):
        model.push_to_hub("someone/model") if way == "push_to_hub" else model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_is_refused_whose_part_is_adapted(tmp_path):
    whole = llama()
    lowdim.adapt(whole.model, LoRA(rank=2))
    with pytest.raises(ValueError, match="has an adapter"):
        whole.save_pretrained(tmp_path / "out")


def test_merging_frees_the_way_and_undoing_closes_it(tmp_path):
    adapted = trained(lowdim.adapt(llama(), LoRA(rank=2)))
    want = logits(adapted.model)
    adapted.merge().save_pretrained(tmp_path)
    assert relative_error(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)), want) < 1e-5
    adapted.unmerge()
    with pytest.raises(ValueError, match="has an adapter"):
        adapted.model.save_pretrained(tmp_path / "again")


def test_several_adapters(tmp_path):
    adapters = AdapterSet(llama())
    adapters.add("one", LoRA(rank=1))
    adapters.add("two", LoRA(rank=2))
    with pytest.raises(ValueError, match="has an adapter"):
        adapters.model.save_pretrained(tmp_path)
    adapters.delete("one")
    adapters.delete("two")
    adapters.model.save_pretrained(tmp_path)
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)), logits(llama()))


def test_a_plain_model_is_written_as_ever(tmp_path):
    llama().save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("name", ["welore", "lord"])
def test_a_compressed_model_that_nobody_prepared(name, tmp_path):
    from lowdim import compress

    batches = [{"input_ids": IDS}]
    if name == "welore":
        model = compress.welore(llama(), compress.WeLoreConfig(threshold=0.6))
    else:
        model = compress.lord(llama(), compress.LoRDConfig(rank=8), batches=batches)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_a_structured_layer_that_a_file_cannot_describe(tmp_path):
    from lowdim.layers import Monarch, swap_linear

    model = llama()
    assert swap_linear(model, Monarch, target_modules=["q_proj"])
    try:
        model.save_pretrained(tmp_path / "out")
    except lowdim.errors.LowdimError as error:
        assert "dense=True" in str(error)  # noqa: PT017
    else:
        assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


# transformers.Trainer


def trainer(adapted, folder, steps, callback=True, **options):
    from lowdim.train import AdaptedCallback

    data = [
        {"input_ids": row, "labels": row} for row in torch.randint(3, 40, (8, 8), generator=torch.Generator().manual_seed(4))
    ]
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        **options,
    )
    callbacks = [AdaptedCallback(adapted)] if callback else []
    return transformers.Trainer(adapted.model, arguments, train_dataset=data, eval_dataset=data[:2], callbacks=callbacks)


@pytest.mark.parametrize(
    "method", [LoRA(rank=2), LaMDA(rank=2), SoRA(rank=2), SAID(dimension=50)], ids=lambda m: type(m).__name__
)
def test_a_checkpoint_holds_the_adapter_and_is_resumed(method, tmp_path):
    whole = lowdim.adapt(llama(), method)
    trainer(whole, tmp_path / "whole", 4).train()

    first = lowdim.adapt(llama(), method)
    trainer(first, tmp_path / "parts", 2).train()
    checkpoint = tmp_path / "parts" / "checkpoint-2"
    loaded = lowdim.load_adapter(llama(), checkpoint)
    assert torch.equal(logits(loaded.model), logits(first.model))
    with pytest.raises(CheckpointError, match=r"load the base model, then lowdim\.load_adapter\(model, folder\)"):
        transformers.AutoModelForCausalLM.from_pretrained(checkpoint)

    second = lowdim.adapt(llama(), method)
    trainer(second, tmp_path / "parts", 4).train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(logits(second.model), logits(whole.model))


def test_without_the_callback_the_first_checkpoint_says_so(tmp_path):
    adapted = lowdim.adapt(llama(), LoRA(rank=2))
    with pytest.raises(ValueError, match=r"callbacks=\[lowdim\.train\.AdaptedCallback\(adapted\)\]"):
        trainer(adapted, tmp_path, 2, callback=False).train()


def test_after_the_training_saving_is_the_users(tmp_path):
    adapted = lowdim.adapt(llama(), LoRA(rank=2))
    done = trainer(adapted, tmp_path, 1, save_strategy="no")
    done.train()
    with pytest.raises(ValueError, match="has an adapter"):
        done.save_model(tmp_path / "out")
    adapted.merge()
    done.save_model(tmp_path / "out")
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(adapted.model))


def test_the_best_checkpoint_is_loaded(tmp_path):
    adapted = lowdim.adapt(llama(), LoRA(rank=2))
    fit = trainer(adapted, tmp_path, 4, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2)
    fit.train()
    best = lowdim.load_adapter(llama(), fit.state.best_model_checkpoint)
    assert torch.equal(logits(best.model), logits(adapted.model))


def test_the_mixins_checkpoints_hold_the_adapter(tmp_path):
    from lowdim.train import AdaptedTrainerMixin

    class AdaptedTrainer(AdaptedTrainerMixin, transformers.Trainer):
        pass

    adapted = lowdim.adapt(llama(), LoRA(rank=2))
    plain = trainer(adapted, tmp_path, 2, callback=False)
    fit = AdaptedTrainer(adapted.model, plain.args, train_dataset=plain.train_dataset, adapted=adapted)
    fit.train()
    loaded = lowdim.load_adapter(llama(), tmp_path / "checkpoint-2")
    assert torch.equal(logits(loaded.model), logits(adapted.model))
    with pytest.raises(ValueError, match="has an adapter"):
        fit.save_model(tmp_path / "out")
