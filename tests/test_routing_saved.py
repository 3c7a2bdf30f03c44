"""A router in a folder: the same decisions to the bit, and never half of one."""

import json
import os
import subprocess
import sys
import threading
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from deferral.datasets import DataError
from deferral.routing import Abilities, Router, log_of_table
from deferral.routing.persistence import FORMAT, check_place
from deferral.routing.policies import Linear, Neighbours
from tests.routing_world import EXPERTS, QUICK, SUBJECTS, router, world

pytestmark = pytest.mark.ci_slow


def test_neighbours_are_saved_as_they_were_asked_for(tmp_path: Path) -> None:
    texts, _, quality, price = world(39)
    table = log_of_table(texts, EXPERTS, quality, price)
    Router(0.1, policies=[Linear, lambda: Neighbours(count=7, prior=2.0)]).fit(table).save(tmp_path / "router")
    memory = Router.load(tmp_path / "router").fitted.memory
    assert (memory.count, memory.prior) == (7, 2.0)


def test_a_saved_router_decides_the_same_to_the_bit(tmp_path: Path) -> None:
    texts, *_ = world(200, seed=10)
    router().save(tmp_path / "router")
    back = Router.load(tmp_path / "router")
    for setting in ({}, {"budget": 9.0}, {"budget": 9.0, "learned": False}, {"price_of_error": 0.02}):
        one, other = router().route_batch(texts, **setting), back.route_batch(texts, **setting)
        for name in ("actions", "quality", "price", "cost", "propensity", "fallback", "similarity"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert back.report == router().report
    assert back.explain(texts[0]) == router().explain(texts[0])
    program = f"""
from deferral.routing import Router
print(Router.load({str(tmp_path / "router")!r}).route({texts[3]!r}).cost)
"""
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert printed.strip() == str(router().route(texts[3]).cost)
    router().save(tmp_path / "router")
    assert [path.name for path in tmp_path.iterdir()] == ["router"]


def signed(names: dict) -> str:
    return json.dumps({**names, "names_sha256": sha256(json.dumps(names).encode()).hexdigest()})


def test_a_bad_folder_is_a_clear_error_and_a_good_one_is_not_lost(tmp_path: Path) -> None:
    folder = tmp_path / "router"
    with pytest.raises(DataError, match="there is no router"):
        Router.load(folder)
    router().save(folder)
    names, (numbers,) = folder / "router.json", folder.glob("state.*.safetensors")
    good, whole = names.read_text(), numbers.read_bytes()
    without_digest = {key: value for key, value in json.loads(good).items() if key != "names_sha256"}
    for text, message in (
        (good[:100], "cannot be read"),
        (json.dumps({**json.loads(good), "format": FORMAT + 1}), "a newer deferral wrote it"),
        (good.replace('"price_of_error": 0.1', '"price_of_error": 0.9'), "it is corrupted"),
        (json.dumps({**json.loads(good), "format": "x"}), "fit and save the router again"),
        (signed({**without_digest, "experts": None}), "cannot be read, TypeError"),
        (signed({**without_digest, "abilities": {"small": {"context_tokens": 0}}}), "cannot be read, ValueError: context_tokens"),
        (signed({**without_digest, "sha256": "0" * 64}), "cannot be read"),
        (json.dumps(without_digest), "it is corrupted"),
        (json.dumps({**json.loads(good), "format": FORMAT - 1}), "fit and save the router again"),
        ("[]", "no description"),
    ):
        names.write_text(text)
        with pytest.raises(DataError, match=message):
            Router.load(folder)
    names.write_text(good)
    for bad in (whole[:-10], whole[:-1] + b"?", b""):
        numbers.write_bytes(bad)
        with pytest.raises(DataError, match="corrupted"):
            Router.load(folder)
    numbers.write_bytes(whole)
    assert Router.load(folder).experts == EXPERTS
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="is no router"):
        router().save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_a_save_that_breaks_off_leaves_the_old_router(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    router().save(tmp_path / "router")
    texts, _, quality, price = world(60)
    other = Router(0.1, policies=QUICK).fit(log_of_table(texts, ["x", "y", "z"], quality, price))
    real, calls = os.replace, []

    def breaks_at_the_names(source: Path, target: Path) -> None:
        calls.append(target)
        if Path(target).name == "router.json":
            raise OSError("the disk is full")
        real(source, target)

    monkeypatch.setattr(os, "replace", breaks_at_the_names)
    with pytest.raises(OSError, match="the disk is full"):
        other.save(tmp_path / "router")
    monkeypatch.undo()
    assert len(calls) == 2
    assert Router.load(tmp_path / "router").experts == EXPERTS
    other.save(tmp_path / "router")
    assert Router.load(tmp_path / "router").experts == ["x", "y", "z"]
    assert len(list((tmp_path / "router").iterdir())) == 2


def test_what_a_killed_save_left_is_no_obstacle_and_goes(tmp_path: Path) -> None:
    folder = tmp_path / "router"
    folder.mkdir()
    for name in ("state.0123456789ab.safetensors", ".state.0123456789ab.safetensors.1.aa.partial", ".router.json.1.bb.partial"):
        (folder / name).write_bytes(b"half")
    router().save(folder)
    assert len(list(folder.iterdir())) == 2
    assert Router.load(folder).experts == EXPERTS
    with pytest.raises(DataError, match=r"nothing can be written in .*router\.json"):
        check_place(folder / "router.json" / "another")


def test_two_that_save_at_once_leave_one_whole_router(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, _, quality, price = world(30)
    other = Router(0.1, policies=QUICK).fit(log_of_table(texts, ["x", "y", "z"], quality, price))
    router().save(tmp_path / "router")
    real, started = os.replace, threading.Event()
    second = threading.Thread(target=router().save, args=(tmp_path / "router",))

    def replace(source: Path, target: Path) -> None:
        if Path(target).name == "router.json" and not started.is_set():
            # Between the numbers and the names of the first, the second begins.
            started.set()
            second.start()
            second.join(0.2)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    other.save(tmp_path / "router")
    second.join()
    assert Router.load(tmp_path / "router").experts == EXPERTS


def test_readers_see_the_old_router_or_the_new_one(tmp_path: Path) -> None:
    texts, _, quality, price = world(60)
    two = [Router(0.1, policies=QUICK).fit(log_of_table(texts, names, quality, price)) for names in (EXPERTS, ["x", "y", "z"])]
    two[0].save(tmp_path / "router")
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for one in two:
                one.save(tmp_path / "router")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = {tuple(Router.load(tmp_path / "router").experts) for _ in range(30)}
    finally:
        stop.set()
        writer.join()
    assert seen <= {tuple(EXPERTS), ("x", "y", "z")}


def test_an_encoder_of_ones_own_is_given_again_when_loading(tmp_path: Path) -> None:
    texts, _, quality, price = world(200)

    def encode(texts: list[str]) -> np.ndarray:
        return np.array([[sum(word in text for word in words) for words in SUBJECTS.values()] for text in texts], float)

    own = Router(0.1, encoder=encode, policies=QUICK).fit(log_of_table(texts, EXPERTS, quality, price))
    own.save(tmp_path / "router")
    back = Router.load(tmp_path / "router", encoder=encode)
    np.testing.assert_array_equal(own.route_batch(texts).cost, back.route_batch(texts).cost)
    with pytest.raises(ValueError, match="or the function from texts to vectors"):
        Router.load(tmp_path / "router")


def test_integers_and_flags_of_numpy_are_those_of_python(tmp_path: Path) -> None:
    texts, _, quality, price = world(39)
    windows = {EXPERTS[0]: Abilities(context_tokens=np.int64(8000), tools=np.False_)}
    router = Router(0.1, policies=QUICK, abilities=windows, seed=np.int64(3))
    router.fit(log_of_table(texts, EXPERTS, quality, price)).save(tmp_path / "router")
    loaded = Router.load(tmp_path / "router")
    assert (loaded.seed, loaded.abilities) == (3, windows)
