"""What holds of the values and the gradients of a loss at any scores."""

import textwrap

import torch
from torch import Tensor

from deferral.testing.settings import K, Loss, Rows, Setting, draw_rows

__all__ = [
    "autocast",
    "bounded_below",
    "classes_are_alike",
    "every_expert_counts",
    "example",
    "finite",
    "gradient",
    "half_precision",
    "leaves_its_input",
    "one_value_per_example",
    "pulls_when_wrong",
    "vmap",
]


def example(setting: Setting, shape: tuple[int, ...] = (7,), dtype: torch.dtype = torch.float64) -> tuple[Tensor, Rows]:
    """Random packed scores and rows; under half precision the rows stay in float32, as in a training loop."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(*shape, setting.width, generator=generator, dtype=torch.float64).to(dtype)
    return scores, draw_rows(shape, generator, torch.float32 if dtype.itemsize < 4 else dtype)


def _loss_and_gradient(loss: Loss, scores: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    leaf = scores.detach().clone().requires_grad_()
    value = loss(leaf, rows)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def _differs(actual: Tensor, expected: Tensor) -> str | None:
    try:
        torch.testing.assert_close(actual, expected)
    except AssertionError as error:
        return " ".join(str(error).split())
    return None


def one_value_per_example(loss: Loss, setting: Setting) -> str | None:
    """(..., width) scores give (...,) losses, and a row's loss depends on that row alone."""
    # Enough rows for a share of them to be at least one.
    shape = (3, 4)
    scores, rows = example(setting, shape)
    values = loss(scores, rows)
    if values.shape != shape:
        return f"expected losses of shape {shape}, got {tuple(values.shape)}"
    places = [(i, j) for i in range(shape[0]) for j in range(shape[1])]
    one_by_one = [loss(scores[place], {name: value[place] for name, value in rows.items()}) for place in places]
    return _differs(values, torch.stack(one_by_one).reshape(shape))


def leaves_its_input(loss: Loss, setting: Setting) -> str | None:
    """Scores and rows are the caller's, and stay as they are, with a gradient to take and without."""
    for trained in (False, True):
        scores, rows = example(setting, (40,), torch.float32)
        given = {"scores": scores.requires_grad_(trained), **rows}
        before = {name: value.detach().clone() for name, value in given.items()}
        values = loss(scores * 1 if trained else scores, rows)
        if trained:
            values.sum().backward()
        changed = [name for name, value in given.items() if not torch.equal(value, before[name])]
        if changed:
            return f"the caller's {', '.join(changed)} were changed in place"
    return None


def gradient(loss: Loss, setting: Setting) -> str | None:
    """The gradient equals finite differences, in double precision."""
    scores, rows = example(setting)
    # Kinks are hit with probability 0, but finite differences may step over one: keep off the integers.
    leaf = (scores * 0.37 + 0.011).requires_grad_()
    value, slope = _loss_and_gradient(loss, leaf, rows)
    # Of what is computed in single precision no finer differences can be taken.
    eps, atol = (1e-6, 1e-5) if value.dtype == torch.float64 else (1e-3, 1e-2)
    # A loss in cents or in thousands is held to the same digits, and so is a column that counts little.
    size = next((float(largest) for part in (slope, value) if (largest := part.abs().max()) > 0), 1.0)
    units = (size, 1.0) if value.dtype == torch.float64 else (size,)
    try:
        for unit in units:
            torch.autograd.gradcheck(lambda s, unit=unit: loss(s, rows) / unit, leaf, eps=eps, atol=atol)
    except RuntimeError as error:
        return textwrap.shorten(str(error), 300)  # of two whole Jacobians
    return None


