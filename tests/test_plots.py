import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.container import ErrorbarContainer
from torch import Tensor

from deferral.curves import Curve, risk_coverage_curve
from deferral.intervals import Interval
from deferral.plots import (
    cost_coverage,
    embed_2d,
    expert_load,
    methods_side_by_side,
    new_figure,
    reliability,
    risk_coverage,
    save_figure,
    who_answers,
    who_answers_map,
)

CURVE = Curve(coverage=torch.linspace(0, 1, 5), value=torch.tensor([0.5, 0.3, 0.2, 0.3, 0.4]))
SHARE = Interval(0.2, 0.15, 0.3)


def legend(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def whiskers(axes) -> Tensor:
    """The ends (x, y) of every interval that was drawn.  -> (whiskers, 2 ends, 2)"""
    drawn = [bars for bars in axes.containers if isinstance(bars, ErrorbarContainer)]
    return torch.tensor(np.array([path for bars in drawn for part in bars[2] for path in part.get_segments()]))


def test_cost_coverage_draws_a_line_per_curve_and_a_point_per_policy(tmp_path: Path) -> None:
    figure, axes = new_figure()
    points = {"oracle": (0.7, Interval(0.1, 0.1, 0.1)), "ours": (0.5, SHARE)}
    assert cost_coverage(axes, {"ours": CURVE}, points) is axes
    line, oracle, ours = axes.lines[0], *(drawn for drawn in axes.lines if drawn.get_label() in points)
    torch.testing.assert_close(torch.tensor(line.get_xydata()), torch.stack([CURVE.coverage, CURVE.value], -1).double())
    assert legend(axes) == ["ours, any threshold", "oracle", "ours"]
    assert ours.get_marker() == line.get_marker() != oracle.get_marker()
    assert ours.get_xydata().tolist() == [[0.5, 0.2]]
    torch.testing.assert_close(whiskers(axes)[1], torch.tensor([[0.5, 0.15], [0.5, 0.3]]).double())
    assert save_figure(figure, tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_risk_coverage_draws_the_curve_and_its_band(tmp_path: Path) -> None:
    figure, axes = new_figure()
    confidence = torch.rand(100)
    curve = risk_coverage_curve(confidence, (torch.rand(100) > confidence).double())
    arrays = Curve(coverage=curve.coverage.numpy(), value=curve.value.numpy())
    grid = torch.tensor([0.2, 0.6, 1.0])
    bands = {"torch": (curve.value - 0.1, curve.value + 0.1)}
    risk_coverage(axes, {"torch": curve, "numpy": arrays}, bands=bands)
    for line in axes.lines:
        assert line.get_ydata().tolist() == curve.value.tolist()
        assert line.get_xdata().tolist() == curve.coverage.tolist()
    _, other = new_figure()
    risk_coverage(other, {"torch": curve}, bands={"torch": (torch.zeros(3), torch.ones(3))}, grid=grid)
    ends = other.collections[0].get_paths()[0].vertices
    assert {tuple(end) for end in ends.round(6).tolist()} == {(round(c, 6), v) for c in grid.tolist() for v in (0.0, 1.0)}
    save_figure(figure, tmp_path / "risk.png")


def test_twelve_methods_are_told_apart_without_colour() -> None:
    names = [f"method {i}" for i in range(28)]
    _, axes = new_figure()
    risk_coverage(axes, dict.fromkeys(names[:12], CURVE), bands=dict.fromkeys(names[:12], (CURVE.value, CURVE.value + 0.1)))
    assert len({line.get_marker() for line in axes.lines}) == 12
    assert len({line.get_linestyle() for line in axes.lines[:4]}) == 4
    assert len({band.get_hatch() for band in axes.collections}) == 12
    # The marks of curves that coincide do not all stand on the same points.
    dense = Curve(coverage=torch.linspace(0, 1, 1001), value=torch.zeros(1001))
    _, axes = new_figure()
    risk_coverage(axes, dict.fromkeys(names[:12], dense))
    assert len({line.get_markevery() for line in axes.lines}) == 12
    _, axes = new_figure()
    cost_coverage(axes, {}, dict.fromkeys(names, (0.5, SHARE)))
    drawn = [line for line in axes.lines if line.get_label() in names]
    assert len({(line.get_marker(), line.get_markerfacecolor() == "white") for line in drawn}) == 28


def test_methods_side_by_side() -> None:
    _, axes = new_figure()
    figures = {"ours": SHARE, "theirs": Interval(-0.1, -0.3, 0.2), "outside": Interval(0.5, 0.1, 0.4)}
    methods_side_by_side(axes, figures, "cost minus that of ours", reference=0.0)
    assert [text.get_text() for text in axes.get_yticklabels()] == list(figures)
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    ends = whiskers(axes)
    torch.testing.assert_close(ends[..., 0], torch.tensor([[f.low, f.high] for f in figures.values()]).double())
    torch.testing.assert_close(ends[..., 1], torch.arange(3.0).double()[:, None].expand(3, 2))
    points = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "o"]
    assert points == [[[f.estimate, row]] for row, f in enumerate(figures.values())]
    assert axes.lines[0].get_xdata() == [0.0, 0.0]


def test_reliability_by_hand() -> None:
    _, axes = new_figure()
    predicted = torch.tensor([[0.12, 0.5], [0.18, 0.5], [0.93, 0.5], [0.97, 0.5], [0.1, 0.5]])
    right = torch.tensor([[0, 1], [1, 0], [1, 1], [1, 1], [1, 1]])
    mask = torch.tensor([[True, True], [True, True], [True, True], [True, True], [False, True]])
    mask = torch.cat([mask, torch.zeros(5, 1, dtype=torch.bool)], dim=-1)
    predicted, right = (torch.cat([table, table[:, :1]], dim=-1) for table in (predicted, right))
    reliability(axes, predicted, right, ["A", "B", "nobody"], mask=mask)
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["A (4 rows)"] == [pytest.approx([0.15, 0.5]), pytest.approx([0.95, 1.0])]
    assert lines["B (5 rows)"] == [pytest.approx([0.5, 0.8])]
    assert lines["nobody (no known answer)"] == []
    assert [text.get_text() for text in axes.texts] == ["2", "2", "5"]
    # Wilson's interval: the shares q whose own standard error just reaches the observed one.
    for (low, high), observed, count in zip(whiskers(axes)[..., 1].tolist(), (0.5, 1.0, 0.8), (2, 2, 5), strict=True):
        for q in (low, high):
            assert abs(q - observed) == pytest.approx(1.959964 * math.sqrt(q * (1 - q) / count), abs=1e-6)


def test_expert_load() -> None:
    _, axes = new_figure()
    loads = {"A": SHARE, "B": Interval(0.0, 0.0, 0.0)}
    expert_load(axes, loads, capacity={"A": 0.25})
    assert [bar.get_height() for bar in axes.patches] == [0.2, 0.0]
    assert [list(line.get_ydata()) for line in axes.lines if line.get_linestyle() == "--"] == [[0.25, 0.25], []]
    torch.testing.assert_close(whiskers(axes)[0], torch.tensor([[0.0, 0.15], [0.0, 0.3]]).double())
    assert [text.get_text() for text in axes.get_xticklabels()] == ["A", "B"]
    assert legend(axes) == ["capacity"]


def test_who_answers_stacks_shares_to_one() -> None:
    _, axes = new_figure()
    actions, groups = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 0, 1])
    who_answers(axes, actions, groups, ["model", "A", "B"], ["cat", "dog", "never seen"])
    heights = [[bar.get_height() for bar in container] for container in axes.containers]
    expected = torch.tensor([[2 / 3, 0, 0], [1 / 3, 0, 0], [0, 1, 0]], dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(heights).double(), expected)
    assert len({container[0].get_hatch() for container in axes.containers}) == 3


