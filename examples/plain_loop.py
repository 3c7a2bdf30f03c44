"""Abstention in a plain PyTorch loop: one more output, another loss, a fitted threshold, and `decide`.

Run `python examples/plain_loop.py`; it needs `pip install -e '.[sklearn]'` for the digits.  A small network learns from 200
handwritten digits and may abstain at a cost of 0.05 errors.  Its threshold is fitted on 300 more, and it prints what that costs
on the other 1,297 rows: less than answering all of them, and less than abstaining on all of them.
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from deferral import decide, fit_offsets, pick, score_based_abstention, single_stage_costs
from deferral.datasets import digits

K = 10
COST = 0.05  # of abstaining; a wrong answer costs 1

torch.manual_seed(0)
torch.set_num_threads(1)
data = digits()
x, y = data.images.flatten(1), data.labels
train, fitting, test = torch.randperm(len(x)).split([200, 300, len(x) - 500])
loader = DataLoader(TensorDataset(x[train], y[train]), batch_size=32, shuffle=True)

model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, K + 1))  # the last score means "I abstain"
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(50):
    for images, targets in loader:
        loss = score_based_abstention(model(images), targets, cost=COST).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

scores = model(x).detach()
costs = single_stage_costs(y, torch.full((len(y), 1), COST), K)
offsets = fit_offsets(scores[fitting], costs[fitting], num_own=K)
actions = decide(scores[test], offsets)  # 0..9 a class, 10: abstain
kept = actions < K
cost = pick(costs[test], actions).mean()
never = (decide(scores[test, :K]) != y[test]).float().mean()
accuracy = (actions == y[test])[kept].float().mean()
print(f"deferral cost {cost:.3f} (never abstaining {never:.3f}, always {COST:.3f}),", end=" ")
print(f"coverage {kept.float().mean():.3f}, accuracy of kept rows {accuracy:.3f}")
