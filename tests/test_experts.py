import pytest
import torch

from deferral.experts import draw_answers, even_skill, random_annotator, random_person, specialist


def test_answers_follow_the_confusion_matrix() -> None:
    confusion = torch.tensor([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0], [0.25, 0.25, 0.5]])
    targets = torch.arange(3).repeat(20_000)
    answers = draw_answers(confusion, targets, seed=0)
    seen = torch.stack([torch.bincount(answers[targets == k], minlength=3) / 20_000 for k in range(3)])
    torch.testing.assert_close(seen, confusion, atol=0.012, rtol=0)
    assert torch.equal(answers, draw_answers(confusion, targets, seed=0))
    assert not torch.equal(answers, draw_answers(confusion, targets, seed=1))


def test_skills() -> None:
    torch.testing.assert_close(even_skill(0.8, 3), torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]))
    expert = specialist([0, 2], 4)
    assert expert[0].tolist() == [1, 0, 0, 0]
    assert expert[1].tolist() == [0.25] * 4
    assert specialist([], 4).unique().tolist() == [0.25]


def test_a_random_annotator_is_one_of_those_who_answered() -> None:
    labels = torch.tensor([[3, -1, -1], [-1, -1, -1], [1, 2, -1]]).repeat(3000, 1)
    answers = random_annotator(labels, seed=0).reshape(-1, 3)
    assert (answers[:, 0] == 3).all()
    assert (answers[:, 1] == -1).all()
    assert (answers[:, 2] == 1).double().mean().item() == pytest.approx(0.5, abs=0.04)


def test_a_random_person_follows_the_counts() -> None:
    answers = random_person(torch.tensor([[9, 1, 0]]).repeat(5000, 1), seed=0)
    assert (answers == 0).double().mean().item() == pytest.approx(0.9, abs=0.02)
    assert not (answers == 2).any()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: even_skill(1.2, 3), "probability"),
        (lambda: even_skill(0.5, 1), "at least 2"),
        (lambda: specialist([3], 3), r"in 0\.\.2"),
        (lambda: draw_answers(torch.ones(2, 2), torch.zeros(3, dtype=torch.long), seed=0), "sum to 1"),
        (lambda: draw_answers(torch.eye(2).double(), torch.tensor([0, -1]), seed=0), r"in 0\.\.1, got -1"),
        (lambda: random_annotator(torch.zeros(3, dtype=torch.long), seed=0), "one column per annotator"),
        (lambda: random_person(torch.zeros(3, 2), seed=0), "at least one person"),
    ],
)
def test_bad_input(call, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
