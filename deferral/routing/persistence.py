"""A router in a folder: router.json, and the numbers in the safetensors file that it names.  Loading executes nothing.

Replacing router.json is one step of the file system, so that a reader sees the old router or the new one, also after a crash.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from operator import methodcaller
from pathlib import Path

import numpy as np

from deferral.errors import DataError
from deferral.routing.cascade import Cascade
from deferral.routing.constraints import Abilities
from deferral.routing.fitted import Estimates, Fitted
from deferral.routing.held_out import Judged
from deferral.routing.held_rows import HeldRows
from deferral.routing.policies import Clusters, Factors, Features, Heads, Linear, Neighbours, Rejector
from deferral.routing.policies.policy import Policy
from deferral.routing.prices import PriceModel
from deferral.routing.promises import Witnesses
from deferral.routing.vectors import Arrays
from deferral.whole_files import PARTIAL, written_whole

__all__ = ["FORMAT", "Saved", "check_place", "check_unchanged", "keep_previous", "load", "previous_of", "save", "written"]

FORMAT = 3
_NUMBERS, _NAMES = "state.{}.safetensors", "router.json"
_POLICIES = {policy.kind: policy for policy in (Linear, Neighbours, Clusters, Heads, Factors, Features, Rejector)}
_JUDGED = ("errors", "learned", "static", "random", "oracle", "gain", "half_width", "overall", "rows")
_STATE = ("means", "mean_price", "latency", "extension", "floor", "places")
_HELD = {
    "quality": "state/held_quality",
    "estimate": "state/held_estimate",
    "price": "state/held_price",
    "length": "held/length",
    "dearness": "state/held_dearness",
    "deviation": "held/deviation",
    "fold": "held/fold",
    "keys": "held/keys",
    "means": "held/means",
}
_WITNESSES = {"quality": "estimate", "similarity": "similarity", "trust": "trust", "dearness": "dearness"}


@dataclass(frozen=True)
class Saved:
    """All that a router is, but for a sentence encoder, of which only the fingerprint is kept."""

    price_of_error: float
    explore: float
    seed: int
    salt: str
    abilities: Mapping[str, Abilities]
    encoder: str  # its kind
    encoder_arrays: Arrays
    fingerprint: str | None
    policies: tuple[Callable[[], Policy], ...]  # what `fit` makes its estimators by; those of the user's own are left out
    fitted: Fitted
    seen: np.ndarray  # (Q,) fingerprints of the queries that it has learned from
    witnesses: Witnesses | None
    cascade: Cascade | None


def save(router: Saved, folder: Path) -> None:
    """Write the numbers beside those that are there, then put router.json in its place: until then the old router is whole."""
    from safetensors.numpy import save as as_bytes

    state = router.fitted
    if unknown := [policy.kind for policy in state.policies if policy.kind not in _POLICIES]:
        raise ValueError(f"a policy of your own ({unknown[0]}) cannot be saved; expected one of {', '.join(_POLICIES)}")
    check_place(folder)
    arrays = {f"encoder/{name}": array for name, array in router.encoder_arrays.items()}
    arrays |= {f"memory/{name}": array for name, array in state.memory.arrays.items()}
    for policy in state.policies:
        if policy is not state.memory:
            arrays |= {f"{policy.kind}/{name}": array for name, array in policy.arrays.items()}
    arrays |= {f"state/{name}": getattr(state, name) for name in _STATE}
    arrays |= {place: getattr(state.held, name) for name, place in _HELD.items()}
    arrays |= {"familiar/similarity": state.familiar[0], "familiar/chance": state.familiar[1]}
    arrays |= {"kinds/centres": state.kinds[0], "kinds/shares": state.kinds[1]}
    arrays |= {"prices/base": state.prices.base, "prices/per_character": state.prices.per_character}
    arrays["seen/queries"] = router.seen
    if (rows := router.witnesses) is not None:
        arrays |= {"witnesses/quality": rows.quality, "witnesses/characters": rows.characters}
        arrays |= {f"witnesses/{_WITNESSES[name]}": value for name, value in rows.estimated._asdict().items()}
    if router.cascade is not None:
        arrays |= {f"cascade/{name}": value for name, value in router.cascade.numbers.items()}
    if state.judged is not None:
        arrays |= {f"judged/{name}": getattr(state.judged, name) for name in _JUDGED}
    names = {
        "format": FORMAT,
        "encoder": router.encoder,
        "fingerprint": router.fingerprint,
        "price_of_error": float(router.price_of_error),
        "explore": float(router.explore),
        "seed": router.seed,
        "salt": router.salt,
        "abilities": {name: asdict(ability) for name, ability in router.abilities.items()},
        "experts": list(state.experts),
        "policies": [policy.kind for policy in state.policies],
        "learners": [kind for make in router.policies if (kind := make().kind) in _POLICIES],
        "neighbours": {"count": state.memory.count, "prior": state.memory.prior, "beside": state.memory.beside},
        "weights": list(state.weights),
        "abroad": list(state.abroad),
        "reliance": state.reliance,
        "winner": state.winner,
        "held_costs": state.held_costs,
        "room": state.room,
        "mean_length": state.mean_length,
        "texts": list(state.texts),
        "cascade": None if router.cascade is None else router.cascade.names,
    }
    numbers = as_bytes({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    names["sha256"] = digest = sha256(numbers).hexdigest()
    names["names_sha256"] = _digest(names)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _NUMBERS.format(digest[:12])
    with _alone(folder):
        _put(path, numbers)
        _put(folder / _NAMES, _as_json(names))
        for other in (*folder.glob(_NUMBERS.format("*")), *_unfinished(folder)):
            if other != path:
                other.unlink(missing_ok=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One saves at a time: each removes the numbers of the others."""
    try:
        import fcntl
    except ModuleNotFoundError:
        # Windows has no such locks.
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def check_place(folder: Path) -> None:
    """DataError if what is there is no router, and would be lost, or if there can be no folder."""
    if folder.exists() and not (folder / _NAMES).is_file() and any(_foreign(folder) if folder.is_dir() else [folder]):
        raise DataError(f"{folder}: it is there, and is no router; expected a new name, an empty folder or a router's folder")
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise DataError(f"{folder}: nothing can be written in {place}; expected a folder of yours")


