"""transformers.Trainer with an adapted, spread model: torchrun --nproc-per-node 2 scaling_trainer.py"""

import torch
from transformers import Trainer, TrainingArguments

import lowdim
from lowdim import models
from lowdim.surgery import shard
from lowdim.train import AdaptedTrainerMixin


class AdaptedTrainer(AdaptedTrainerMixin, Trainer):
    pass


arguments = TrainingArguments(  # starts the process group
    "trainer-out", max_steps=8, learning_rate=1e-2, per_device_train_batch_size=2, save_strategy="no", report_to="none",
    use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
)  # fmt: skip
model = models.load_model("stories260k", "causal-lm").to(arguments.device)
adapted = lowdim.adapt(model, lowdim.adapters.SoRA(rank=4), seed=0)
shard(model)

tokenizer = models.load_tokenizer("stories260k")
ids = tokenizer(["Once upon a time there was a cat.", "Tim has two red apples."] * 16, padding=True)["input_ids"]
rows = [{"input_ids": row, "labels": row} for row in ids]
trainer = AdaptedTrainer(model, arguments, train_dataset=rows, adapted=adapted)
print(f"process {arguments.process_index}: loss {trainer.train().training_loss:.3f}")
adapted.save("trainer-adapter")
