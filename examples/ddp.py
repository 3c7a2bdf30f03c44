"""Single-stage deferral under DistributedDataParallel: two processes on the CPU, each with its share of the rows.

Run `torchrun --standalone --nproc-per-node 2 examples/ddp.py`; it needs `pip install -e '.[sklearn]'` for the digits.  A
small network learns from 200 handwritten digits which rows to answer and which to hand to an expert who is right on 97% of them.
The loss is one number per row, so nothing changes under DDP.  Process 0 prints what deferring costs on the other 1,597 rows:
less than never asking, and less than always asking.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from deferral import decide, error_costs, pick, single_stage_costs, single_stage_deferral
from deferral.datasets import digits
from deferral.experts import draw_answers, even_skill

K = 10
PRICE = 0.05  # of asking; a wrong answer costs 1

if "RANK" not in os.environ:
    sys.exit("this script runs as several processes; start it with: torchrun --standalone --nproc-per-node 2 examples/ddp.py")
dist.init_process_group("gloo")  # "nccl" on GPUs
torch.manual_seed(0)  # the same split in every process
torch.set_num_threads(1)
data = digits()
x, y = data.images.flatten(1), data.labels
expert = draw_answers(even_skill(0.97, K), y, seed=0)
expert_costs = error_costs(expert.unsqueeze(-1), y, price=PRICE, ceiling=1 + PRICE)
train, held_out = torch.randperm(len(x)).split([200, len(x) - 200])

rows = TensorDataset(x[train], y[train], expert_costs[train])
sampler = DistributedSampler(rows)
loader = DataLoader(rows, batch_size=16, sampler=sampler)
model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, K + 1)))  # the last score: ask
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for epoch in range(50):
    sampler.set_epoch(epoch)
    for images, targets, asking in loader:
        loss = single_stage_deferral(model(images), targets, asking, ceiling=1 + PRICE).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

if dist.get_rank() == 0:
    scores, targets, asking = model.module(x[held_out]).detach(), y[held_out], expert_costs[held_out]
    actions = decide(scores)  # 0..9 a class, 10: ask the expert
    kept = actions < K
    cost = pick(single_stage_costs(targets, asking, K), actions).mean()
    never = (decide(scores[:, :K]) != targets).float().mean()
    accuracy = (actions == targets)[kept].float().mean()
    print(f"deferral cost {cost:.3f} (never asking {never:.3f}, always {asking.mean():.3f}),", end=" ")
    print(f"coverage {kept.float().mean():.3f}, accuracy of kept rows {accuracy:.3f}")
dist.barrier()  # nobody leaves while another still works
dist.destroy_process_group()
