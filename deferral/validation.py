"""Checks of tensors, with errors that say what was expected, what came and what to do.

`require_*` look at shapes, dtypes and plain numbers only: no synchronisation, so every loss calls them.  `check_*` read values,
so they are called once per data set, by `Criterion(validate=True)` and by whatever builds cost tables.
"""

import operator
from numbers import Number, Real

import torch
from torch import Tensor

__all__ = [
    "above_ceiling",
    "action_mask",
    "check_costs",
    "check_mask",
    "check_probabilities",
    "check_scores",
    "check_targets",
    "check_weights",
    "checked_scores",
    "one_expert_mask",
    "require_actions",
    "require_batch",
    "require_ceiling",
    "require_columns",
    "require_cost",
    "require_cost_range",
    "require_experts",
    "require_floating",
    "require_indices",
    "require_level",
    "require_mask",
    "require_num_own",
    "require_number",
    "require_rejector",
    "require_share",
    "require_targets",
    "require_tensor",
    "require_whole",
]


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _came(value: object) -> str:
    return repr(value) if value is None or isinstance(value, str | Number) else type(value).__name__


def require_number(name: str, value: object) -> None:
    """TypeError for whatever is no real number; a tensor that holds one is."""
    # Plain numbers first: a compiler that has made one a variable asks it for nothing else.
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool):
        return
    one = value.dim() == 0 and value.dtype != torch.bool and not value.is_complex() if isinstance(value, Tensor) else False
    if not one and (isinstance(value, bool) or not isinstance(value, Real)):
        came = f"shape {_shape(value)} of {value.dtype}" if isinstance(value, Tensor) else _came(value)
        raise TypeError(f"{name}: expected a number, got {came}")


def require_whole(name: str, value: object) -> None:
    """TypeError for whatever counts nothing: a float, also a whole one, text, True."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return
    try:
        whole = not isinstance(value, bool) and operator.index(value) is not None  # type: ignore[arg-type]
    except TypeError:
        whole = False
    if not whole:
        raise TypeError(f"{name}: expected a whole number, got {_came(value)}")


def require_columns(name: str, table: Tensor) -> None:
    """ValueError for a table without a column."""
    if table.dim() == 0 or table.shape[-1] == 0:
        raise ValueError(f"{name}: expected a column for every action, at least one, got shape {_shape(table)}")


def require_tensor(name: str, tensor: object) -> None:
    """TypeError for whatever is no torch tensor."""
    if isinstance(tensor, tuple):
        raise TypeError(
            f"{name}: expected a torch tensor, got a tuple of {len(tensor)}; with missing=... the tables of costs come as "
            "(costs, mask): pass the two one by one, the second as mask="
        )
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch tensor, got {type(tensor).__name__}; convert it with torch.as_tensor")


def require_floating(name: str, tensor: Tensor) -> None:
    """TypeError unless the tensor holds real numbers of a floating dtype."""
    require_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise TypeError(
            f"{name}: expected a floating dtype, got {tensor.dtype}; convert with {name}.float(), in NumPy {name}.astype(float)"
            + (", or did you pass the model's answers instead of its raw scores?" if name == "scores" else "")
        )
    if name == "scores":
        require_columns(name, tensor)


def require_indices(name: str, tensor: Tensor) -> None:
    """TypeError unless the tensor holds integers."""
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise TypeError(f"{name}: expected indices of an integer dtype, got {tensor.dtype}; {name} come from decide(scores)")


def require_actions(scores: Tensor, costs: Tensor, *, name: str = "costs") -> None:
    """ValueError unless there is one cost (or weight) per action and row."""
    require_floating(name, costs)
    if scores.dim() == 0 or costs.shape[-1:] != scores.shape[-1:] or costs.dim() > scores.dim():
        raise ValueError(
            f"one {name.removesuffix('s')} per action: scores {_shape(scores)}, {name} {_shape(costs)}; "
            "did you leave out the own predictor's column (action 0)?"
        )
    require_batch("scores", scores.shape[:-1], name, costs.shape[:-1])


def require_batch(name: str, shape: torch.Size, other_name: str, other: torch.Size) -> None:
    """ValueError unless the second leading shape broadcasts to the first without enlarging it."""
    fits = len(other) <= len(shape) and all(b == 1 or b == a for a, b in zip(reversed(shape), reversed(other), strict=False))
    if not fits:
        raise ValueError(
            f"{name} and {other_name} differ in rows: leading dimensions {tuple(shape)} and {tuple(other)}; "
            "every example needs its own row in both"
        )


def require_targets(scores: Tensor, targets: Tensor, num_classes: int) -> None:
    """Targets are class indices (...,) of an integer dtype or probabilities (..., K) of a floating dtype."""
    require_tensor("targets", targets)
    if num_classes < 1:
        raise ValueError(
            f"scores {_shape(scores)} leave {num_classes} columns for classes; the class columns come first, then one "
            "column per expert (or one for abstaining)"
        )
    batch = tuple(scores.shape[:-1])
    expected = (*batch, num_classes) if targets.is_floating_point() else batch
    if tuple(targets.shape) != expected:
        kind = "probabilities (..., K)" if targets.is_floating_point() else "class indices (...,)"
        raise ValueError(
            f"targets: expected {kind} of shape {expected} for scores {_shape(scores)}, got {targets.dtype} of shape "
            f"{_shape(targets)}; "
            + (
                "are the classes axis 1 of the scores?  Move them last: scores.movedim(1, -1)"
                if scores.dim() > 2 and tuple(targets.shape) == (*scores.shape[:1], *scores.shape[2:])
                else "integer targets are indices, floating targets are probabilities over the K classes"
            )
        )
    if not targets.is_floating_point() and targets.dtype != torch.int64:
        raise TypeError(
            f"targets: expected class indices of dtype int64 or probabilities, got {targets.dtype}; use targets.long()"
        )


def action_mask(scores: Tensor, mask: Tensor, num_own: int | None = None) -> Tensor:
    """A mask with one column per action.  One over the experts, the last columns, is widened by True for the own actions.

    Bool, True = the answer is known.  With `num_own` given, exactly A or A - num_own columns are accepted.
    """
    actions = scores.shape[-1]
    require_mask(mask)
    columns = mask.shape[-1] if mask.dim() else 0
    # `in` would ask whether they are the same object, which sizes that a compiler traces never are.
    if columns == 0 or columns > actions or (num_own is not None and columns != actions and columns != actions - num_own):
        expected = (
            f"{actions} columns" if num_own in (None, 0) else f"{actions - num_own} columns (experts) or {actions} (actions)"
        )
        raise ValueError(f"mask: expected {expected} for scores {_shape(scores)}, got shape {_shape(mask)}")
    require_batch("scores", scores.shape[:-1], "mask", mask.shape[:-1])
    if columns < actions:
        mask = torch.cat([mask.new_ones((*mask.shape[:-1], actions - columns)), mask], dim=-1)
    return mask


def require_mask(mask: Tensor) -> None:
    """TypeError unless the mask is a bool tensor."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask: expected a bool tensor (True = known), got {came}; convert with mask.bool()")


