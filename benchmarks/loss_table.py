"""Writes docs/losses.md, the table of all losses, from docstrings and measured ratios.  python -m benchmarks loss-table"""

import inspect
import json
from pathlib import Path

import click

from deferral import losses

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "losses.md"
# Which line of the benchmark stands for a loss, where its name alone does not say.
TIMED = {
    "comp_sum": "two_stage_deferral mu=1",
    "constrained_margin": "constrained_margin exponential",
    "max_margin": "max_margin rho-margin",
    "predictor_rejector_abstention": "predictor_rejector mae",
    "realizable_deferral": "realizable_deferral q=1",
    "realizable_experts": "realizable_experts q=1",
    "score_based_abstention": "score_based_abstention mu=1",
    "single_stage_deferral": "single_stage_deferral mu=1",
    "sum_margin": "sum_margin exponential",
    "two_stage_deferral": "two_stage_deferral mu=1",
}
MAO_COMP_SUM = "Mao, Mohri, Zhong, ICML 2023"
AWASTHI = "Awasthi, Mao, Mohri, Zhong, NeurIPS 2022"
REALIZABLE = "Mao, Mohri, Zhong, NeurIPS 2024"
# Setting, guarantee, source.  The tests verify every guarantee, and see fail what is said not to hold.
CLAIMS = {
    "score_based_abstention": (
        "abstention, score-based, single stage",
        "Bayes for mu in [0, 2]",
        "Mao, Mohri, Zhong, AISTATS 2024",
    ),
    "predictor_rejector_abstention": (
        "abstention, predictor-rejector, single stage",
        "Bayes for mae, double_mae, max_rho_margin, constrained_rho_hinge with the psi that belongs to each; others are refused; "
        "double_mae is realizable",
        "Mao, Mohri, Zhong, ALT 2024, eq. 3",
    ),
    "two_stage_abstention": (
        "abstention, second stage of both forms",
        "Bayes for Phi logistic, exponential, hinge, squared hinge, sigmoid, whatever the predictor",
        "Mao, Mohri, Zhong, ALT 2024, eq. 5",
    ),
    "single_stage_deferral": (
        "deferral to E experts, single stage",
        "Bayes for mu in [0, 2]; realizable at mu = 2",
        "Mao, Mohri, Zhong, ISAIM 2024",
    ),
    "two_stage_deferral": (
        "deferral to E experts, two stages; routers",
        "Bayes for mu in [0, 2] where no cost exceeds the ceiling; realizable at mu = 2",
        "Mao, Mohri, Mohri, Zhong, NeurIPS 2023",
    ),
    "regression_deferral": (
        "regression, deferral to E experts, both stages",
        "Bayes for mu in [0, 2]",
        "Mao, Mohri, Zhong, ICML 2024",
    ),
    "regression_abstention": (
        "regression, abstention, both stages",
        "Bayes for Phi logistic, exponential, hinge, squared hinge",
        "Mao, Mohri, Zhong, ICML 2024",
    ),
    "comp_sum": ("any weights over A actions", "Bayes for weights >= 0", MAO_COMP_SUM),
    "sum_margin": (
        "any weights over A actions",
        "Bayes for Phi exponential, logistic, squared hinge, rho-margin; not for the hinge",
        AWASTHI,
    ),
    "constrained_margin": ("any weights over A actions", "Bayes for Phi exponential, hinge, squared hinge, rho-margin", AWASTHI),
    "max_margin": ("any weights over A actions", "Bayes for the rho-margin; not for the hinge nor the exponential", AWASTHI),
    "realizable_deferral": (
        "deferral to one expert, single stage",
        "realizable; Bayes for every cost at q = 1, not for q < 1",
        REALIZABLE,
    ),
    "realizable_experts": (
        "deferral to E experts without price",
        "realizable; Bayes at q = 1, not at q = 0",
        "derived; compare Mao, Mohri, Zhong, ICML 2025",
    ),
    "realizable_router": ("routers with binary costs", "realizable; not Bayes", "derived; compare Mao, Mohri, Zhong, ICML 2025"),
    "mozannar_sontag": ("deferral to one expert", "Bayes at alpha = 1; not otherwise", "Mozannar, Sontag, ICML 2020"),
    "one_vs_all": (
        "deferral to E experts",
        "Bayes for Phi logistic, exponential; not for the hinge",
        "Verma, Nalisnick, ICML 2022; Verma et al., AISTATS 2023",
    ),
    "asymmetric_softmax": ("deferral to one expert", "Bayes", "Cao et al., NeurIPS 2023"),
    "realizable_surrogate": (
        "deferral to one expert",
        "realizable at alpha = 1; not Bayes, but for 0 < alpha < 1 where the expert's answer is a function of x",
        "Mozannar et al., AISTATS 2023",
    ),
    "picce": ("deferral to E experts", "Bayes for E <= 2, not for more", "arXiv 2602.17144, 2026"),
    "madras": ("deferral to one expert", "not Bayes", "Madras, Pitassi, Zemel, NeurIPS 2018"),
    "mixture_of_experts": ("deferral to E experts", "not Bayes", "Hemmer et al., IJCAI 2022"),
    "cost_sensitive_abstention": (
        "abstention",
        "Bayes for the logistic Phi, for the hinge at c < 1/2",
        "Charoenphakdee et al., ICML 2021",
    ),
    "deep_gamblers": (
        "abstention, by the share kept in hand",
        "Bayes by p_K = 1; the argmax rule is not",
        "Liu et al., NeurIPS 2019",
    ),
    "selective_net": ("selective prediction, a loss of the whole batch", "none claimed", "Geifman, El-Yaniv, ICML 2019"),
    "learned_loss": (
        "regression, rejection by a learned loss",
        "a regression; reject iff it exceeds the cost",
        "Li et al., 2023; Zaoui et al., NeurIPS 2020",
    ),
}


