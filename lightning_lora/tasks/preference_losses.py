"""The losses of preference tuning, each as its paper has it."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence

from lightning_lora.data.conversation import IGNORED

PreferenceLoss = Literal["dpo", "ipo", "kto", "orpo", "simpo"]


class Answers(NamedTuple):
    """What a loss is made of, in tensors of shape ``(answers,)``.

    Of pairs, the chosen answers are in the first half, and the rejected ones in the second.

    Args:
        policy: Log-probabilities of the answers, summed over their tokens.
        lengths: How many tokens each has.
        gains: What they have gained over the reference model; of zeros where a loss needs none.
        divergence: KTO's reference point: what answers to other questions have gained, in the mean, or 0 if less.
        desirable: Which ones are good answers: of pairs, the chosen.
        weights: What KTO's loss of each is multiplied by.
    """

    policy: Tensor
    lengths: Tensor
    gains: Tensor
    divergence: Tensor
    desirable: Tensor
    weights: Tensor


class Kind(NamedTuple):
    """A loss.

    Args:
        compute: Of answers, beta and gamma: the loss of each pair (of KTO, of each answer), and each answer's reward.
        beta: Its default.
        has_reference: Whether it needs a reference model.
    """

    compute: Callable[[Answers, float, float], tuple[Tensor, Tensor]]
    beta: float
    has_reference: bool


def _dpo(answers: Answers, beta: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Rafailov et al., arXiv 2305.18290."""
    rewards = beta * answers.gains
    chosen, rejected = rewards.chunk(2)
    return -logsigmoid(chosen - rejected), rewards


def _ipo(answers: Answers, beta: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Azar et al., arXiv 2310.12036, with beta for tau."""
    chosen, rejected = answers.gains.chunk(2)
    return (chosen - rejected - 1 / (2 * beta)).square(), beta * answers.gains


def _kto(answers: Answers, beta: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Ethayarajh et al., arXiv 2402.01306."""
    gains = answers.gains - answers.divergence
    return answers.weights * torch.sigmoid(beta * torch.where(answers.desirable, -gains, gains)), beta * answers.gains


def _orpo(answers: Answers, beta: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Hong et al., arXiv 2403.07691, with beta for lambda."""
    means = answers.policy / answers.lengths
    smallest = torch.finfo(means.dtype).tiny
    chosen, rejected = (means - (-torch.expm1(means)).clamp(min=smallest).log()).chunk(2)  # logarithms of the odds
    return -means.chunk(2)[0] - beta * logsigmoid(chosen - rejected), beta * means


def _simpo(answers: Answers, beta: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Meng et al., arXiv 2405.14734."""
    rewards = beta * answers.policy / answers.lengths
    chosen, rejected = rewards.chunk(2)
    return -logsigmoid(chosen - rejected - gamma), rewards


LOSSES: dict[PreferenceLoss, Kind] = {
    "dpo": Kind(_dpo, 0.1, True),
    "ipo": Kind(_ipo, 0.1, True),
    "kto": Kind(_kto, 0.1, True),
    "orpo": Kind(_orpo, 0.1, False),
    "simpo": Kind(_simpo, 2.0, False),
}


def mismatched(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each question of a batch with an answer to another one, as KTO's reference point takes them.

    Args:
        batch: ``input_ids``, ``attention_mask`` and ``labels`` of answers to two questions or more.

    Returns:
        The same of as many rows, none longer than the longest there.
    """
    ids, answered = batch["input_ids"], batch["labels"] != IGNORED
    asked = batch["attention_mask"].bool() & ~answered
    pieces = [(ids[row][asked[row]], ids[row - 1][answered[row - 1]]) for row in range(len(ids))]
    rows = [torch.cat(pair)[: ids.shape[1]] for pair in pieces]
    labels = [torch.cat([torch.full_like(question, IGNORED), answer])[: ids.shape[1]] for question, answer in pieces]
    return {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }
