"""The snippets of the README and of the guide run, in order, each page as one session."""

import re
from pathlib import Path

import torch

from deferral import decide, pick

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def run(page: str, count: int) -> dict:
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(snippets) == count
    session: dict = {}
    torch.manual_seed(0)
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), session)
    return session


def test_the_guide_runs_and_does_what_it_says(capsys) -> None:
    session = run("docs/judging.md", 7)
    rows, test, y = session["scores"][session["calibration"]], session["test"], session["y"]
    assert (decide(rows, session["at_coverage"]) == 0).double().mean() >= 0.8
    assert (decide(rows, session["at_rate"]) == 1).double().mean() <= 0.1
    assert (session["few_hours"].actions == 1).sum() == 50
    assert session["certificate"].holds
    kept = session["promised"] == 0
    assert (session["answers"][test, 0] != y[test])[kept].double().mean() <= 0.1
    assert session["temperature"] > 0
    assert (decide(session["ranked"][:600], session["offsets"]) == 0).double().mean() >= 0.9
    assert 0.85 < session["answered"].double().mean() < 1
    who = torch.from_numpy(session["who"])
    expected = session["answers"][test].gather(-1, who.unsqueeze(-1)).squeeze(-1)
    assert (torch.from_numpy(session["final"])[who == 1] == expected[who == 1]).all()
    assert "system accuracy" in capsys.readouterr().out


def test_the_training_guide_runs_and_does_what_it_says() -> None:
    session = run("docs/training.md", 5)
    test, costs = session["test"], session["costs"]
    # Two stages, on rows of their own, are cheaper than the model alone, and than each expert.
    assert pick(costs[test], session["routed"]).mean() < 0.9 * costs[test].mean(0).min()
    assert session["wrong"][test][session["answered"]].mean() < 0.7 * session["wrong"][test].mean()
    assert pick(session["table"][test], session["actions"]).mean() < 0.9 * costs[test].mean(0).min()
    prediction = session["regressor"](session["x"][test])[:, 0].detach()
    own = (prediction - session["target"][test]).square()
    table = torch.stack([own, session["asked"][test, 0]], dim=-1)
    assert pick(table, session["who"]).mean() < 0.8 * table.mean(0).min()
    assert set(session["report"].violations) == {"finite", "half_precision"}


def test_the_snippets_run_and_do_what_they_say(capsys) -> None:
    session = run("README.md", 7)
    answered = session["actions"] < 10
    right = session["actions"] == session["y"][session["test"]]
    assert right[answered].double().mean() > 0.95
    system = (session["final"] == session["y"][session["test"]]).double().mean()
    alone = (session["answers"][session["test"], 0] == session["y"][session["test"]]).double().mean()
    assert system > alone
    assert not session["known"].all()
    assert isinstance(session["loss"], torch.Tensor)
    given = session["labels"] != session["clf"].abstain_label_
    assert (session["labels"][given] == session["y"][session["test"]].numpy()[given]).mean() > 0.9
    assert (session["decision"].expert, session["cheaper"].expert) == ("large", "small")
    assert "Interval(estimate=" in capsys.readouterr().out


def test_every_picture_and_file_that_it_names_exists() -> None:
    root = Path(__file__).parent.parent
    for name in [*re.findall(r"!\[.*?\]\((.*?)\)", README), "CITATION.cff", "scripts/demo", "scripts/test", "LICENSE"]:
        assert (root / name).is_file(), name