COLUMNS = (
    *("loss", "setting", "formula", "guarantee", "source", "ratio, E = 1", "E = 8", "E = 64", "compiled, E = 8", "memory"),
    *("GPU", "of a copy"),
)


# What a reader of other repositories knows by another name.
ELSEWHERE = (
    "## Under other names",
    "",
    "Ours are of raw scores, one value per example, in nats; both repositories take logarithms to base 2 and give the mean.",
    "",
    "| there | here |",
    "| --- | --- |",
    "| human_ai_deferral, `lce_surrogate` | `mozannar_sontag(alpha=...)`; at alpha = 1 `single_stage_deferral` |",
    "| human_ai_deferral, `one_v_all` | `one_vs_all` |",
    "| human_ai_deferral, `mix_of_exps` (Madras et al.) | `madras`, with the last score as the rejector |",
    "| human_ai_deferral, `realizable_surrogate` at alpha a | `realizable_surrogate(alpha=a / (2 - a))`, but for a factor |",
    "| human_ai_deferral, `compare_confidence`, `selective_prediction` | the same names in `deferral.baselines` |",
    "| human_ai_deferral, `differentiable_triage`, `milpdefer` | none |",
    "| Multi_L2D, `softmax`; experts from the last column backwards | `single_stage_deferral(scores, targets, 1 - correct)` |",
    "| Multi_L2D, `ova`; experts from the last column backwards | `one_vs_all` |",
    "| Multi_L2D, `hemmer_baseline` | `mixture_of_experts` |",
)


def page() -> str:
    """The Markdown page as it should be."""
    files = (f"losses-{name}.json" for name in ("cpu", "cpu-compiled", "cuda-compiled"))
    figures, compiled, gpu = (_figures(name) for name in files)
    rows = [_row(name, figures["runs"], compiled["runs"], gpu["runs"]) for name in CLAIMS]
    return "\n".join(
        [
            "# The losses",
            "",
            "Generated by `python -m benchmarks loss-table`; do not edit.  Every loss gives one value per example.",
            "Bayes: the minimiser decides what the cheapest action is.  Realizable: where some hypothesis decides without loss,",
            "the minimiser does.  Shapes and conditions are in the docstrings.  Ratio: forward and backward against",
            "`F.cross_entropy` with probability targets on the same scores (`one_vs_all`: binary cross-entropy), B = 4096,",
            f"K = 100, float32, one thread, {figures['device']}, torch {figures['torch']}; with 1, 8 and 64 experts, and",
            "compiled against compiled.  Memory: the peak of a step beyond its inputs, in units of the scores, with 8 experts.",
            "GPU: compiled, B = 65,536, K = 1,000, float32, 8 experts or the one there is: the ratio, and the share of the speed",
            "of a copy, with three passes over the scores and one over the inputs;",
            f"{gpu['device']}, torch {gpu['torch']}, commit {gpu['commit'][:7]}.",
            *(f"`{of['command']}`" + (" measure it again." if of is gpu else ",") for of in (figures, compiled, gpu)),
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "|" + " --- |" * len(COLUMNS),
            *rows,
            "",
            "A class axis elsewhere: `loss(scores.movedim(1, -1), targets, ...)`.  In losses of targets, rows whose target is",
            "-100 (`ignore_index`) give 0, and targets may be probabilities (mixup, label smoothing).",
            "",
            *ELSEWHERE,
            "",
        ]
    )


def _figures(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))


def _row(name: str, runs: list[dict], compiled: list[dict], gpu: list[dict]) -> str:
    setting, guarantee, source = CLAIMS[name]
    formula = (inspect.getdoc(getattr(losses, name)) or "").splitlines()[0].split(".  (")[0].rstrip(".")
    runs, compiled = ([run for run in of if run["threads"] == 1] for of in (runs, compiled))
    gpu = [run for run in gpu if run["dtype"] == "float32"]
    ratios = [_figure(name, runs, experts, "ratio") for experts in (1, 8, 64)]
    last = _figure(name, compiled, 8, "ratio"), _figure(name, runs, 8, "peak_over_scores")
    on_gpu = [_figure(name, gpu, 8, figure) or _figure(name, gpu, 1, figure) for figure in ("ratio", "copy_share")]
    # Of several bases or powers one was timed.
    timed = TIMED.get(name, name).partition(" ")[2]
    if timed and ratios[0]:
        ratios[0] = f"{ratios[0]} ({timed})"
    cells = (f"`{name}`", setting, f"`{formula}`", guarantee, source, *ratios, *last, *on_gpu)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _figure(name: str, runs: list[dict], experts: int, figure: str) -> str:
    run = next(run for run in runs if run["E"] == experts)
    figures = run["losses"].get(TIMED.get(name, name))
    return f"{figures[figure]:.2f}" if figures else ""


@click.command()
def command() -> None:
    """Write docs/losses.md from docstrings and the figures in benchmarks/results."""
    PAGE.write_text(page(), encoding="utf-8")
    click.echo(f"wrote {PAGE.relative_to(ROOT)}")
