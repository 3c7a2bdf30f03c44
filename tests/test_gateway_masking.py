"""An expert that tells its own key tells it to nobody else."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deferral.gateway.masking import MaskedStream, masked

KEY = b"sk-s-sk-0123"


def parts_of(text: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[start:end] for start, end in pairwise(places)]


@given(
    pieces=st.lists(st.sampled_from([KEY, KEY[:-1], KEY[:5], b"s", b"sk-", b"\n", b"data: x"]), max_size=8),
    cuts=st.lists(st.integers(0, 99), max_size=8),
)
def test_a_key_in_a_stream_is_masked_however_it_is_cut_and_all_else_stays(pieces: list[bytes], cuts: list[int]) -> None:
    text = b"".join(pieces)
    stream, said = MaskedStream(KEY), []
    for part in parts_of(text, cuts):
        said.append(stream.part(part))
        assert len(stream.held) < len(KEY)
    assert b"".join([*said, stream.held]) == masked(KEY, text) == text.replace(KEY, b"***")


@pytest.mark.parametrize("part", [b'data: {"choices": [{"delta": {"content": "sk-"}}]}\n\n', b"no end", b"sk\n"])
def test_nothing_waits_where_no_key_begins(part: bytes) -> None:
    stream = MaskedStream(KEY)
    assert stream.part(part) is part
    assert stream.held == b""


def test_what_is_no_secret_is_not_looked_for() -> None:
    assert masked(b"", b"text") == MaskedStream(b"").part(b"text") == b"text"
    assert masked(b"EMPTY", b"an EMPTY text") == MaskedStream(b"EMPTY").part(b"an EMPTY text") == b"an EMPTY text"