def written(folder: Path) -> str:
    """A name for the router that a folder holds: another after each save of another."""
    return sha256((folder / _NAMES).read_bytes()).hexdigest() if (folder / _NAMES).is_file() else ""


def check_unchanged(folder: Path, before: str) -> None:
    """DataError where the router in a folder is another than was `written` there before: that one was compared with nothing."""
    if written(folder) != before:
        raise DataError(f"{folder}: another router was saved there in the meantime, and is left alone; start again")


def keep_previous(folder: Path) -> Path:
    """Copy the router of a folder, as it is, to FOLDER.previous beside it, whole or not at all.  -> that folder"""
    previous = previous_of(folder)
    unfinished = previous.with_name(f".{previous.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(folder, unfinished)
    shutil.rmtree(previous, ignore_errors=True)
    unfinished.rename(previous)
    return previous


def previous_of(folder: Path) -> Path:
    """Where the router that a folder held before its last one is kept."""
    return folder.absolute().with_name(f"{folder.absolute().name}.previous")


def _foreign(folder: Path) -> Iterator[Path]:
    """What is there beside the files of a save that was killed."""
    own = {*folder.glob(_NUMBERS.format("*")), *_unfinished(folder)}
    return (path for path in folder.iterdir() if path not in own)


def _unfinished(folder: Path) -> Iterator[Path]:
    """Files that a save was killed in the middle of."""
    for name in (_NUMBERS.format("*"), _NAMES):
        yield from folder.glob(PARTIAL.format(name, "*", "*"))


def load(folder: Path) -> Saved:
    """The router of a folder; DataError where it is missing, corrupted or of another version."""
    from safetensors import SafetensorError
    from safetensors.numpy import load as from_bytes

    names, numbers = _read(folder)
    try:
        arrays = from_bytes(numbers)
        fitted, witnesses, cascade = _state(names, arrays), _part(arrays, "witnesses"), names["cascade"]
        usual = partial(Neighbours, count=fitted.memory.count, prior=fitted.memory.prior)
        saved = Saved(
            price_of_error=names["price_of_error"],
            explore=names["explore"],
            seed=names["seed"],
            salt=names["salt"],
            abilities={name: Abilities(**values) for name, values in names["abilities"].items()},
            encoder=names["encoder"],
            encoder_arrays=_part(arrays, "encoder"),
            fingerprint=names["fingerprint"],
            policies=tuple(usual if kind == Neighbours.kind else _POLICIES[kind] for kind in names["learners"]),
            fitted=fitted,
            seen=arrays["seen/queries"],
            witnesses=_witnesses(witnesses) if witnesses else None,
            cascade=None if cascade is None else Cascade.restored(cascade, _part(arrays, "cascade")),
        )
        if saved.cascade is not None and list(saved.cascade.experts) != list(fitted.experts):
            raise KeyError("the cascade is of other experts")
    except (KeyError, TypeError, ValueError, AttributeError, SafetensorError, OSError) as error:
        raise DataError(f"{folder}: the router cannot be read, {type(error).__name__}: {error}; fit and save it again") from error
    return saved


def _witnesses(arrays: dict[str, np.ndarray]) -> Witnesses:
    estimated = Estimates(**{name: arrays[place] for name, place in _WITNESSES.items()})
    return Witnesses(arrays["quality"], estimated, arrays["characters"])


def _state(names: dict, arrays: dict[str, np.ndarray]) -> Fitted:
    memory = Neighbours(**names["neighbours"])
    memory.arrays = _part(arrays, "memory")
    policies = []
    for kind in names["policies"]:
        policy = memory if kind == Neighbours.kind else _POLICIES[kind]()
        if policy is not memory:
            policy.arrays = _part(arrays, kind)
        policies.append(policy)
    judged = _part(arrays, "judged")
    return Fitted(
        experts=tuple(names["experts"]),
        prices=PriceModel(arrays["prices/base"], arrays["prices/per_character"]),
        policies=tuple(policies),
        weights=tuple(names["weights"]),
        abroad=tuple(names["abroad"]),
        memory=memory,
        texts=tuple(names["texts"]),
        familiar=(arrays["familiar/similarity"], arrays["familiar/chance"]),
        kinds=(arrays["kinds/centres"], arrays["kinds/shares"]),
        reliance=names["reliance"],
        judged=Judged(**judged) if judged else None,
        winner=names["winner"],
        held_costs=names["held_costs"],
        room=names["room"],
        mean_length=names["mean_length"],
        held=HeldRows(**{name: arrays[place] for name, place in _HELD.items()}),
        **{name: arrays[f"state/{name}"] for name in _STATE},
    )


def _part(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.partition("/")[2]: array for name, array in arrays.items() if name.partition("/")[0] == prefix}


def _read(folder: Path) -> tuple[dict, bytes]:
    """What router.json says, and the numbers it names."""
    for attempt in range(2):
        names = _names(folder)
        path = folder / _NUMBERS.format(str(names.get("sha256"))[:12])
        try:
            numbers = path.read_bytes()
            break
        except OSError as error:
            # Between two reads another router may have been saved.
            if attempt == 1:
                raise DataError(f"{folder}: {path.name} cannot be read, {error}; fit and save the router again") from error
    if sha256(numbers).hexdigest() != names.get("sha256"):
        raise DataError(f"{folder}: {path.name} is not what {_NAMES} says; it is corrupted: fit and save the router again")
    return names, numbers


def _names(folder: Path) -> dict:
    try:
        names = json.loads((folder / _NAMES).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{folder}: there is no router; expected a folder with {_NAMES}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{folder}: {_NAMES} cannot be read, {error}; fit and save the router again") from error
    if not isinstance(names, dict):
        raise DataError(f"{folder}: {_NAMES} is no description of a router")
    found = names.get("format")
    if found != FORMAT:
        newer = isinstance(found, int) and found > FORMAT
        what = "a newer deferral wrote it: update deferral" if newer else "fit and save the router again"
        raise DataError(f"{folder}: expected format {FORMAT}, got {found!r}; {what}")
    if names.pop("names_sha256", None) != _digest(names):
        raise DataError(f"{folder}: {_NAMES} is not as it was written; it is corrupted: fit and save the router again")
    return names


def _digest(names: dict) -> str:
    return sha256(_as_json(names)).hexdigest()


def _as_json(names: dict) -> bytes:
    # Numbers and truth values of numpy, in an expert's abilities perhaps, are those of Python.
    return json.dumps(names, default=methodcaller("item")).encode()


def _put(path: Path, content: bytes) -> None:
    with written_whole(path) as partial, partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
