"""The scripts of the published tables, and one of them run."""

from click.testing import CliRunner

from benchmarks import multi_expert, people, predictor_rejector, realizable, regression, score_based, two_stage

IMAGE_SCRIPTS = [score_based, predictor_rejector, multi_expert, two_stage, people]
SCRIPTS = [*IMAGE_SCRIPTS, regression, realizable]


def run(script, *arguments: str) -> str:
    result = CliRunner().invoke(script.command, ["--preset", "tiny", "--quiet", *arguments])
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.output
