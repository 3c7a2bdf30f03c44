"""Abstention in a skorch NeuralNet, so in a scikit-learn pipeline: the loss goes in as `criterion`, its options beside it.

Run `python examples/skorch_net.py`; it needs `pip install -e '.[examples]'`.  A small network learns from 200 handwritten
digits and may abstain at a cost of 0.05 errors.  `criterion__cost` is a parameter like any other, for `set_params` or a grid
search.  It prints what abstaining costs on the other 1,597 rows: less than answering all of them, and less than abstaining on
all of them.
"""

import torch
from sklearn.model_selection import train_test_split
from skorch import NeuralNet
from torch import nn

from deferral import Criterion, decide, pick, score_based_abstention, single_stage_costs
from deferral.datasets import digits

K = 10
COST = 0.05  # of abstaining; a wrong answer costs 1

torch.manual_seed(0)
torch.set_num_threads(1)
data = digits()
x, held_out, y, targets = train_test_split(data.images.flatten(1), data.labels, train_size=200, random_state=0)

net = NeuralNet(
    nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, K + 1)),  # the last score means "I abstain"
    criterion=Criterion,
    criterion__loss=score_based_abstention,
    criterion__cost=COST,
    optimizer=torch.optim.Adam,
    lr=3e-3,
    batch_size=32,
    max_epochs=50,
    train_split=None,
    verbose=0,
)
net.fit(x, y)

scores = net.forward(held_out)
actions = decide(scores)  # 0..9 a class, 10: abstain
kept = actions < K
cost = pick(single_stage_costs(targets, torch.full((len(targets), 1), COST), K), actions).mean()
never = (decide(scores[:, :K]) != targets).float().mean()
accuracy = (actions == targets)[kept].float().mean()
print(f"deferral cost {cost:.3f} (never abstaining {never:.3f}, always {COST:.3f}),", end=" ")
print(f"coverage {kept.float().mean():.3f}, accuracy of kept rows {accuracy:.3f}")
