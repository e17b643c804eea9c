"""GaLore on all weights of a spread model: accelerate launch --multi_gpu --num_processes 2 scaling_accelerate.py"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from lowdim import models
from lowdim.linalg import gather
from lowdim.optim import GaLore, param_groups
from lowdim.surgery import shard

accelerator = Accelerator(cpu=not torch.cuda.is_available())
torch.manual_seed(0)
model = models.load_model("stories260k", "causal-lm").train().to(accelerator.device)
shard(model)
optimizer = GaLore(param_groups(model, rank=8), lr=1e-3, update_interval=4, layerwise=True)

tokenizer = models.load_tokenizer("stories260k")
texts = ["Once upon a time there was a cat.", "Tim has two red apples."] * 16
rows = tokenizer(texts, return_tensors="pt", padding=True)["input_ids"]
loader = accelerator.prepare(DataLoader(rows, batch_size=2))  # not the model: it is spread already
losses = []
for batch in loader:
    loss = model(input_ids=batch, labels=batch).loss
    accelerator.backward(loss)  # each weight is updated as soon as its gradient is there
    optimizer.step()
    losses.append(loss.item())

weights = {name: gather(value) for name, value in model.state_dict().items()}  # whole; every process calls it
if accelerator.is_main_process:
    torch.save(weights, "weights.pt")
    print(f"{accelerator.num_processes} processes, loss {losses[0]:.3f} -> {losses[-1]:.3f}")
accelerator.end_training()
