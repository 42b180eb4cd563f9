"""How well texts are found by those that belong to them."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.retrieval import retrieval_hit_rate, retrieval_reciprocal_rank

_CHUNK = 256  # anchors whose similarities are in memory at once


class PairRetrieval(Metric):
    """For each anchor, where among the positives of all pairs its own is, by cosine similarity.

    An anchor that is there with several positives finds the first of them, and a positive that is there twice is one.
    """

    full_state_update = False
    anchors: list[Tensor]
    positives: list[Tensor]
    keys: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("anchors", "positives", "keys"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, anchors: Tensor, positives: Tensor, keys: Tensor) -> None:
        """Add pairs.

        Args:
            anchors: Their embeddings, of shape ``(pairs, size)`` and length 1.
            positives: The same.
            keys: Of shape ``(pairs, 2)``, a number for each text, the same for the same text.
        """
        self.anchors.append(anchors)
        self.positives.append(positives)
        self.keys.append(keys)

    def compute(self) -> dict[str, Tensor]:
        """``mrr``, the mean reciprocal rank, and ``hit_rate_1`` and ``hit_rate_10``, shares among the first."""
        anchors, positives, keys = (_whole(each) for each in (self.anchors, self.positives, self.keys))
        anchor, text = keys[:, 0], torch.unique(keys[:, 1], return_inverse=True)[1]
        texts = positives.new_empty(int(text.max()) + 1, positives.shape[1])
        texts[text] = positives  # each once
        found: dict[str, list[Tensor]] = {"mrr": [], "hit_rate_1": [], "hit_rate_10": []}
        for part in torch.split(torch.arange(len(anchors), device=anchors.device), _CHUNK):
            pairs = (anchor[part, None] == anchor).int()
            belongs = pairs.new_zeros(len(part), len(texts)).scatter_add_(1, text.expand_as(pairs), pairs) > 0
            # torchmetrics takes texts with a similarity of 0 or less for texts that were not found.
            for scores, target in zip(anchors[part] @ texts.T + 2, belongs):
                found["mrr"].append(retrieval_reciprocal_rank(scores, target))
                for most in (1, 10):
                    found[f"hit_rate_{most}"].append(retrieval_hit_rate(scores, target, most))
        return {name: torch.stack(values).mean() for name, values in found.items()}


def _whole(parts: list[Tensor] | Tensor) -> Tensor:
    return parts if isinstance(parts, Tensor) else torch.cat(parts)  # one tensor where it comes from several processes
