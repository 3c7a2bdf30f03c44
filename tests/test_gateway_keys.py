"""API keys: what a token opens, and how a key is changed, rotated and revoked."""

import hmac
import time
from dataclasses import replace
from pathlib import Path

import pytest

from deferral.gateway.keys import Key, Keys, UnknownKey


def test_a_token_opens_what_it_was_made_for(shared_keys: Keys) -> None:
    keys = shared_keys
    assert len(keys) == 0
    token, key = keys.create(
        "bob", experts=["b", "a"], requests_per_minute=60, budget=2, window="week", zone="Europe/Berlin", admin=True
    )
    assert key == Key(key.id, "bob", frozenset({"a", "b"}), 60, 2.0, "week", "Europe/Berlin", True)
    other, plain = keys.create("eve")
    assert plain == Key(plain.id, "eve")
    assert keys.find(token) == key
    assert keys.find(other) == plain
    assert list(keys) == [key, plain]
    assert token.startswith(f"dk-{key.id}-")


def test_only_the_whole_token_opens(keys: Keys) -> None:
    token, key = keys.create("bob")
    other, _ = keys.create("eve")
    mixed = f"dk-{key.id}-{other.split('-', 2)[2]}"
    changed = token[:-1] + ("A" if token[-1] != "A" else "B")
    for wrong in (
        mixed,
        changed,
        token[:-1],
        token + "x",
        token.upper(),
        key.id,
        f"dk-{key.id}",
        "",
        "-",
        "--",
        "dk--",
        "é\ud800",
    ):
        assert keys.find(wrong) is None


