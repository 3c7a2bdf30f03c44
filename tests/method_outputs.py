"""Files of what a method answered and how it scored, as `deferral evaluate` reads them."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import torch

ROWS = 120
PRICES = {"Ann": 0.1, "Bob": 0.2}


def columns(seed: int = 0, missing: float = 0.0) -> dict[str, list]:
    generator = torch.Generator().manual_seed(seed)
    answers = torch.randint(0, 3, (ROWS, 4), generator=torch.Generator().manual_seed(7)).tolist()
    scores = torch.randn(ROWS, 4, generator=generator, dtype=torch.float64).tolist()
    absent = (torch.rand(ROWS, generator=torch.Generator().manual_seed(8)) < missing).tolist()
    names = ["cat", "dog", "eel"]
    return {
        "target": [names[row[0]] for row in answers],
        "answer": [names[row[1]] for row in answers],
        "answer_Ann": [names[row[2]] for row in answers],
        "answer_Bob": [None if gone else names[row[3]] for row, gone in zip(answers, absent, strict=True)],
        "score": [row[0] for row in scores],
        "score_Ann": [row[1] for row in scores],
        "score_Bob": [None if gone else row[2] for row, gone in zip(scores, absent, strict=True)],
    }


def write(path: Path, table: dict[str, list]) -> Path:
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.table(table), path)
    else:
        rows = zip(*table.values(), strict=True)
        lines = [",".join(table), *(",".join("" if cell is None else str(cell) for cell in row) for row in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
