import json
import re
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from deferral.datasets import DataError
from deferral.routing import Log, Outcome, cost_table, list_prices, log_of_table, read_log, token_prices, write_log
from deferral.routing.outcomes import spelt_alike
from deferral.routing.prices import PriceModel, fit_prices


def some_log() -> Log:
    return Log(
        [
            Outcome("what is 2 + 2?", "small", 1.0, 0.001, input_tokens=7, output_tokens=3, latency_s=0.25, tags=("maths",)),
            Outcome("what is 2 + 2?", "large", 1.0, 0.02, propensity=0.3),
            Outcome("prove it \U0001f389 日本語", "large", 0.3, 0.04, time=1.7e9, tags=("maths", "proof")),
            Outcome("what is 2 + 2?", "small", 0.0, 0.003),
            Outcome("", "small", 0.5, 0.0),
        ]
    )


def same(one: Outcome, other: Outcome) -> bool:
    return all(
        a == pytest.approx(b, rel=1e-6, nan_ok=True) if isinstance(a, float) else a == b
        for a, b in ((getattr(one, name), getattr(other, name)) for name in Outcome.__slots__)
    )


def test_who_may_read_a_file_and_where_a_link_leads_stay(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "log.jsonl").symlink_to(tmp_path / "far" / "log.jsonl")
    write_log(some_log(), tmp_path / "log.jsonl", private=True)
    kept = tmp_path / "far" / "log.jsonl"
    assert kept.stat().st_mode & 0o777 == 0o600
    for mode in (0o640, 0o600):
        kept.chmod(mode)
        write_log(some_log(), tmp_path / "log.jsonl")
        assert ((tmp_path / "log.jsonl").is_symlink(), kept.stat().st_mode & 0o777) == (True, mode)
    assert [path.name for path in kept.parent.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize("name", ["log.jsonl", "log.parquet"])
def test_a_log_comes_back_from_a_file(tmp_path: Path, name: str) -> None:
    log = some_log()
    write_log(log, tmp_path / name)
    back = read_log(tmp_path / name)
    assert len(back) == len(log)
    assert all(same(*pair) for pair in zip(back, log, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_numbers_that_were_stored_in_32_bits_are_written_as_they_were_given(tmp_path: Path) -> None:
    write_log(Log([Outcome("q", "a", 0.3, 0.1 + 0.2)]), tmp_path / "log.jsonl")
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"query": "q", "expert": "a", "quality": 0.3, "price": 0.1 + 0.2}


def test_a_table_holds_the_mean_of_every_cell() -> None:
    generator = np.random.default_rng(0)
    rows = [
        (f"q{generator.integers(20)}", f"e{generator.integers(4)}", generator.random(), generator.random()) for _ in range(300)
    ]
    table = Log(Outcome(*row) for row in rows).table()
    for i, query in enumerate(table.queries):
        for j, expert in enumerate(table.experts):
            here = [row for row in rows if row[:2] == (query, expert)]
            assert table.mask[i, j] == bool(here)
            if here:
                assert table.quality[i, j] == pytest.approx(np.mean([row[2] for row in here]), rel=1e-6)
                assert table.price[i, j] == pytest.approx(np.mean([row[3] for row in here]))
    assert np.isnan(table.latency).all()


def test_an_unknown_latency_says_nothing_of_the_known_ones() -> None:
    log = Log([Outcome("q", "a", 1, 0, latency_s=2), Outcome("q", "a", 1, 0), Outcome("q", "a", 0, 0, latency_s=4)])
    log.extend([Outcome("q", "b", 1, 0), Outcome("r", "a", 1, 0, latency_s=5)])
    np.testing.assert_array_equal(log.table().latency, [[3, np.nan], [5, np.nan]])


def test_a_table_of_some_experts_leaves_out_queries_that_none_of_them_answered() -> None:
    table = some_log().table(["large"])
    assert table.queries == ["what is 2 + 2?", "prove it \U0001f389 日本語"]
    assert table.full
    with pytest.raises(ValueError, match="'huge' has no outcome"):
        some_log().table(["huge"])
    with pytest.raises(ValueError, match="different names"):
        some_log().table(["large", "large"])


def test_a_log_of_a_table_is_that_table_again() -> None:
    generator = np.random.default_rng(0)
    quality, price, mask = generator.random((10, 3)), generator.random((10, 3)), generator.random((10, 3)) < 0.6
    mask[:, 0] = True
    table = log_of_table([f"q{i}" for i in range(10)], ["a", "b", "c"], quality, price, mask).table(["a", "b", "c"])
    np.testing.assert_array_equal(table.mask, mask)
    np.testing.assert_allclose(table.quality, np.where(mask, quality, 0), rtol=1e-6)
    np.testing.assert_allclose(table.price, np.where(mask, price, 0))


def test_costs_are_errors_plus_prices_in_units_of_one_error() -> None:
    costs, mask = cost_table(some_log().table(["small", "large"]), 0.02)
    torch.testing.assert_close(
        costs, torch.tensor([[0.5 + 0.1, 1.0], [0.0, 0.7 + 2.0], [0.5, 0.0]], dtype=torch.float64), atol=1e-6, rtol=0
    )
    assert mask.tolist() == [[True, True], [False, True], [True, False]]
    for bad in (0, -1.0, float("nan"), float("inf"), True):
        with pytest.raises(ValueError, match="price_of_error"):
            cost_table(some_log().table(), bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quality": float("nan")}, "row 2, quality"),
        ({"quality": 1.2}, r"row 2, quality: expected a number in \[0, 1\], got 1.2"),
        ({"price": True}, r"row 2, price: expected a number that is finite and not negative, got True"),
        ({"time": "2026-01-01"}, "row 2, time: expected a number of seconds since 1970, got '2026-01-01'"),
        ({"quality": "good"}, "row 2, quality"),
        ({"price": -0.1}, "row 2, price: expected a number that is finite and not negative, got -0.1"),
        ({"price": float("inf")}, "row 2, price"),
        ({"price": 10**400}, "row 2, price: expected a number that is finite and not negative, got inf"),
        ({"propensity": 0.0}, "row 2, propensity"),
        ({"input_tokens": 10**39}, r"row 2, input_tokens: expected a number up to 3\.4e\+38, got 1e\+39"),
        ({"propensity": 1e-60}, "row 2, propensity: expected a probability above 0, got 1e-60"),
        ({"expert": " "}, "row 2, expert"),
        ({"query": None}, "row 2, query"),
        ({"tags": {"maths"}}, "row 2, tags: expected a text or a list of texts"),
    ],
)
def test_a_bad_outcome_is_named_by_row_and_field(change: dict, message: str) -> None:
    good = {"query": "q", "expert": "a", "quality": 1.0, "price": 0.0}
    log = Log([Outcome(**good)])
    with pytest.raises(DataError, match=message):
        log.append(Outcome(**{**good, **change}))
    assert len(log) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "q", "expert": "a", "quality": 1, "pri', "row 2: the last line is cut off; the 1 rows before it are whole"),
        ('{"query": "q"\n', "row 2: expected one JSON object"),
        ("[1]\n", "row 2: expected a JSON object"),
        ('{"prompt": "q", "model": "a", "score": 1}\n', "row 2, query: it is missing; not known: prompt, model, score; the"),
        ('{"query": "q", "expert": "a", "quality": 1}\n', "row 2, price: it is missing"),
        ('{"query": "q", "expert": "a", "quality": NaN, "price": 1}\n', "row 2, quality"),
        ('{"query": "q", "expert": "a", "quality": 1, "price": 1, "cost": 2}\n', "row 2, cost: it is not known; the fields"),
        ('{"query": "q", "expert": "a", "quality": 1, "cost": 1}\n', "row 2, price: it is missing; not known: cost"),
        ('{"query": "q", "expert": "a", "quality": 1, "price": 1, "tags": 0}\n', "row 2, tags: expected a text or a list of"),
    ],
)
def test_a_bad_line_is_named_by_file_row_and_field(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"query": "q", "expert": "a", "quality": 1, "price": 0.5}\n' + line)
    with pytest.raises(DataError, match=message) as caught:
        read_log(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 100_000], ids=["digits", "depth"])
