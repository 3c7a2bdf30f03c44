"""The README's snippets run, in order, as one session."""

import re
from pathlib import Path

import torch

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_snippets_run_and_do_what_they_say(capsys) -> None:
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(snippets) == 5
    session: dict = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), session)
    answered = session["actions"] < 10
    right = session["actions"] == session["y"][session["test"]]
    assert right[answered].double().mean() > 0.95
    system = (session["final"] == session["y"][session["test"]]).double().mean()
    alone = (session["answers"][session["test"], 0] == session["y"][session["test"]]).double().mean()
    assert system > alone
    assert not session["known"].all()
    assert isinstance(session["loss"], torch.Tensor)
    assert "Interval(estimate=" in capsys.readouterr().out


def test_every_picture_and_file_that_it_names_exists() -> None:
    root = Path(__file__).parent.parent
    for name in [*re.findall(r"!\[.*?\]\((.*?)\)", README), "CITATION.cff", "scripts/demo", "scripts/test", "LICENSE"]:
        assert (root / name).is_file(), name