def _require_expert_columns(scores: Tensor, name: str, table: Tensor) -> None:
    """ValueError for a table without the rows: one number per row would be read as that many experts."""
    if table.dim() < scores.dim():
        raise ValueError(
            f"{name}: expected one column per expert, (..., E), got {_shape(table)} for scores {_shape(scores)}; for one expert "
            "use .unsqueeze(-1) of its one number per row, for numbers that are the same in every row "
            ".expand(*scores.shape[:-1], -1)"
        )


def require_experts(scores: Tensor, targets: Tensor, name: str, table: Tensor) -> int:
    """Shapes of a loss over K classes and E experts: scores (..., K+E), targets, one column of the table per expert.  -> K"""
    require_floating("scores", scores)
    require_tensor(name, table)
    _require_expert_columns(scores, name, table)
    num_classes = scores.shape[-1] - table.shape[-1]
    require_targets(scores, targets, num_classes)
    require_batch("scores", scores.shape[:-1], name, table.shape[:-1])
    return num_classes


def one_expert_mask(scores: Tensor, mask: Tensor) -> Tensor:
    """A mask over one expert, widened to every column of the scores.  (..., K+1), (...,) -> (..., K+1)"""
    require_mask(mask)
    return action_mask(scores, mask.unsqueeze(-1), scores.shape[-1] - 1)


