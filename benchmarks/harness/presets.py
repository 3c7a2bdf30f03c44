"""How much is trained: on two CPU cores, on one GPU, or as published."""

from dataclasses import dataclass, replace

from benchmarks.harness.training import Recipe

__all__ = ["ABSTENTION", "PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """Rows of the training images by purpose, network, recipe, costs of abstaining, steps of a head, numbers of experts."""

    predictor_rows: int
    stage2_rows: int
    calibration_rows: int
    network: dict[str, str]
    recipe: Recipe
    costs: dict[str, tuple[float, ...]]
    head_steps: int = 600
    test_rows: int | None = None
    experts: tuple[int, ...] = (1, 2, 4, 8, 16, 20)


PUBLISHED_COSTS = {"svhn": (0.03,), "cifar10": (0.05,), "cifar100": (0.15,)}
PAPER_NETWORK = {"svhn": "resnet34", "cifar10": "resnet34", "cifar100": "wrn28_10"}

PRESETS = {
    # A small network has little to decide at the published costs.
    "laptop": Preset(
        16_000,
        4_000,
        2_000,
        dict.fromkeys(PAPER_NETWORK, "small"),
        Recipe(epochs=8, batch=64, learning_rate=0.05, clip=1.0),
        {"cifar10": (0.2, 0.3), "cifar100": (0.2, 0.3), "svhn": (0.2, 0.3)},
        experts=(1, 4, 16),
    ),
    # Its rate and that weights are not averaged were chosen on 5,000 training images held out, after a first run had shown errors
    # of 16% on the test images.
    "fast": Preset(
        45_000,
        3_000,
        2_000,
        dict.fromkeys(PAPER_NETWORK, "fast"),
        Recipe(epochs=40, batch=512, learning_rate=0.8, clip=5.0, warm_up=0.2),
        PUBLISHED_COSTS,
    ),
    # Published: 200 epochs, batch 1024, SGD with Nesterov's momentum, cosine from 0.1, weight decay 1e-4.  The clip is ours:
    # without one the exponential loss of the single-stage pair may diverge in its first steps.
    "paper": Preset(
        45_000,
        3_000,
        2_000,
        PAPER_NETWORK,
        Recipe(epochs=200, batch=1024, learning_rate=0.1, weight_decay=1e-4, clip=5.0),
        PUBLISHED_COSTS,
    ),
    # For tests: every line runs, no figure means anything.
    "tiny": Preset(
        300,
        200,
        100,
        dict.fromkeys(PAPER_NETWORK, "small"),
        Recipe(epochs=3, batch=100, learning_rate=0.02, clip=1.0),
        {"cifar10": (0.2,), "cifar100": (0.2,), "svhn": (0.2,)},
        head_steps=20,
        test_rows=200,
        experts=(1, 2),
    ),
}

# Where deferral to experts trains one network a seed, abstention trains seven: on two cores they are smaller.
ABSTENTION = {
    **PRESETS,
    "laptop": replace(
        PRESETS["laptop"],
        network=dict.fromkeys(PAPER_NETWORK, "smaller"),
        recipe=Recipe(epochs=5, batch=64, learning_rate=0.1, clip=1.0),
    ),
}