def test_tokens_are_compared_in_constant_time(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hash that is compared byte by byte until the first difference would tell how near a guess is."""
    token, key = keys.create("bob")
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr("hmac.compare_digest", lambda *pair: (compared.append(pair), compare(*pair))[1])
    assert keys.find(token) == key
    assert keys.find(f"dk-{key.id}-guess") is None
    assert keys.find("dk-nobody-guess") is None
    assert len(compared) == 3


def test_a_changed_key_is_the_same_key(shared_keys: Keys) -> None:
    keys = shared_keys
    token, key = keys.create("bob", experts=["a"], requests_per_minute=60, budget=2)
    with pytest.raises(UnknownKey):
        keys.change("b\0b", budget=5)
    assert keys.change(key.id, budget=5) == (key, replace(key, budget=5.0))
    assert keys.find(token) == replace(key, budget=5.0)
    everything = {
        "name": "eve",
        "experts": None,
        "requests_per_minute": None,
        "budget": None,
        "window": "day",
        "zone": "Asia/Tokyo",
    }
    # By its name, and by the prefix that is shown.
    _, after = keys.change("bob", **everything)
    assert after == Key(key.id, "eve", window="day", zone="Asia/Tokyo")
    assert keys.change(f"dk-{key.id}", experts={"b", "c"})[1].experts == frozenset({"b", "c"})
    assert [issued.key for issued in keys.list()] == [keys.find(token)]


def test_a_change_that_makes_no_sense_changes_nothing(keys: Keys) -> None:
    token, key = keys.create("bob", budget=2)
    twins = [keys.create("twin")[1].id for _ in range(2)]
    keys.revoke(keys.create("gone")[1].id)
    before = keys.list()
    for settings, message in WRONG:
        with pytest.raises(ValueError, match=message):
            keys.change("bob", **({"budget": 9} | settings))
    for settings, message in (
        ({}, "nothing to change; expected one of name, experts"),
        ({"admin": True}, "admin: not to be changed"),
    ):
        with pytest.raises(ValueError, match=message):
            keys.change("bob", **settings)
    for name, message in {
        "nobody": "'nobody' is neither the id nor the name",
        "gone": r"\(gone\) is revoked, which is for good",
        "twin": f"'twin' is the name of 2 keys; say which by its id, (?={twins[0]}|{twins[1]})",
    }.items():
        with pytest.raises(UnknownKey, match=message):
            keys.change(name, budget=9)
        with pytest.raises(UnknownKey, match=message):
            keys.rotate(name)
    for hours in (-1, float("nan"), float("inf"), 9000, True, "1"):
        with pytest.raises(ValueError, match="grace_hours: expected hours from 0"):
            keys.rotate("bob", grace_hours=hours)  # type: ignore[arg-type]
    assert keys.list() == before
    assert keys.find(token) == key
    # A name is free again when its key is revoked.
    keys.revoke(twins[0])
    assert keys.change("twin", budget=9)[1].id == twins[1]


def test_a_key_is_valid_until_its_end_and_may_be_given_another(shared_keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, end = shared_keys, time.time() + 3600
    token, key = keys.create("bob", ends=end)
    rotated, _ = keys.rotate("bob", grace_hours=24)
    assert (keys.find(token), keys.find(rotated)) == (key, key)
    with monkeypatch.context() as later:
        later.setattr("deferral.gateway.keys.time.time", lambda: end)
        assert (keys.find(token), keys.find(rotated)) == (None, None)
        assert len(keys) == 1, "a gateway with keys that have ended is not open"
        _, changed = keys.change("bob", budget=5)
        assert (changed.ends, keys.find(rotated)) == (end, None)
        _, heir = keys.create("bob")
        assert keys.change("bob", budget=6)[0] == heir, "of two of a name the one that is valid"
        keys.revoke(heir.id)
        assert keys.find(rotated if keys.change("bob", ends=end + 60)[1].ends == end + 60 else "") is not None
    assert keys.change("bob", ends=None)[1].ends is None


def test_a_rotated_key_has_another_token_and_the_old_one_as_long_as_was_said(
    shared_keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = shared_keys
    first, key = keys.create("bob", budget=2)
    second, issued = keys.rotate("bob")
    assert (issued.key, issued.former_until) == (key, None)
    assert (keys.find(first), keys.find(second)) == (None, key)
    third, issued = keys.rotate(key.id, grace_hours=2)
    assert issued.former_until == pytest.approx(time.time() + 7200, abs=60)
    assert keys.list() == [issued]
    assert (keys.find(first), keys.find(second), keys.find(third)) == (None, key, key)
    assert keys.find(f"{second[:-1]}{'A' if second[-1] != 'A' else 'B'}") is None
    # What may change meanwhile holds for both.
    _, key = keys.change("bob", budget=3)
    assert (keys.find(second), keys.find(third)) == (key, key)
    with monkeypatch.context() as later:
        later.setattr("deferral.gateway.keys.time.time", lambda: issued.former_until)
        assert (keys.find(second), keys.find(third)) == (None, key)
    # A third token ends the oldest: two are valid at most.
    fourth, _ = keys.rotate("bob", grace_hours=0.5)
    assert [keys.find(token) for token in (first, second, third, fourth)] == [None, None, key, key]
    fifth, _ = keys.rotate("bob")
    assert [keys.find(token) for token in (third, fourth, fifth)] == [None, None, key]
    keys.rotate("bob", grace_hours=1)
    keys.revoke(key.id)
    assert keys.find(fifth) is None


def test_former_tokens_are_compared_in_constant_time_and_stored_as_hashes(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    first, key = keys.create("bob")
    second, _ = keys.rotate("bob", grace_hours=1)
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr("hmac.compare_digest", lambda *pair: (compared.append(pair), compare(*pair))[1])
    assert keys.find(first) == key
    assert len(compared) == 2
    for token in (first, second):
        secret = token.split("-", 2)[2]
        assert not any(secret.encode() in path.read_bytes() for path in tmp_path.iterdir())
        assert secret not in caplog.text + repr(keys.list()) + repr(keys._found)


def test_a_revoked_key_opens_nothing_and_stays_on_the_list(shared_keys: Keys) -> None:
    keys = shared_keys
    token, key = keys.create("bob")
    _, other = keys.create("eve")
    assert keys.revoke(f"dk-{key.id}")
    assert keys.find(token) is None
    assert not keys.revoke(key.id)
    assert not keys.revoke("nobody")
    assert not keys.revoke("\0")
    listed = keys.list()
    assert [issued.key for issued in listed] == [key, other]
    assert [issued.revoked is None for issued in listed] == [False, True]
    assert listed[0].prefix == f"dk-{key.id}"


WRONG = [
    ({"name": ""}, "name: expected up to 200 printable"),
    ({"name": "a\nb"}, "name: expected up to 200 printable"),
    ({"name": "x" * 201}, "name: expected up to 200 printable"),
    ({"experts": "small"}, "experts: expected names"),
    ({"experts": [1]}, "experts: expected names"),
    ({"experts": ["\ud800"]}, "experts: expected names"),
    ({"experts": []}, "experts: expected at least one"),
    ({"requests_per_minute": 0}, "requests_per_minute: expected a whole"),
    ({"requests_per_minute": True}, "requests_per_minute: expected a whole"),
    ({"requests_per_minute": 1.5}, "requests_per_minute: expected a whole"),
    ({"budget": 0.0}, "budget: expected dollars above 0"),
    ({"budget": float("nan")}, "budget: expected dollars above 0"),
    ({"budget": float("inf")}, "budget: expected dollars above 0"),
    ({"budget": 10**400}, "budget: expected dollars above 0"),
    ({"window": "year"}, "window: expected one of hour, day, week, month"),
    ({"ends": 1e9}, "ends: expected seconds since 1970, later than now"),
    ({"ends": 1e12}, "ends: expected seconds since 1970, later than now"),
    ({"ends": float("nan")}, "ends: expected seconds since 1970, later than now"),
    ({"ends": "2030-01-01"}, "ends: expected seconds since 1970, later than now"),
    ({"zone": "Mars/Olympus"}, "time zone: expected a name"),
]


def test_settings_that_make_no_sense_are_refused(keys: Keys) -> None:
    for settings, message in WRONG:
        with pytest.raises(ValueError, match=message):
            keys.create(**{"name": "bob", **settings})
    assert keys.list() == []