def test_json_that_python_refuses_is_a_bad_line(tmp_path: Path, value: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"query": {value}')
    with pytest.raises(DataError, match="row 1: expected one JSON object"):
        read_log(path)


def test_a_parquet_file_that_was_cut_off_and_text_that_it_cannot_hold(tmp_path: Path) -> None:
    write_log(some_log(), tmp_path / "log.parquet")
    whole = (tmp_path / "log.parquet").read_bytes()
    (tmp_path / "log.parquet").write_bytes(whole[:-20])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_log(tmp_path / "log.parquet")
    (tmp_path / "log.parquet").write_bytes(whole[:20] + b"\xff\x00" * 20 + whole[60:])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_log(tmp_path / "log.parquet")
    (tmp_path / "log.parquet").write_bytes(whole[:-20])
    half = Log([Outcome("half \ud800", "a", 1.0, 0.0)])
    with pytest.raises(DataError, match=r"rows 1 to 1: .* write .jsonl"):
        write_log(half, tmp_path / "log.parquet")
    # What was there is still there, and nothing beside it.
    assert (tmp_path / "log.parquet").read_bytes() == whole[:-20]
    assert len(list(tmp_path.iterdir())) == 1
    write_log(half, tmp_path / "log.jsonl")
    assert read_log(tmp_path / "log.jsonl")[0].query == "half \ud800"


def test_a_parquet_file_of_bytes_and_one_with_a_column_twice(tmp_path: Path) -> None:
    offsets = pa.array([0, 2], pa.int32()).buffers()[1]
    latin = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xe9t")])
    columns = {"query": latin, "expert": pa.array(["a"]), "quality": pa.array([1.0]), "price": pa.array([0.0])}
    pq.write_table(pa.table(columns), tmp_path / "latin.parquet")
    with pytest.raises(DataError, match=r"latin\.parquet: a text in it is not UTF-8 .*xe9t"):
        read_log(tmp_path / "latin.parquet")
    columns["query"] = pa.array(["q"])
    twice = pa.Table.from_arrays([*columns.values(), pa.array([0.0])], [*columns, "quality"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match=r"twice\.parquet: expected columns among .*; twice: 'quality'"):
        read_log(tmp_path / "twice.parquet")
    columns["cost"], columns["__index_level_0__"] = columns.pop("price"), columns["quality"]
    pq.write_table(pa.table(columns), tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"missing: 'price'; not known: 'cost', '__index_level_0__'; .*write it with index=False"):
        read_log(tmp_path / "other.parquet")


@pytest.mark.parametrize("name", ["log.jsonl", "log.parquet"])
def test_a_log_is_not_written_where_there_is_no_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"nowhere: expected the folder for {name}, there is none"):
        write_log(some_log(), tmp_path / "nowhere" / name)


def test_a_parquet_file_of_decimals_and_names_that_are_spelt_alike(tmp_path: Path) -> None:
    rows = {"query": ["q"], "expert": ["a"], "quality": [1], "price": [Decimal("0.0015")]}
    pq.write_table(pa.table(rows), tmp_path / "log.parquet")
    assert read_log(tmp_path / "log.parquet")[0].price == 0.0015
    with pytest.raises(TypeError, match="row 1: expected an Outcome, got dict"):
        Log([{"query": "q"}])  # type: ignore[list-item]
    names = ["gpt-4", "large", "GPT 4", "small", "gpt-4o", "+", "-"]
    assert spelt_alike(names) == [["gpt-4", "GPT 4"]]


def test_a_table_does_not_grow_with_its_log() -> None:
    log = some_log()
    table = log.table()
    log.append(Outcome("later", "small", 1.0, 0.0))
    assert len(table.queries) == len(table.quality) == 3


def test_prices_to_come_are_those_of_the_tokens_that_are_expected() -> None:
    texts = ["x" * length for length in (40, 80, 160, 400)]
    log = Log(
        Outcome(text, name, 1.0, 0.0, input_tokens=len(text) / 4 + 10 * known, output_tokens=100 + len(text))
        for text in texts
        for name, known in (("a", 1), ("b", 0))
    )
    model = token_prices(log, {"a": (1.0, 2.0), "b": (0.5, 0.0), "not asked": (1.0, 1.0)})
    np.testing.assert_allclose(model(np.array([200.0])), [[(60 * 1 + 300 * 2) / 1e6, 50 * 0.5 / 1e6]])
    unknown = Log([Outcome("q" * 8, "a", 1.0, 0.0, output_tokens=5)])
    np.testing.assert_allclose(token_prices(unknown, {"a": (1.0, 1.0)})(np.array([8.0])), [[7 / 1e6]])
    for prices, message in (({"a": (1.0, 2.0)}, "b: it has no price"), ({"a": (-1.0, 2.0)}, "not negative")):
        with pytest.raises(ValueError, match=message):
            token_prices(log, prices)
    for prices, message in (
        ([1.0, 2.0], "per_million: expected dollars by the experts' names"),
        ({"a": ("1", "2"), "b": (1.0, 2.0)}, "a: dollars per million tokens: expected one number per expert, got"),
        ({"a": ("1", "two"), "b": (1.0, 2.0)}, "a: dollars per million tokens: expected one number per expert, got"),
    ):
        with pytest.raises(TypeError, match=message):
            token_prices(log, prices)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a: expected dollars per million tokens of input and of output"):
        token_prices(log, {"a": 1.0})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="log: expected a Log, got str"):
        token_prices("outcomes.jsonl", {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a: none of its outcomes has output tokens"):
        token_prices(Log([Outcome("q", "a", 1.0, 0.0)]), {"a": (1.0, 1.0)})


def test_files_that_are_no_log(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "text.parquet").write_text("not parquet")
    for name, message in (("empty.jsonl", "no outcome"), ("text.parquet", "cannot be read as Parquet"), ("log.txt", "ends in")):
        with pytest.raises(DataError, match=message):
            read_log(tmp_path / name)
    with pytest.raises(DataError, match="at least one"):
        Log().table()


def test_fitted_prices_are_the_line_that_made_them() -> None:
    generator = np.random.default_rng(0)
    queries = ["x" * length for length in range(1, 60)]
    base, slope = np.array([1e-4, 0.0, 2e-3]), np.array([2e-6, 3e-6, 0.0])
    price = base + np.array([[len(query)] for query in queries]) * slope
    mask = generator.random(price.shape) < 0.7
    table = log_of_table(queries, ["a", "b", "c"], np.zeros(price.shape), price, mask).table(["a", "b", "c"])
    model = fit_prices(table, table.mask)
    np.testing.assert_allclose(model.base, base, atol=1e-12)
    np.testing.assert_allclose(model.per_character, slope, atol=1e-12)


def test_fitted_prices_are_never_negative_nor_falling() -> None:
    queries = ["x", "x" * 50, "x" * 100]
    price = np.array([[0.3, 0.0], [0.2, 0.0], [0.1, 0.9]])
    model = fit_prices(log_of_table(queries, ["falling", "steep"], np.zeros((3, 2)), price).table(), np.ones((3, 2)))
    assert model.per_character[0] == 0
    assert (model(np.array([0.0, 1.0, 1000.0])) >= 0).all()
    np.testing.assert_allclose(model(np.array([1.0, 50.0, 100.0])).mean(0), price.mean(0))


def test_prices_are_found_by_the_names_of_their_experts() -> None:
    model = PriceModel(np.array([1.0, 2.0, 3.0]), np.array([0.1, 0.2, 0.3]), ("a", "b", "c")).of(["c", "a"])
    assert (model.base.tolist(), model.per_character.tolist()) == ([3.0, 1.0], [0.3, 0.1])


def test_list_prices_count_tokens_of_four_characters() -> None:
    model = list_prices([0.5, 30.0], [1.5, 60.0], [100, 200])
    np.testing.assert_allclose(model(np.array([400.0])), [[(100 * 0.5 + 100 * 1.5) / 1e6, (100 * 30 + 200 * 60) / 1e6]])
    one, of_one = list_prices([0.5, 30.0], [1.5, 60.0], 100), list_prices([0.5, 30.0], [1.5, 60.0], [100])
    np.testing.assert_array_equal(one.base, of_one.base)
    with pytest.raises(ValueError, match="per_million_output"):
        list_prices([1.0], [-1.0], 100)
    with pytest.raises(ValueError, match="output_tokens: expected one finite number per expert"):
        list_prices([1.0], [1.0], [1, 2])
    with pytest.raises(TypeError, match=r"per_million_input: expected one number per expert, got \['a'\]"):
        list_prices(["a"], [1.0], 100)  # type: ignore[list-item]


def test_a_table_of_another_shape_or_of_text_is_no_log() -> None:
    for given, name in (({"price": [[1.0, 2.0, 3.0]]}, "price"), ({"price": 0.0, "propensity": [1, 1, 1]}, "propensity")):
        with pytest.raises(ValueError, match=rf"{name}: expected shape \(1, 2\), queries by experts, or one per expert; got"):
            log_of_table(["q"], ["a", "b"], [[1, 0]], **given)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="row 1, quality: expected a number in"):
        log_of_table(["q"], ["a"], [["right"]], 0.0)  # type: ignore[arg-type]
    assert log_of_table(["q"], ["a", "b"], [[True, 0.5]], [1, 2])[1].price == 2
    with pytest.raises(TypeError, match=r"table: expected a Table, got Log; log.table\(\) makes one"):
        cost_table(Log(), 1.0)  # type: ignore[arg-type]


def test_a_table_of_a_spreadsheet_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(
        "\ufeffquery,expert,quality,price,latency_s,tags\r\n"
        '"two, or ""three""\r\nlines",small,1,0.001,,maths\r\nplain,large,TRUE,2e-3,1.5,\r\n\r\n'.encode()
    )
    log = read_log(path)
    assert [log[row].query for row in range(2)] == ['two, or "three"\r\nlines', "plain"]
    assert [log[row].quality for row in range(2)] == [1.0, 1.0]
    assert np.isnan(log[0].latency_s)
    assert [log[row].tags for row in range(2)] == [("maths",), ()]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a first line of columns among query, expert"),
        (
            "query;expert;quality;price\nq;small;1;1\n",
            "with commas; missing: 'query', 'expert', 'quality', 'price'; not known: 'query;expert",
        ),
        ("query,expert,quality,cost\n", "with commas; missing: 'price'; not known: 'cost'"),
        ("query,expert,quality,price,price\n", "with commas; twice: 'price'"),
        (
            ",query,expert,quality,price\n",
            "not known: ''; a column without a name is the index of pandas: write it with index=False",
        ),
        ("Unnamed: 0,query,expert,quality,cost\n", "missing: 'price'; not known: 'Unnamed: 0', 'cost'; a column without a name"),
        ("query,expert,quality,price\nq,small,1\n", "row 1: expected 4 cells, got 3"),
        ("query,expert,quality,price\nq,small,good,1\n", "row 1, quality: expected a number, got 'good'"),
        ("query,expert,quality,price\nq,small,1_0,1\n", "row 1, quality: expected a number, got '1_0'"),
        ("query,expert,quality,price\nq,small,,1\n", "row 1, quality: it is missing"),
        ('query,expert,quality,price\n"q,small,1,1\n', "expected CSV in UTF-8"),
    ],
)
def test_a_table_that_is_no_log(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=re.escape(said)):
        read_log(path)


