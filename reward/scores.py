"""What a reward model says of videos, by name.

Signs: `reward` and `sub` are higher for more helpful; **`cost` is > 0 for unsafe and < 0 for safe**; the logits
in `tags` are > 0 for harms that are shown.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from reward.records import DIMENSIONS, TAGS, Dimension

SUB_DIMENSIONS: tuple[Dimension, ...] = tuple(d for d in DIMENSIONS if d not in ("helpfulness", "cost"))
NUM_SCORES = len(DIMENSIONS) + len(TAGS)
"""Helpfulness, its four parts, cost, and twelve tags: 18."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """What is said of each video of a batch."""

    reward: Float[Tensor, " b"]
    """Helpfulness."""
    sub: Float[Tensor, "b 4"]
    """Its parts, in the order of `SUB_DIMENSIONS`."""
    cost: Float[Tensor, " b"]
    tags: Float[Tensor, "b 12"]
    """Logits, in the order of `TAGS`."""

    @classmethod
    def split(cls, values: Float[Tensor, "b 18"]) -> "Scores":
        """Name 18 columns: reward, sub, cost, tags."""
        reward, sub, cost, tags = torch.split(values, [1, len(SUB_DIMENSIONS), 1, len(TAGS)], dim=-1)
        return cls(reward=reward[:, 0], sub=sub, cost=cost[:, 0], tags=tags)

    def of(self, dimension: Dimension) -> Float[Tensor, " b"]:
        """Give the scores in one dimension."""
        whole = {"helpfulness": self.reward, "cost": self.cost}
        return whole[dimension] if dimension in whole else self.sub[:, SUB_DIMENSIONS.index(dimension)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Outputs:
    """What each of `k` members says. Losses are for one member at a time, or they would all become one."""

    values: Float[Tensor, "k b 18"]

    @property
    def members(self) -> Iterator[Scores]:
        """The scores of one member after the other."""
        return map(Scores.split, self.values)

    @property
    def mean(self) -> Scores:
        """The mean over members."""
        return Scores.split(self.values.mean(0))

    @property
    def spread(self) -> Scores:
        """The standard deviation over members, >= 0, and 0 for a single one; not meant for gradients."""
        return Scores.split(self.values.detach().std(0, correction=0))
