"""An adapter on a model that is spread over the processes: torchrun --nproc-per-node 2 scaling_torchrun.py"""

import os

import torch
import torch.distributed as dist

import lowdim
from lowdim import models
from lowdim.surgery import shard

gpu = torch.cuda.is_available()
if gpu:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl" if gpu else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()

model = models.load_model("stories260k", "causal-lm").train()
adapted = lowdim.adapt(model, lowdim.adapters.LoRA(rank=4), seed=0)  # reads whole weights; the same in every process
shard(model)  # from here on each process holds its part
optimizer = lowdim.optim.AdamW(adapted.param_groups(lr=1e-2))

tokenizer = models.load_tokenizer("stories260k")
ids = tokenizer(["Once upon a time there was a cat.", "Tim has two red apples."] * 2, return_tensors="pt", padding=True)[
    "input_ids"
]
mine = ids.chunk(world)[rank].to("cuda" if gpu else "cpu")  # each process has its share of every batch
losses = []
for _ in range(8):
    loss = model(input_ids=mine, labels=mine).loss
    loss.backward()  # gradients are averaged over the processes
    optimizer.step()
    adapted.step(optimizer)
    optimizer.zero_grad()
    losses.append(loss.item())

adapted.save("torchrun-adapter")  # every process calls it, the first writes
if rank == 0:
    print(f"{world} processes, loss {losses[0]:.3f} -> {losses[-1]:.3f}")
dist.destroy_process_group()
