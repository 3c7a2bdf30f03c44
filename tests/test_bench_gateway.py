"""What the benchmark of the gateway reads from others, and how it judges."""

import pytest

from benchmarks.gateway import claims, fault_table
from benchmarks.serving.servers import wrk_figures

WRK = """Running 3s test @ http://127.0.0.1:8080/v1/chat/completions
  1 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency    41.93ms   21.10ms 301.12ms   88.60%
    Req/Sec     1.61k   225.12     1.95k    76.67%
  Latency Distribution
     50%  950.00us
     75%   45.01ms
     90%    1.20s
     99%    1.00m
  4829 requests in 3.01s, 2.76MB read
  Socket errors: connect 0, read 1, write 0, timeout 2
  Non-2xx or 3xx responses: 7
Requests/sec:   1605.60
Transfer/sec:      0.92MB
"""


def test_the_figures_of_wrk_are_read_in_milliseconds() -> None:
    figures = wrk_figures(WRK)
    assert figures == pytest.approx({
        "requests": 4829, "per_second": 1605.6, "bad": 10, "p50": 0.95, "p75": 45.01, "p90": 1200, "p99": 60_000,
    })  # fmt: skip


def test_a_claim_is_met_or_missed_and_none_is_made_of_what_was_not_measured() -> None:
    ratio = {"blend": 2.0, "linear": 1.6, "named": 1.5}
    found: dict = {
        "cpu": {name: {"cpu_ratio": {"median": value}} for name, value in ratio.items()},
        "held": {"whole": 999, "open_at_once": 1000},
    }
    assert {line["claim"]: line["met"] for line in claims(found)} == {
        "CPU a request / bare, blend": False,
        "CPU a request / bare, linear": False,
        "CPU a request / bare, named": True,
        "streams whole of 1,000": False,
        "streams open at once": True,
    }


def test_the_fault_table_says_what_is_not_as_specified() -> None:
    found = {"status": 200, "expert": "large", "attempts": 2, "outcome": "ok", "ending": "whole"}
    cell = {"path": "/v1/responses", "fault": "stall", "retries": 0, "rows": 1, "found": found, "as_specified": True}
    table = fault_table([cell, cell | {"as_specified": False}])
    assert table.splitlines()[2] == (
        "| /v1/responses | stall | 200: large, 0 retries, 2 attempts; whole; 1 row, ok | "
        "200: large, 0 retries, 2 attempts; whole; 1 row, ok NOT AS SPECIFIED |"
    )
