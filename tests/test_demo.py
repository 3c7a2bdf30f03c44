"""The demos as a user runs them, and what the issue of the first release promised of their tables."""

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.progress import Progress

from deferral.cli import main
from deferral.datasets import DataError, Images
from deferral.datasets import digits as load_digits
from deferral.demo import OURS, cifar10, convnet, digits
from deferral.evaluation.comparison import Comparison


def run(seed: int, **options: bool) -> Comparison:
    with Progress(disable=True) as progress:
        return digits.run(seed, "cpu", progress, **options)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path, str]:
    """`deferral demo` as a user runs it: what was compared, the folder that it leaves, and what it prints."""
    out, compared = tmp_path_factory.mktemp("demo"), []
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        real = digits.run
        patch.setattr(digits, "run", lambda *given, **options: compared.append(real(*given, **options)) or compared[0])
        main(["demo", "--out", str(out)])
    return compared[0], out, printed.getvalue()


@pytest.fixture(scope="module")
def comparison(demo: tuple[Comparison, Path, str]) -> Comparison:
    return demo[0]


def test_the_command_prints_a_table_and_saves_pictures_and_figures(demo: tuple[Comparison, Path, str]) -> None:
    _, out, printed = demo
    assert any(line.startswith("two-stage deferral") and "±" in line for line in printed.splitlines())
    names = ["digits-seed0-cost-coverage.png", "digits-seed0-who-answers.png", "digits-seed0.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert all(f"wrote {out / name}" in printed for name in names)
    figures = json.loads((out / "digits-seed0.json").read_text())
    assert figures["settings"]["seed"] == 0
    assert figures["methods"]["oracle"]["cost"]["low"] <= figures["methods"]["oracle"]["cost"]["high"]


def test_the_rows_have_the_sizes_that_were_fixed(comparison: Comparison) -> None:
    assert digits.SIZES == {"predictor": 40, "stage 2": 500, "calibration": 300}
    assert len(comparison.targets) == 1797 - 840


RIVALS = ["the model alone", "always A", "always B", "always C", "random rows, same shares", "Chow's rule to the best expert"]


def cheaper_than_the_rest(comparison: Comparison) -> None:
    for name in RIVALS:
        assert comparison.figures[name].difference.high < 0, name


def test_two_stage_deferral_is_cheaper_than_the_model_each_expert_random_and_chow(comparison: Comparison) -> None:
    cheaper_than_the_rest(comparison)
    assert {"retrained: the model alone", "retrained: single-stage deferral", "oracle"} <= set(comparison.figures)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_so_it_is_on_other_seeds(seed: int) -> None:
    cheaper_than_the_rest(run(seed))


@pytest.mark.slow
def test_nothing_is_learned_from_the_test_rows(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other labels and other answers on the test rows, every learned decision stays what it was."""
    split = digits._split

    def other_test_labels(*arguments) -> list[digits.Part]:
        *parts, test = split(*arguments)
        return [*parts, digits.Part(test.pixels, test.targets.flip(0), test.experts.flip(0))]

    monkeypatch.setattr(digits, "_split", other_test_labels)
    for method in run(0).methods:
        if method.name != "oracle":
            assert torch.equal(method.actions, comparison[method.name].actions), method.name


def test_a_method_that_is_not_there_is_named_with_those_that_are(comparison: Comparison) -> None:
    with pytest.raises(KeyError, match=rf"'typo'.*{comparison.reference}"):
        comparison["typo"]


def test_figures_are_consistent(comparison: Comparison) -> None:
    oracle_cost = comparison["oracle"].cost
    for method in comparison.methods:
        if not method.name.startswith("retrained") and "abstain" not in method.name:
            assert (method.cost >= oracle_cost - 1e-6).all()
            torch.testing.assert_close(method.kept + method.load.sum(-1), torch.ones(957))
    always_a = comparison.figures["always A"]
    assert always_a.coverage.estimate == 0
    assert always_a.loads[0].estimate == 1
    assert always_a.accuracy is not None
    assert always_a.cost.estimate == pytest.approx(1 - always_a.accuracy.estimate + 0.15)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_table(comparison: Comparison) -> None:
    assert run(0).figures == comparison.figures


@pytest.mark.slow
def test_a_useless_expert_is_hardly_asked() -> None:
    useless = run(0, useless_expert=True)
    assert useless.experts == ["A", "B", "C", "D"]
    for name in (OURS, "retrained: single-stage deferral", "compare-confidence", "Chow's rule to the best expert"):
        assert useless.figures[name].loads[3].estimate < 0.02, name


@pytest.mark.slow
def test_training_resumes_as_if_it_had_not_been_stopped(tmp_path: Path) -> None:
    data = load_digits()
    images = torch.nn.functional.interpolate(255 * data.images[:600], size=32).expand(-1, 3, -1, -1).byte()
    data = Images(images, data.labels[:600])

    class Stopped(Exception):
        pass

    def stop_after_two(done: int) -> None:
        if done == 2:
            raise Stopped

    whole = convnet.trained(data, tmp_path / "whole.pt", seed=0, epochs=3, on_epoch=lambda done: None)
    with pytest.raises(Stopped):
        convnet.trained(data, tmp_path / "cut.pt", seed=0, epochs=3, on_epoch=stop_after_two)
    epochs: list[int] = []
    resumed = convnet.trained(data, tmp_path / "cut.pt", seed=0, epochs=3, on_epoch=epochs.append)
    assert epochs == [2, 3]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name

    with pytest.raises(DataError, match="delete the file, or name another --out"):
        convnet.trained(data, tmp_path / "cut.pt", seed=1, epochs=3, on_epoch=epochs.append)
    (tmp_path / "cut.pt").write_bytes(b"half a checkpoint")
    (tmp_path / "broken.pt").write_bytes(b"broken")
    torch.save({}, tmp_path / "empty.pt")
    for name in ("cut.pt", "broken.pt", "empty.pt"):
        with pytest.raises(DataError, match="delete the file to train again"):
            convnet.trained(data, tmp_path / name, seed=0, epochs=3, on_epoch=epochs.append)


@pytest.mark.slow
def test_cifar10_with_real_people_after_one_epoch(data_root: Path, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    with Progress(disable=True) as progress:
        comparisons = cifar10.run(data_root, data_root / "l2d", 0, "cpu", progress, tmp_path / "network.pt", epochs=1)
    torch.set_num_threads(1)
    assert [c.settings["price"] for c in comparisons] == [0.05, 0.1]
    for comparison in comparisons:
        assert len(comparison.targets) == 8000
        assert comparison.figures["the model alone"].difference.high < 0
        assert comparison.figures["always the person"].difference.estimate < 0
        assert "The offset of asking moved from" in comparison.notes[0]
    # A model of one epoch saves too little on the cheaper person to be sure of it.
    assert comparisons[1].figures["always the person"].difference.high < 0
    assert json.dumps(comparisons[0].settings)
