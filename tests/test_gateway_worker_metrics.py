"""What several workers count is one sum, whichever of them is asked."""

import asyncio
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deferral.gateway.keys import Key
from deferral.gateway.metrics import Metrics
from deferral.gateway.worker_metrics import WorkerMetrics, fold


def counted(answers: int, breaker: str, flying: int = 0) -> Metrics:
    metrics = Metrics()
    metrics.watch_record(SimpleNamespace(waiting=answers, trouble="no space" if breaker == "open" else ""))  # type: ignore[arg-type]
    metrics.watch_budgets(lambda: [(Key("k", "alice", budget=10.0), float(answers))])
    small = SimpleNamespace(state=breaker, queued=2, away=int(breaker != "closed"))
    metrics.watch_servers(lambda: {"small": small})  # type: ignore[dict-item]
    for number in range(answers):
        metrics.began()
        metrics.answered(
            "small", "ok", price=0.5, best_price=0.75, input_tokens=3, output_tokens=4, first_byte_s=0.02, latency_s=0.1 * number
        )
        metrics.ended("chat", 200)
    for _ in range(flying):
        metrics.began()
    return metrics


def samples(text: bytes) -> dict[tuple, float]:
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def told(worker: WorkerMetrics) -> dict[tuple, float]:
    return samples(asyncio.run(worker.text()))


def leave(folder: Path) -> None:
    WorkerMetrics(counted(4, "open", flying=5), folder).leave()


def test_one_worker_alone_says_what_it_counted(tmp_path: Path) -> None:
    metrics = counted(3, "half-open", flying=1)
    assert told(WorkerMetrics(metrics, tmp_path)) == samples(asyncio.run(metrics.text()))


def test_a_first_answer_counts_against_the_saving_where_the_best_price_is_known() -> None:
    metrics = Metrics()
    metrics.asked_first("small", "deferred", 0.25, compared=True)
    metrics.asked_first("small", "deferred", 0.5, compared=False)
    found = samples(asyncio.run(metrics.text()))
    assert found["deferral_saving_dollars",] == -0.25
    assert found["deferral_price_dollars_total", "small"] == 0.75


@pytest.mark.slow
def test_others_are_added_and_the_ended_stay_in_the_counters_alone(tmp_path: Path) -> None:
    # A process that lives: the one that runs this test.
    WorkerMetrics(counted(2, "half-open", flying=1), tmp_path).leave()
    [left] = tmp_path.iterdir()
    left.rename(tmp_path / f"{os.getppid()}-0.json")
    ended = multiprocessing.get_context("spawn").Process(target=leave, args=(tmp_path,))
    ended.start()
    ended.join()
    found = told(WorkerMetrics(counted(3, "closed", flying=1), tmp_path))
    assert found["deferral_answers_total", "ok", "small"] == 3 + 2 + 4
    assert found["deferral_latency_seconds_count", "small"] == 9
    assert found["deferral_latency_seconds_bucket", "0.1", "small"] == 2 + 2 + 2
    assert found["deferral_saving_dollars",] == 9 * 0.25
    assert found["deferral_best_price_dollars_total",] - found["deferral_routed_price_dollars_total",] == 9 * 0.25
    assert found["deferral_record_waiting",] == 3 + 2
    assert found["deferral_record_failing",] == 0, "the one that failed has ended"
    assert found["deferral_budget_dollars", "alice", "k", "month"] == 10, "all see the same budget"
    assert found["deferral_budget_spent_dollars", "alice", "k", "month"] == 3, "who knows of more knows it better"
    assert found["deferral_requests_in_flight",] == 2, "what the ended one had under way has ended"
    assert found["deferral_queue_length", "small"] == 4
    assert found["deferral_breaker_open", "small"] == 0.5, "the worst of those that live"


def test_of_many_budgets_those_are_shown_that_are_nearest_to_their_end() -> None:
    metrics = Metrics()
    keys = [Key(f"k{number}", "many", budget=float(number + 1)) for number in range(1000)]
    metrics.watch_budgets(lambda: [(key, 0.5) for key in keys])
    shown = {labels[0] for name, *labels in samples(asyncio.run(metrics.text())) if name == "deferral_budget_spent_dollars"}
    assert shown == {key.id for key in keys[:100]}


def test_a_folder_that_cannot_be_written_costs_the_others_this_worker_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    worker = WorkerMetrics(counted(3, "closed"), tmp_path / "gone")
    worker.leave()
    worker.leave()
    assert told(worker)["deferral_answers_total", "ok", "small"] == 3
    assert len(caplog.records) == 1
    (tmp_path / "gone").mkdir()
    worker.leave()
    [left] = (tmp_path / "gone").glob(f"{os.getpid()}-*.json")
    assert left.read_bytes()


def test_what_a_scraper_was_told_stays_when_the_worker_is_killed(tmp_path: Path) -> None:
    metrics = counted(3, "closed")
    worker, other = WorkerMetrics(metrics, tmp_path), WorkerMetrics(counted(2, "closed"), tmp_path)
    worker.leave()
    metrics.ended("chat", 200)
    shown = told(worker)
    # It is killed before it leaves anything again.
    after = told(other)
    name = "deferral_requests_total", "200", "chat"
    assert shown[name] == 4
    assert after[name] == 4 + 2


@pytest.mark.slow
def test_those_that_have_ended_are_one_file_and_count_once(tmp_path: Path) -> None:
    living = WorkerMetrics(counted(3, "closed"), tmp_path)
    for _ in range(3):
        ended = multiprocessing.get_context("spawn").Process(target=leave, args=(tmp_path,))
        ended.start()
        ended.join()
        assert ended.pid is not None
        (tmp_path / f"{ended.pid}-0.partial").write_text("half")
        before = told(living)
        copies = {path.name: path.read_bytes() for path in tmp_path.glob(f"{ended.pid}-*.json")}
        fold(tmp_path, ended.pid)
        assert told(living) == before
        # Killed after it has added it and before it has deleted it, the parent counts nothing twice.
        [(name, text)] = copies.items()
        (tmp_path / name).write_bytes(text)
        assert told(living) == before
        fold(tmp_path, 0)
        assert told(living) == before
        (tmp_path / name).unlink()
    assert told(living)["deferral_answers_total", "ok", "small"] == 3 + 3 * 4
    assert len(list(tmp_path.iterdir())) == 2


def test_one_that_has_left_nothing_or_cannot_be_added_is_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fold(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "1-a.json").mkdir()
    fold(tmp_path, 1)
    assert "stay in a file of their own" in caplog.text
