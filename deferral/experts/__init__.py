"""Experts: who may be asked.  Simulated from a law, recorded from people's labels, or any model; all draws are seeded.

An expert is what it answers: integer labels (N,), -1 where there is no answer.  Stack several as columns for `error_costs`.
Draws are made on the CPU, so that a seed means the same answers on every device.  Give each expert a seed of its own: two
experts with one seed are right and wrong on the same rows.  NumPy or torch in and out (beside a confusion matrix, which is a
tensor, the answers are one).
"""

from deferral.experts.confusion import draw_answers, even_skill, perfect_on_first, perfect_up_to, specialist
from deferral.experts.model import model_answers
from deferral.experts.recorded import label_counts, majority, random_annotator, random_person
from deferral.experts.skill import draw_with_skill, drift, fatigue, hide_answers, skill_near

__all__ = [
    "draw_answers",
    "draw_with_skill",
    "drift",
    "even_skill",
    "fatigue",
    "hide_answers",
    "label_counts",
    "majority",
    "model_answers",
    "perfect_on_first",
    "perfect_up_to",
    "random_annotator",
    "random_person",
    "skill_near",
    "specialist",
]