def finite(loss: Loss, setting: Setting) -> str | None:
    """Value and gradient are finite at scores of 0 and of 1e4 either way; in float16, whose range ends at 65504, at 1."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        scores, rows = example(setting, (40,), dtype)
        for scale in (0.0, 1.0) if dtype == torch.float16 else (0.0, 50.0, 1e4, -1e4):
            value, slope = _loss_and_gradient(loss, scores * scale, rows)
            if not (value.isfinite().all() and slope.isfinite().all()):
                return f"scores x {scale:g} in {dtype}: loss or gradient is not finite"
    return None


def half_precision(loss: Loss, setting: Setting) -> str | None:
    """Half-precision scores give what the same numbers give in float32."""
    for dtype in (torch.bfloat16, torch.float16):
        scores, rows = example(setting, dtype=dtype)
        seen = _differs(loss(scores, rows).float(), loss(scores.float(), rows).float())
        if seen:
            return f"{dtype}: {seen}"
    return None


def pulls_when_wrong(loss: Loss, setting: Setting) -> str | None:
    """Where the loss is large, so that it does not merely flatten out as bounded losses do, it has a gradient."""
    scores, rows = example(setting, (400,))
    at_zero = loss(0 * scores, rows)
    value, slope = _loss_and_gradient(loss, 50 * scores, rows)
    stuck = (value > 5 * at_zero.abs().clamp(min=1.0)) & (slope.abs().amax(dim=-1) < 1e-3)
    return (
        f"{int(stuck.sum())} of 400 badly wrong rows have a loss up to {float(value[stuck].max()):.3g} and no gradient"
        if stuck.any()
        else None
    )


def bounded_below(loss: Loss, setting: Setting) -> str | None:
    """No row's loss can be driven towards minus infinity, so no weight is negative."""
    scores, rows = example(setting, (400,))
    usual, large, larger = (loss(scale * scores, rows) for scale in (1.0, 1e3, 1e4))
    # In units of the loss itself; a bounded one has come to its end.
    size = usual.abs().max()
    falls = ((larger < -size) & (large - larger > size)) | (larger == -torch.inf)
    if not falls.any():
        return None
    return (
        f"a loss falls from {large[falls][0]:.3g} at scores x 1000 to {larger[falls][0]:.3g} at x 10000: some weight is negative"
    )


def every_expert_counts(loss: Loss, setting: Setting) -> str | None:
    """Every score has a gradient in some row, and permuting the experts permutes nothing else."""
    columns = list(setting.experts)
    if not columns:
        return None
    scores, rows = example(setting, (50,))
    value, slope = _loss_and_gradient(loss, scores, rows)
    dead = [column for column in range(setting.width) if not slope[:, column].any()]
    if dead:
        return f"scores in columns {dead} have no gradient in any of 50 rows"
    table = rows[setting.expert_rows]
    first = table.shape[-1] - len(columns)
    permuted = rows | {setting.expert_rows: torch.cat([table[:, :first], table[:, first:].flip(-1)], dim=-1)}
    return _differs(loss(_turned(scores, setting.experts), permuted), value)


def classes_are_alike(loss: Loss, setting: Setting) -> str | None:
    """Counting the classes from the other end changes nothing."""
    if not setting.classes:
        return None
    scores, rows = example(setting, (50,))
    turned = rows | {"targets": K - 1 - rows["targets"]}
    return _differs(loss(_turned(scores, setting.classes), turned), loss(scores, rows))


def _turned(scores: Tensor, columns: range) -> Tensor:
    """These columns in reverse order."""
    order = torch.arange(scores.shape[-1])
    order[list(columns)] = order[list(columns)].flip(0)
    return scores[:, order]


def vmap(loss: Loss, setting: Setting) -> str | None:
    """torch.vmap over the rows gives the batch."""
    scores, rows = example(setting)
    return _differs(torch.vmap(loss)(scores, rows), loss(scores, rows))


def autocast(loss: Loss, setting: Setting) -> str | None:
    """Under autocast the loss is computed as without it."""
    scores, rows = example(setting, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(scores, rows)
    return _differs(value, loss(scores, rows))
