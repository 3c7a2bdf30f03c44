"""Single-stage deferral in a LightningModule: `Criterion` is the loss module, and the test step logs the figures.

Run `python examples/lightning_module.py`; it needs `pip install -e '.[examples]'`.  A small network learns from 200
handwritten digits which rows to answer and which to hand to an expert who is right on 97% of them.  It prints what deferring
costs on the other 1,597 rows: less than never asking, and less than always asking.  Leave out `accelerator` to train on a GPU.
"""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from deferral import Criterion, decide, error_costs, pick, single_stage_costs, single_stage_deferral
from deferral.datasets import digits
from deferral.experts import draw_answers, even_skill

K = 10
PRICE = 0.05  # of asking; a wrong answer costs 1


class DeferringClassifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, K + 1))  # the last score: ask
        self.criterion = Criterion(single_stage_deferral, ceiling=1 + PRICE)

    def training_step(self, batch, batch_index):
        images, targets, expert_costs = batch
        return self.criterion(self.network(images), targets, expert_costs)

    def test_step(self, batch, batch_index):
        images, targets, expert_costs = batch
        scores = self.network(images)
        actions = decide(scores)  # 0..9 a class, 10: ask the expert
        self.log("cost", pick(single_stage_costs(targets, expert_costs, K), actions).mean())
        self.log("never", (decide(scores[:, :K]) != targets).float().mean())
        self.log("always", expert_costs.mean())
        self.log("coverage", (actions < K).float().mean())
        self.log("kept_and_right", (actions == targets).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


L.seed_everything(0, verbose=False)
torch.set_num_threads(1)
data = digits()
expert = draw_answers(even_skill(0.97, K), data.labels, seed=0)
expert_costs = error_costs(expert.unsqueeze(-1), data.labels, price=PRICE, ceiling=1 + PRICE)
rows = TensorDataset(data.images.flatten(1), data.labels, expert_costs)
train, held_out = random_split(rows, [200, len(rows) - 200])

quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = L.Trainer(max_epochs=50, accelerator="cpu", **quiet)
module = DeferringClassifier()
trainer.fit(module, DataLoader(train, batch_size=32, shuffle=True))
[seen] = trainer.test(module, DataLoader(held_out, batch_size=256), verbose=False)
print(f"deferral cost {seen['cost']:.3f} (never asking {seen['never']:.3f}, always {seen['always']:.3f}),", end=" ")
print(f"coverage {seen['coverage']:.3f}, accuracy of kept rows {seen['kept_and_right'] / seen['coverage']:.3f}")
