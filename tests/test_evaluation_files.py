"""Files of any tool are read; every bad one is named by row and column."""

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from deferral.datasets import DataError
from deferral.evaluation.evaluate import evaluate
from deferral.evaluation.outputs import read_outputs
from deferral.evaluation.report import show_evaluation
from tests.method_outputs import PRICES, ROWS, columns, write


def test_labels_that_a_missing_answer_made_into_decimals_are_the_same_labels(tmp_path: Path) -> None:
    table = {"target": [0, 1, 2, 1], "answer": [0, 1, 1, 1], "answer_A": ["0.0", "", "2.0", "1.0"], "action": ["own"] * 4}
    outputs = read_outputs(write(tmp_path / "ours.csv", table))
    assert outputs.labels == ["0", "1", "2"]
    assert outputs.answers.tolist() == [[0, 0], [1, -1], [1, 2], [1, 1]]


def test_labels_are_taken_as_they_are_written(tmp_path: Path) -> None:
    table = {"target": ["1_12", "01", "9007199254740993"], "answer": ["11_2", "1", "9007199254740992"], "action": ["own"] * 3}
    evaluation = evaluate([write(tmp_path / "ours.csv", table)])
    assert evaluation.comparison.figures["ours"].cost.estimate == 1
    large = {"target": [2**60 + 1], "answer": [2**60], "action": ["own"]}
    assert evaluate([write(tmp_path / "large.parquet", large)]).comparison.figures["large"].cost.estimate == 1
    one, other = ({"target": [label, "3"], "answer": ["3", "3"], "action": ["own"] * 2} for label in ("1000001", "1000002"))
    with pytest.raises(DataError, match="the targets differ"):
        evaluate([write(tmp_path / "one.csv", one), write(tmp_path / "other.csv", other)])


@pytest.mark.parametrize("large", [10_000_000_000, 123_456_789_012, 2**53 - 1])
def test_whole_numbers_in_a_floating_column_are_the_labels_of_an_integer_column(tmp_path: Path, large: int) -> None:
    table = {"target": [large, 7, 0], "answer": [float(large), 7.0, -0.0], "answer_A": [large, None, 1.5], "action": ["own"] * 3}
    path = write(tmp_path / "ours.parquet", table)
    assert evaluate([path]).comparison.figures["ours"].cost.estimate == 0
    assert read_outputs(path).labels == ["0", "1.5", "7", str(large)]
    frame = pd.DataFrame(table | {"answer": pd.Categorical([float(large), 7.0, 7.0])})
    frame.to_parquet(tmp_path / "frame.parquet")
    assert read_outputs(tmp_path / "frame.parquet").labels == ["0", "1.5", "7", str(large)]


@pytest.mark.parametrize(("kind", "label"), [(pa.float64(), 2.0**53), (pa.float64(), -1e18), (pa.float32(), 2.0**24)])
def test_a_label_that_a_floating_column_may_have_rounded_is_refused(tmp_path: Path, kind: pa.DataType, label: float) -> None:
    table = {"target": pa.array([1, 2]), "answer": pa.array([1.0, label], kind), "score": pa.array([1e300, 0.0])}
    with pytest.raises(DataError, match=r"row 2, column 'answer': expected a label below 2\^(53|24)"):
        evaluate([write(tmp_path / "ours.parquet", table)])
    table["answer"] = pa.array([1.0, 2.0], kind)
    scores = read_outputs(write(tmp_path / "ours.parquet", table)).scores
    assert scores is not None
    assert scores[:, 0].tolist() == [1e300, 0.0]


def test_a_line_break_between_quotes_is_one(tmp_path: Path) -> None:
    path = tmp_path / "ours.csv"
    path.write_text('target,answer,"answer_Ann\nLee",action\n"a\nb",a,"a\nb","Ann\nLee"\n' + "a,a,a,own\n" * 20)
    outputs = read_outputs(path)
    assert outputs.experts == ["Ann\nLee"]
    assert outputs.labels == ["a", "a\nb"]
    evaluation = evaluate([path])
    assert evaluation.comparison.figures["ours"].cost.estimate == 0
    show_evaluation(evaluation)


