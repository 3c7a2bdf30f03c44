"""Rows of a gateway's record, for the tests; light, since a process that is killed imports it too."""

from deferral.gateway.rows import DecisionRow


def row(number: int = 0, **values) -> DecisionRow:
    given = {
        "id": f"id-{number}",
        "time": 1000.0 + number,
        "key": "",
        "requested": "auto",
        "expert": "small",
        "chosen": "small",
        "reason": "",
        "propensity": 0.9,
        "expected_quality": {"small": 0.5, "large": 0.9},
        "expected_price": {"small": 1e-4, "large": 1e-3},
        "expected_cost": {"small": 0.6, "large": 0.7},
        "price_of_error": 0.01,
        "price": 1e-4,
        "estimated": False,
        "input_tokens": 10,
        "output_tokens": 20,
        "first_byte_s": 0.1,
        "latency_s": 0.25,
        "status": 200,
        "outcome": "ok",
        "attempts": 1,
        "streamed": False,
        "fast_path": False,
        "query": f"question {number}",
    }
    return DecisionRow(**{**given, **values})