def test_right_or_wrong_is_a_quality_and_a_blank_line_at_the_end_is_none(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"query": "q", "expert": "a", "quality": true, "price": 1}\n\n \n')
    assert read_log(path)[0].quality == 1.0
    path.write_text('\n{"query": "q", "expert": "a", "quality": true, "price": 1}\n')
    with pytest.raises(DataError, match="row 1: expected one JSON object, got an empty line"):
        read_log(path)


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"expert": " a"}, "expected no space before or after the name"),
        ({"price": 1e300}, "expected dollars up to 1e\\+12, got 1e\\+300"),
    ],
)
def test_what_would_be_taken_for_something_else(field: dict, said: str) -> None:
    with pytest.raises(DataError, match=said):
        Log([Outcome(**({"query": "q", "expert": "a", "quality": 1.0, "price": 1.0} | field))])


def test_a_query_is_kept_with_the_space_around_it() -> None:
    assert Log([Outcome(" a query\n", "a", 1.0, 1.0)]).queries == [" a query\n"]


def test_a_frame_becomes_a_log_by_its_records_and_empty_cells_are_unknown(tmp_path: Path) -> None:
    # As pandas gives the records of a frame with empty cells, and of Parquet with lists in it.
    empty: dict = {"query": "p", "expert": "a", "quality": True, "price": 0.5, "latency_s": np.nan, "tags": np.nan}
    records = [
        empty,
        {**empty, "query": "q", "tags": "maths"},
        {**empty, "query": "r", "tags": np.array(["maths", "proof"], object)},
    ]
    log = Log(Outcome(**row, confidence=np.nan) for row in records)  # type: ignore[arg-type]
    assert [log[row].tags for row in range(3)] == [(), ("maths",), ("maths", "proof")]
    assert np.isnan(log[0].latency_s)
    assert not log.confidences