def test_an_expert_gives_one_answer_to_a_row(tmp_path: Path) -> None:
    text = "target,answer,answer_A,answer_B,score,score_A,score_B\na,a,b,a,1,0,0\nb,a,b,c,1,0,0\na,a,,a,1,0,0\n"
    one, two, three = (tmp_path / f"{name}.csv" for name in ("one", "two", "three"))
    one.write_text(text)
    two.write_text(text.replace("b,a,b,c,1,0,0", "b,b,b,,0,0,").replace("a,a,,a", "a,b,a,b"))
    with pytest.raises(DataError, match=r"two.csv: row 3, column 'answer_B': expected 'a' as in .*one.csv, got 'b'"):
        evaluate([one, two])
    two.write_text(text.replace("b,a,b,c,1,0,0", "b,b,b,,0,0,").replace("a,a,,a", "a,b,a,a"))
    assert len(evaluate([one, two]).comparison.targets) == 3
    three.write_text(text.replace("a,a,,a", "a,a,b,a"))
    with pytest.raises(DataError, match=r"three.csv: row 3, column 'answer_A': expected 'a' as in .*two.csv, got 'b'"):
        evaluate([one, two, three])
    numbers = "target,answer,answer_A,score,score_A\n1,1,2,0,0\n2,2,{},0,0\n"
    one.write_text(numbers.format("2"))
    two.write_text(numbers.format("2.5"))
    with pytest.raises(DataError, match=r"row 2, column 'answer_A': expected 2.0 as in .*one.csv, got 2.5"):
        evaluate([one, two], regression=True)


def test_nan_is_a_missing_answer_in_both_kinds_of_file(tmp_path: Path) -> None:
    table = {"target": [1.0, 2.0], "answer": [1.0, 1.0], "answer_A": [float("nan"), 2.0], "score": [0.0, 0.0], "score_A": [1, 1]}
    for suffix in (".csv", ".parquet"):
        outputs = read_outputs(write(tmp_path / f"ours{suffix}", table))
        assert outputs.labels == ["1", "2"]
        assert outputs.mask.tolist() == [[True, False], [True, True]]
        assert outputs.actions.tolist() == [0, 1]


def test_a_spreadsheets_file_is_read_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "OURS.CSV"
    path.write_bytes(b'\xef\xbb\xbftarget, answer ,score\r\n"a, b","a, b",1\r\nc,c,0.5\r\n\r\n')
    outputs = read_outputs(path)
    assert outputs.labels == ["a, b", "c"]
    assert outputs.targets.tolist() == outputs.answers[:, 0].tolist()


def test_the_index_that_pandas_writes_is_no_column_of_ours(tmp_path: Path) -> None:
    table = pd.DataFrame(columns())
    table.to_csv(tmp_path / "ours.csv")
    table[table["score"] > 0].to_parquet(tmp_path / "part.parquet")
    assert read_outputs(tmp_path / "ours.csv").experts == ["Ann", "Bob"]
    assert len(read_outputs(tmp_path / "part.parquet").targets) == (table["score"] > 0).sum()