def require_ceiling(scores: Tensor, ceiling: Tensor | float) -> None:
    """ValueError unless the ceiling is a number >= 0, or one number per row that stands before all actions: (..., 1)."""
    if not isinstance(ceiling, Tensor):
        require_number("ceiling", ceiling)
        if not ceiling >= 0:
            raise ValueError(f"ceiling: expected the largest cost that can occur, a number >= 0, got {ceiling}")
        return
    if ceiling.dim() > 0 and ceiling.shape[-1] != 1:
        raise ValueError(
            f"ceiling: expected a number or one per row of shape (..., 1), got {_shape(ceiling)}; keep the last axis: "
            "costs.sum(-1, keepdim=True)"
        )
    require_batch("scores", scores.shape[:-1], "ceiling", ceiling.shape[:-1])


def require_share(name: str, value: float) -> None:
    """ValueError unless the number lies in [0, 1]."""
    require_number(name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")


def require_level(level: float) -> None:
    """ValueError unless an interval can have this level, a number between 0 and 1."""
    require_number("level", level)
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")


def require_num_own(scores: Tensor, num_own: int) -> None:
    """ValueError unless some actions are own ones and some are experts."""
    require_whole("num_own", num_own)
    require_columns("scores", scores)
    if not 0 < num_own < scores.shape[-1]:
        raise ValueError(f"num_own: expected 1..{scores.shape[-1] - 1} for scores {_shape(scores)}, got {num_own}")


def require_rejector(rejector: Tensor, rows: torch.Size) -> None:
    """Floating, and one number for every row."""
    require_floating("rejector", rejector)
    if rejector.shape != rows:
        raise ValueError(
            f"one rejector value per row: expected shape {tuple(rows)}, got {_shape(rejector)}; "
            "a model with one output needs .squeeze(-1)"
        )


def require_cost_range(cost: Tensor | float) -> None:
    """ValueError for a cost of abstention given as a number outside [0, 1]; tensors are checked by `check_costs`."""
    # Numbers first: a compiler that has made one a variable asks it for no attributes.
    if not isinstance(cost, (int, float, str, Tensor)) and hasattr(cost, "__len__"):
        raise TypeError(f"cost: expected a number or a torch tensor, got {type(cost).__name__}; convert it with torch.as_tensor")
    if isinstance(cost, Tensor):
        return
    require_number("cost", cost)
    if not 0.0 <= cost <= 1.0:
        raise ValueError(
            f"cost: expected a number in [0, 1], in units of one error, got {cost}; abstaining at a cost above 1 is never "
            "better than a wrong answer"
        )


def require_cost(name: str, rows: torch.Size, cost: Tensor | float) -> None:
    """A cost of abstention: a number in [0, 1], or a tensor that broadcasts to the rows of the tensor called `name`."""
    require_cost_range(cost)
    if isinstance(cost, Tensor):
        require_batch(name, rows, "cost", cost.shape)


def check_scores(scores: Tensor, *, name: str = "scores") -> None:
    """Floating, and free of NaN and +inf (-inf marks an action that cannot be taken).  Reads the values."""
    require_floating(name, scores)
    bad = scores.isnan() | (scores == torch.inf)
    if bool(bad.any()):
        first = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: expected finite numbers, got {scores[tuple(first)].item()} at index {first} and {int(bad.sum()) - 1} "
            "more; the model has diverged (lower the learning rate) or its input holds NaN"
        )


def check_probabilities(probabilities: Tensor, *, name: str = "probabilities") -> None:
    """Floating, and in [0, 1] up to the rounding of a softmax in half precision.  Reads the values."""
    require_floating(name, probabilities)
    outside = ~((probabilities >= 0) & (probabilities <= 1.001))
    if bool(outside.any()):
        raise ValueError(
            f"{name}: expected numbers in [0, 1], got {float(probabilities[outside][0]):g} and {int(outside.sum()) - 1} more; "
            "are they raw scores?  Pass scores.softmax(-1)"
        )