def test_the_map_shows_every_row_with_the_marker_of_who_answers() -> None:
    _, axes = new_figure()
    points, actions = torch.randn(60, 2), torch.arange(60) % 7 % 6
    who_answers_map(axes, points, actions, ["model", *"ABCDE", "nobody"])
    for action, drawn in enumerate(axes.collections):
        torch.testing.assert_close(torch.tensor(np.array(drawn.get_offsets())).reshape(-1, 2), points[actions == action].double())
    shapes = {drawn.get_paths()[0].vertices.tobytes() for drawn in axes.collections}
    assert len(shapes) == 7
    assert legend(axes)[0] == f"model ({int((actions == 0).sum())} rows)"
    assert legend(axes)[-1] == "nobody (0 rows)"


@pytest.mark.parametrize("shape", [(50, 6), (6, 50), (30, 3, 2, 2)])
def test_the_embedding_is_the_two_principal_components(shape: tuple[int, ...]) -> None:
    features = torch.randn(shape, dtype=torch.float64) + 5
    plane = embed_2d(features)
    centred = features.flatten(1) - features.flatten(1).mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(plane.abs(), (u[:, :2] * s[:2]).abs())
    # The same picture whatever the order of the rows and the place of the origin.
    order = torch.randperm(len(features))
    torch.testing.assert_close(embed_2d(features[order] - 3), plane[order])


def test_the_embedding_of_a_line_is_a_line() -> None:
    line = torch.arange(4.0)[:, None]
    for features in (line, line * torch.tensor([3.0, 4.0]), line * torch.ones(30), line.half() * torch.ones(3).half()):
        plane = embed_2d(features)
        assert plane[:, 1].abs().max() < 1e-6
        steps = plane[:, 0].diff()
        torch.testing.assert_close(steps, features.double().diff(dim=0).norm(dim=-1))
    assert embed_2d(torch.ones(1, 5)).tolist() == [[0, 0]]
    assert embed_2d(torch.ones(7, 5)).abs().max() < 1e-12


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"\.\[plots\]"):
        new_figure()