GOOD = "target,answer,answer_A,score,score_A\na,a,b,0.5,0.25\nb,a,b,0.5,0.75\n"
BAD = {
    "row 2, column 'score_A': expected a number, got 'high'": GOOD.replace("0.75", "high"),
    "row 1, column 'score': expected a finite number, got 'nan'": GOOD.replace("a,a,b,0.5", "a,a,b,nan"),
    "row 2, column 'answer': expected a label": GOOD.replace("b,a,b", "b,,b"),
    "row 2, column 'score_A': expected a score, since the expert answered": GOOD.replace("0.75", ""),
    "there is no column 'target'": GOOD.replace("target", "truth"),
    "there is no column 'score_A'": "target,answer,answer_A,score\na,a,b,0.5\n",
    "column 'score_B' is not one of": GOOD.replace("score_A", "score_B"),
    "column 'Answer' is not one of": GOOD.replace("a,a,b", "a,a,b,a").replace("b,a,b", "b,a,b,a").replace("A,", "A,Answer,", 1),
    "column 'abstain_score' is not one of action, answer, answer_A, probability, probability_A, score, score_A, score_abstain, "
    "target; did you mean 'score_abstain'?  Rename it": GOOD.replace("score_A", "score_A,abstain_score").replace("5\n", "5,0\n"),
    "column 'actions' is not one of action, answer, probability, score, score_abstain, target; did you mean 'action'?": (
        "target,answer,score,actions\na,a,0.5,own\n"
    ),
    "column 'probabilities' is not one of": "target,answer,score,probabilities\na,a,0.5,0.9\n",
    "nothing says who answers": "target,answer,answer_A\na,a,b\n",
    "at least one row": "target,answer,score\n",
    "column 'answer' is there twice": "target,answer,answer,score\na,a,a,0.5\n",
    "row 1, column 'action': expected one of own, A, got 'C'": "target,answer,answer_A,action\na,a,b,C\n",
    "row 1, column 'action': expected someone who answered": "target,answer,answer_A,action\na,a,,A\n",
    "row 1, column 'probability': expected a probability": "target,answer,score,probability\na,a,0.5,1.5\n",
    "row 3: expected 5 cells, as in the header, got 2: 'a,b'": GOOD + "a,b\n",
    "row 2, column 'target': expected a label": GOOD.replace("\nb,", "\n\nb,"),
    "row 1, column 'score': expected a finite number, got '-inf'": GOOD.replace("a,a,b,0.5", "a,a,b,-inf"),
    "column 'answer': expected labels like those of the target (false, true), got 0, 1": (
        "target,answer,score\ntrue,1,1\nfalse,0,1\n"
    ),
    "column 'answer_A': expected labels like those of the target (cat, dog), got chat, chien": (
        "target,answer,answer_A,score,score_A\n" + "cat,cat,chat,0,1\ndog,cat,chien,0,1\n" * 5
    ),
    "row 2, column 'answer_A': expected 'cat', as the target spells it (the answer would count as wrong), got 'Cat'": (
        "target,answer,answer_A,score,score_A\n" + "dog,cat,dog,0,1\ncat,cat,Cat,0,1\n" * 5
    ),
    "separate the cells by commas": "target;answer;score\na;a;1\n",
    "two methods would be called 'oracle'": "",
    "an expert cannot be called ''": "target,answer,answer_,action\na,a,b,own\n",
    "row 2, column 'answer_A': expected text without the character NUL, got 'b\\x00'": GOOD.replace("b,a,b", "b,a,b\0"),
    "cannot be called 'own'": "target,answer,answer_own,score\na,a,b,0.5\n",
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_file_is_named_by_row_and_column(tmp_path: Path, message: str) -> None:
    path = tmp_path / ("oracle.csv" if "oracle" in message else "bad.csv")
    path.write_text(BAD[message] or GOOD, encoding="utf-8")
    with pytest.raises(DataError) as error:
        evaluate([path])
    assert message in str(error.value)
    assert "oracle" in message or str(path) in str(error.value)


def test_other_columns_are_not_read_and_a_note_says_so(tmp_path: Path) -> None:
    table = columns()
    plain = evaluate([write(tmp_path / "ours.csv", table)], prices=PRICES)
    more = {"id": list(range(ROWS)), "text": ["a, b"] * ROWS, "price_Ann": [0.1] * ROWS} | table
    many = write(tmp_path / "theirs.parquet", table | {f"x{number}": [0.0] * ROWS for number in range(7)})
    extended = tmp_path / "ours.parquet"
    evaluation = evaluate([write(extended, more), many], prices=PRICES)
    assert evaluation.comparison.notes == [
        "ours.parquet: columns that are not read: id, text, price_Ann.",
        "theirs.parquet: columns that are not read: x0, x1, x2, x3, x4, 2 more.",
    ]
    assert evaluation.comparison.figures["ours"] == plain.comparison.figures["ours"]
    assert plain.comparison.notes == []


def test_files_and_options_that_do_not_fit_together(tmp_path: Path) -> None:
    path, longer = tmp_path / "one.csv", tmp_path / "longer.csv"
    path.write_text(GOOD, encoding="utf-8")
    longer.write_text(GOOD + "a,a,a,0,0\n", encoding="utf-8")
    other = tmp_path / "other.csv"
    other.write_text(GOOD.replace("b,a,b", "a,a,b"), encoding="utf-8")
    with pytest.raises(DataError, match="3 rows instead of 2"):
        evaluate([path, longer])
    with pytest.raises(DataError, match="the targets differ"):
        evaluate([path, other])
    with pytest.raises(DataError, match="different names"):
        evaluate([path, path])
    one, two = tmp_path / "keeps.csv", tmp_path / "abstains.csv"
    one.write_text("target,answer,answer_ann,score,score_ann\na,a,b,0.5,0.25\n", encoding="utf-8")
    two.write_text("target,answer,answer_ann,score,score_ann,score_abstain\na,a,b,0.5,0.25,0\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"keeps.csv: in .*abstains.csv rows may abstain, in .*keeps.csv not"):
        evaluate([two, one], abstain_cost=0.1)
    one.write_text(GOOD.replace("_A", "_ann"), encoding="utf-8")
    with pytest.raises(DataError, match=r"keeps.csv: expected the experts of .* \(A\), got ann"):
        evaluate(
            [path, write(one, {"target": ["a", "b"], "answer": ["a", "a"], "answer_ann": ["b", "b"], "action": ["own"] * 2})]
        )
    for price in (-0.1, float("inf"), float("nan")):
        with pytest.raises(DataError, match="expected numbers >= 0"):
            evaluate([path], prices={"A": price})
    with pytest.raises(DataError, match="no such expert"):
        evaluate([path], prices={"Zoe": 1.0})
    with pytest.raises(DataError, match="less than one row"):
        evaluate([path], calibration_share=0.1)
    abstaining = tmp_path / "abstaining.csv"
    abstaining.write_text("target,answer,score,score_abstain\na,a,0.5,0.25\n", encoding="utf-8")
    with pytest.raises(DataError, match="cost of abstaining"):
        evaluate([abstaining])
    with pytest.raises(DataError, match="abstaining, 5: expected at most 1"):
        evaluate([abstaining], abstain_cost=5)
    with pytest.raises(DataError, match="fits no file"):
        evaluate([path], abstain_cost=0.5)
    latin = tmp_path / "latin.csv"
    latin.write_bytes(GOOD.encode() + "é,a,b,0,0\n".encode("latin-1"))
    with pytest.raises(DataError, match="row 3 is not UTF-8"):
        evaluate([latin])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        evaluate([tmp_path / "broken.parquet"])
    (tmp_path / "outputs.txt").write_text(GOOD, encoding="utf-8")
    with pytest.raises(DataError, match=r"ends in \.csv or \.parquet"):
        evaluate([tmp_path / "outputs.txt"])


def test_text_in_parquet_that_is_not_utf_8(tmp_path: Path) -> None:
    latin = pa.Array.from_buffers(pa.string(), 1, [None, pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xe9t")])
    table = pa.Table.from_arrays([latin, latin, pa.array([0.5])], ["target", "answer", "score"])
    pa.parquet.write_table(table, tmp_path / "latin.parquet")
    with pytest.raises(DataError, match=r"latin\.parquet: column 'target': a text in it is not UTF-8"):
        evaluate([tmp_path / "latin.parquet"])


@pytest.mark.parametrize("sentinel", [-1.797e308, 1e154])
def test_a_number_that_stands_for_a_missing_one_is_named(tmp_path: Path, sentinel: float) -> None:
    table = {"target": [1.0] * 9, "answer": [1.5] * 9, "answer_A": [1.0] * 9, "score": [0.0] * 9, "score_A": [1.0] * 9}
    assert evaluate([write(tmp_path / "good.csv", table)], regression=True).comparison.figures["oracle"].cost.estimate == 0
    table["answer_A"][4] = sentinel
    path = write(tmp_path / "ours.csv", table)
    with pytest.raises(DataError, match=r"ours\.csv: row 5, column 'answer_A': .* for the target 1 is too far off"):
        evaluate([tmp_path / "good.csv", path], regression=True)