def checked_scores(scores: Tensor, num_own: int, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scores (N, A) in float64, -inf where the mask is False, and the mask with one column per action.  Reads the values."""
    check_scores(scores)
    if scores.dim() != 2 or len(scores) == 0:
        raise ValueError(f"scores: expected at least one row and shape (N, A), got {_shape(scores)}")
    require_num_own(scores, num_own)
    if bool(scores[:, :num_own].isneginf().any()):
        raise ValueError("scores: expected finite scores of the own actions, got -inf; an own action can always be taken")
    known = scores.detach().double()
    if mask is not None:
        mask = action_mask(scores, mask, num_own)
        check_mask(mask, num_own, scores.shape[-1])
        known = known.where(mask, -torch.inf)
    return known, mask


def check_targets(targets: Tensor, num_classes: int) -> None:
    """Indices in 0..K-1, or probabilities (..., K) that are non-negative and sum to 1.  Once per data set; reads the values."""
    if targets.is_floating_point():
        if targets.shape[-1] != num_classes:
            raise ValueError(f"targets: expected probabilities over {num_classes} classes, got shape {_shape(targets)}")
        # Summed in single precision: of probabilities that were rounded to half of it only their own rounding is left.
        sums = targets.sum(-1, dtype=torch.promote_types(targets.dtype, torch.float32))
        rounded = 1e-2 if targets.dtype in (torch.float16, torch.bfloat16) else 1e-3
        if bool((targets < 0).any()) or not torch.allclose(sums, torch.ones_like(sums), atol=rounded):
            raise ValueError(
                "targets: expected non-negative probabilities that sum to 1 over the last axis; integer labels must have "
                "an integer dtype (targets.long())"
            )
        return
    bad = (targets < 0) | (targets >= num_classes)
    if bool(bad.any()):
        first = bad.nonzero()[0].tolist()
        raise ValueError(
            f"targets: expected class indices in 0..{num_classes - 1}, got {targets[tuple(first)].item()} at index {first} "
            f"and {int(bad.sum()) - 1} more; are the labels counted from 1, or is num_classes too small?"
        )


def above_ceiling(highest: float, ceiling: float) -> bool:
    """Whether a cost is too large.  A float32 sum of error and price may lie above its own ceiling by a rounding."""
    return not highest <= ceiling * (1 + 1e-5)


def check_costs(costs: Tensor, *, ceiling: float | Tensor | None = 1.0, mask: Tensor | None = None, name: str = "costs") -> None:
    """Known costs are numbers in [0, ceiling]; `ceiling=None` leaves the upper end open.  Reads the values."""
    require_floating(name, costs)
    costs = costs.detach()
    known = costs if mask is None else costs[mask.expand_as(costs)]
    if known.numel() == 0:
        return
    if bool(known.isnan().any()):
        raise ValueError(
            f"{name}: expected numbers, got NaN in {int(known.isnan().sum())} places; mark missing answers in a mask "
            "(error_costs(..., missing=-1) makes one)"
        )
    if bool(known.isinf().any()):
        raise ValueError(f"{name}: expected finite costs, got infinity; close an action by a mask")
    if isinstance(ceiling, Tensor):
        excess = (costs - ceiling) if mask is None else (costs - ceiling)[mask.expand_as(costs)]
        if bool((excess > 1e-5 * (1 + known.abs().max())).any()):
            raise ValueError(
                f"{name}: in some row a cost lies above the ceiling by {float(excess.max()):g}; pass the row's sum or maximum"
            )
        ceiling = None
    low, high = float(known.min()), float(known.max())
    if low < 0:
        raise ValueError(f"{name}: expected non-negative costs in units of one error, got {low:g}")
    if ceiling is not None and above_ceiling(high, ceiling):
        raise ValueError(
            f"{name}: the largest is {high:g}, above ceiling={ceiling:g}; the weight ceiling - cost would be negative and the "
            f"risk unbounded below.  Pass ceiling={high:g} (1 + the largest price), here and to the loss if it takes one, or "
            "lower the price"
        )


def check_mask(mask: Tensor, num_own: int, num_actions: int) -> None:
    """Own actions are never masked.  `mask` has one column per action.  Reads the values."""
    if mask.shape[-1] == num_actions and not bool(mask[..., :num_own].all()):
        raise ValueError(
            f"mask: the own action{'s' if num_own > 1 else ''} (first {num_own}) can always be taken, but are masked in some row"
        )


def check_weights(weights: Tensor | None, rows: Tensor) -> Tensor:
    """Weights (..., N) as float64 on the device of the rows, ones by default; ValueError if one is negative or all are 0."""
    if weights is None:
        return torch.ones(len(rows), dtype=torch.float64, device=rows.device)
    if weights.dim() == 0 or weights.shape[-1] != len(rows):
        raise ValueError(f"weights: expected one per row, shape (..., {len(rows)}), got {tuple(weights.shape)}")
    weights = weights.to(rows.device, torch.float64)
    # Thousands of resamples come here, and sums find NaN and infinity in a sixth of the time that a look at each number takes.
    sums = weights.sum(-1)
    if not (bool(((sums > 0) & (sums < torch.inf)).all()) and bool((weights.amin(-1) >= 0).all())):
        raise ValueError("weights: expected finite numbers >= 0 that are not all 0")
    return weights
