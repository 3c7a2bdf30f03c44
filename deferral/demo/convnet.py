"""A small convolutional network for 32 x 32 images, trained with a checkpoint after every epoch."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deferral.datasets import DataError, Images
from deferral.whole_files import written_whole

__all__ = ["EPOCHS", "ConvNet", "predict", "trained"]

EPOCHS = 10
BATCH = 256
MEAN, DEVIATION = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)  # CIFAR-10's training pixels


class ConvNet(nn.Module):
    """Four convolutions and a linear head, 242,474 parameters; uint8 images (N, 3, 32, 32) -> scores (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, pool in ((3, 32, True), (32, 64, True), (64, 128, True), (128, 128, False)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if pool else []
        self.layers = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(128, 10))

    def forward(self, images: Tensor) -> Tensor:
        mean, deviation = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
        # This order of the axes is twice as fast on a CPU.
        return self.layers(((images.float() - mean) / deviation).contiguous(memory_format=torch.channels_last))


def trained(data: Images, checkpoint: Path, *, seed: int, epochs: int, on_epoch: Callable[[int], None]) -> ConvNet:
    """A network trained on the images, resumed from the checkpoint where there is one.

    Every epoch draws its own random numbers from (seed, epoch), so that resuming gives what not stopping would have given.
    """
    device = data.images.device
    torch.manual_seed(seed)
    model = ConvNet().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * -(-len(data) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    settings = {"seed": seed, "epochs": epochs, "rows": len(data)}
    done = 0
    if checkpoint.exists():
        state = _read(checkpoint, device)
        if state["settings"] != settings:
            raise DataError(
                f"{checkpoint}: expected a run of {settings}, found one of {state['settings']}; "
                "delete the file, or name another --out"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        done = state["epoch"]
        on_epoch(done)
    for epoch in range(done, epochs):
        _train_epoch(model, optimizer, schedule, data, seed=1000 * seed + epoch)
        _write(
            checkpoint,
            {
                "settings": settings,
                "epoch": epoch + 1,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
            },
        )
        on_epoch(epoch + 1)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def predict(model: ConvNet, images: Tensor) -> Tensor:
    """Scores (N, 10), in batches."""
    return torch.cat([model(batch) for batch in images.split(1000)])


def _train_epoch(
    model: ConvNet,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    data: Images,
    *,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for rows in torch.randperm(len(data), generator=generator).split(BATCH):
        batch = data[rows.to(data.images.device)]
        flip = torch.rand(len(rows), generator=generator).to(data.images.device) < 0.5
        images = batch.images.flip(-1).where(flip.view(-1, 1, 1, 1), batch.images)
        top, left = torch.randint(0, 5, (2,), generator=generator).tolist()
        images = F.pad(images, (2, 2, 2, 2))[:, :, top : top + 32, left : left + 32]
        loss = F.cross_entropy(model(images), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _read(path: Path, device: torch.device) -> dict:
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(state, dict) or not {"settings", "epoch", "model", "optimizer", "schedule"} <= set(state):
            raise RuntimeError("entries are missing")
        return state
    except Exception as error:  # on damaged bytes the restricted unpickler raises whatever it stumbles over
        raise DataError(
            f"{path}: expected a checkpoint of this demo, could not read it; delete the file to train again"
        ) from error


def _write(path: Path, state: dict) -> None:
    with written_whole(path) as partial:
        torch.save(state, partial)