def test_one_text_is_one_tag_in_every_format(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"query": "q", "expert": "a", "quality": 1, "price": 1, "tags": "maths"}\n')
    (tmp_path / "log.csv").write_text("query,expert,quality,price,tags\nq,a,1,1,maths\n")
    row = {"query": ["q"], "expert": ["a"], "quality": [1.0], "price": [1.0], "tags": ["maths"]}
    pq.write_table(pa.table(row), tmp_path / "log.parquet")
    read = [read_log(tmp_path / f"log.{ending}")[0] for ending in ("jsonl", "csv", "parquet")]
    assert [outcome.tags for outcome in read] == 3 * [("maths",)]
    assert Log([Outcome("q", "a", 1.0, 1.0, tags="")])[0].tags == ()


def test_one_name_in_two_normal_forms_is_told() -> None:
    assert spelt_alike(["caf\u00e9", "cafe\u0301", "tea"]) == [["caf\u00e9", "cafe\u0301"]]


def test_a_log_of_a_frame_is_the_log_of_its_rows() -> None:
    frame = pd.DataFrame({"query": ["q", "r"], "expert": "a", "quality": [1, 0], "price": 0.5, "latency_s": [0.25, np.nan]})
    frame["tags"] = "maths"
    log = Log(Outcome(**row) for row in frame.to_dict("records"))
    assert [(one.query, one.quality, one.tags) for one in (log[0], log[1])] == [("q", 1.0, ("maths",)), ("r", 0.0, ("maths",))]
    with pytest.raises(TypeError, match="a log of a pandas frame"):
        Log(frame)


def test_a_name_says_what_can_be_done_with_a_log(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="CSV can be read, but not written"):
        write_log(Log([Outcome("q", "a", 1.0, 0.0)]), tmp_path / "log.csv")
    with pytest.raises(DataError, match=r"ends in \.jsonl, \.ndjson, \.parquet, \.csv"):
        read_log(tmp_path / "log.tsv")
