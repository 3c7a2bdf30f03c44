from pathlib import Path

import torch

from deferral.intervals import Interval
from deferral.metrics import CostCurve
from deferral.plots import cost_coverage, new_figure, save_figure, who_answers


def test_cost_coverage_draws_a_line_per_curve_and_a_point_per_policy(tmp_path: Path) -> None:
    figure, axes = new_figure()
    curve = CostCurve(coverage=torch.linspace(0, 1, 5), cost=torch.tensor([0.5, 0.3, 0.2, 0.3, 0.4]))
    points = {"ours": (0.5, Interval(0.2, 0.15, 0.3)), "oracle": (0.7, Interval(0.1, 0.1, 0.1))}
    assert cost_coverage(axes, {"ours": curve}, points) is axes
    assert axes.lines[0].get_ydata().tolist() == curve.cost.tolist()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["ours, any threshold", "ours", "oracle"]
    assert save_figure(figure, tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_who_answers_stacks_shares_to_one() -> None:
    _, axes = new_figure()
    actions, groups = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 0, 1])
    who_answers(axes, actions, groups, ["model", "A", "B"], ["cat", "dog", "never seen"])
    heights = [[bar.get_height() for bar in container] for container in axes.containers]
    torch.testing.assert_close(
        torch.tensor(heights).double(),
        torch.tensor([[2 / 3, 0, 0], [1 / 3, 0, 0], [0, 1, 0]], dtype=torch.float64),
        atol=1e-6,
        rtol=0,
    )