LONG, POINTS = torch.zeros(3, dtype=torch.long), torch.zeros(3, 2)
NAN = Interval(math.nan, 0.0, 1.0)
BAND = (torch.zeros(5), torch.ones(5))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda a: risk_coverage(a, {}), "at least one"),
        (lambda a: cost_coverage(a, {}, {}), "at least one"),
        (lambda a: risk_coverage(a, {"m": Curve(torch.zeros(3), torch.zeros(4))}), r"'m': .* got \(3,\), \(4,\)"),
        (lambda a: risk_coverage(a, {"m": Curve(torch.zeros(3), torch.full((3,), torch.nan))}), "'m': expected finite"),
        (lambda a: risk_coverage(a, {"m": CURVE}, bands={"n": BAND}), r"bands: .* got \['n'\]"),
        (lambda a: risk_coverage(a, {"m": CURVE}, bands={"m": BAND}, grid=torch.zeros(4)), "grid, low, high"),
        (lambda a: cost_coverage(a, {"m": CURVE}, {"m": (0.5, NAN)}), "m: expected a finite figure"),
        (lambda a: cost_coverage(a, {}, {"m": (math.nan, SHARE)}), "m: expected a finite coverage"),
        (lambda a: risk_coverage(a, {"m": BAND}), "'m': expected a Curve"),
        (lambda a: reliability(a, "a", np.ones((3, 1)), ["A"]), "predicted: expected a torch tensor, or numbers"),
        (lambda a: who_answers(a, None, LONG, ["m"], ["g"]), "actions: expected a torch tensor, or numbers"),
        (lambda a: who_answers_map(a, [["a", "b"]], LONG, ["m"]), "points: expected a torch tensor, or numbers"),
        (lambda a: reliability(a, np.ones((3, 1)), np.ones((3, 1)), ["A"], level="a"), "level: expected a number, got 'a'"),
        (lambda a: methods_side_by_side(a, {}, "cost"), "at least one method"),
        (lambda a: methods_side_by_side(a, {"m": NAN}, "cost"), "m: expected a finite figure"),
        (lambda a: reliability(a, torch.rand(3, 2), torch.ones(3, 2), ["A"]), "one column for each of 1 names"),
        (lambda a: reliability(a, torch.rand(3, 1) + 1, torch.ones(3, 1), ["A"]), r"numbers in \[0, 1\]"),
        (lambda a: reliability(a, torch.rand(3, 1), torch.ones(3, 1), ["A"], level=95.0), "level"),
        (lambda a: expert_load(a, {"A": SHARE}, capacity={"B": 0.5}), r"got \['B'\]"),
        (lambda a: expert_load(a, {}), "at least one"),
        (lambda a: who_answers(a, LONG - 1, LONG, ["m"], ["g"]), r"actions: .* got -1"),
        (lambda a: who_answers(a, LONG, LONG + 1, ["m"], ["g"]), r"groups: .* got 1"),
        (lambda a: who_answers(a, LONG[:2], LONG, ["m"], ["g"]), r"actions: .* shape \(3,\)"),
        (lambda a: who_answers_map(a, torch.zeros(3, 3), LONG, ["m"]), "embed_2d"),
        (lambda a: who_answers_map(a, POINTS * torch.nan, LONG, ["m"]), "finite"),
        (lambda a: who_answers_map(a, POINTS, LONG.bool(), ["m"]), "int64"),
        (lambda a: embed_2d(torch.zeros(3)), r"\(N, d\)"),
        (lambda a: embed_2d(POINTS * torch.inf), "finite"),
        (lambda a: embed_2d({}), "features: expected a torch tensor, or numbers"),
    ],
)
def test_bad_input(call: Callable, said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        call(new_figure()[1])


def test_numpy_draws_what_tensors_draw() -> None:
    generator = torch.Generator().manual_seed(0)
    points, right = torch.rand(30, 2, generator=generator), torch.rand(30, 2, generator=generator) > 0.5
    actions, groups = torch.arange(30) % 2, torch.arange(30) % 3
    np.testing.assert_array_equal(embed_2d(points.numpy()), embed_2d(points).numpy())
    assert isinstance(embed_2d(points.numpy()), np.ndarray)
    for draw in (
        lambda axes, of: reliability(axes, of(points), of(right), ["A", "B"], mask=of(right)),
        lambda axes, of: who_answers(axes, of(actions), of(groups), ["m", "A"], ["a", "b", "c"]),
        lambda axes, of: who_answers_map(axes, of(points), of(actions), ["m", "A"]),
    ):
        drawn = [draw(new_figure()[1], of) for of in (lambda tensor: tensor, Tensor.numpy)]
        assert legend(drawn[0]) == legend(drawn[1])
        for one, other in zip(*(axes.get_children() for axes in drawn), strict=True):
            assert type(one) is type(other)
            if hasattr(one, "get_xydata"):
                np.testing.assert_array_equal(one.get_xydata(), other.get_xydata())
    assert cost_coverage(new_figure()[1], {"m": CURVE}).get_lines()


def test_the_suffix_is_the_format_and_the_path_is_the_file(tmp_path: Path) -> None:
    for name, start in {"a.pdf": b"%PDF", "a.PNG": b"\x89PNG", "a": b"\x89PNG"}.items():
        assert save_figure(new_figure(1, 1)[0], tmp_path / name).read_bytes().startswith(start)
