"""What a training of a reward model is told, and what is refused before anything expensive is begun."""

from pathlib import Path
from typing import Literal

from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from reward import losses, preferences
from reward.config import Config, ConfigError
from reward.examples import Example, examples_of
from reward.files import DataError
from reward.model import ModelConfig
from reward.preferences import Source
from reward.records import DIMENSIONS, TAGS, Dimension
from reward.scores import SUB_DIMENSIONS
from reward.trackers import Tracker

Tag = Literal[TAGS]  # ty: ignore[invalid-type-form]
Part = Literal[SUB_DIMENSIONS]  # ty: ignore[invalid-type-form]


class LossWeights(Config):
    """How much each loss counts. 0 leaves its head untrained, and its scores are then not given."""

    helpfulness: NonNegativeFloat = 1.0
    parts: NonNegativeFloat = 0.25
    """Of each sub-dimension."""
    cost: NonNegativeFloat = 1.0
    tags: NonNegativeFloat = 0.5
    swapped: NonNegativeFloat = 0.0
    """Of what is known of instruction following when a video is shown with the text of a step's next prompt: it does so
    neither better nor worse than the other of its pair, and worse than one that was made for that text. Takes away the
    shortcut by which good pictures seem to follow any text. Twice the work a step; validation leaves it out."""
    centring: NonNegativeFloat = 0.01
    """Draws the rewards of a pair to a mean of 0; differences are left alone."""
    shrinkage: NonNegativeFloat = 0.001
    """Draws costs to 0, as SafeSora does."""


class RewardConfig(Config):
    """Train a reward model."""

    out: Path = Path("runs/sandbox/reward")
    data: Source
    model: ModelConfig
    start_from: Path | None = None
    """A reward model to train further; by default what is trained starts at random."""
    parts: tuple[Part, ...] = SUB_DIMENSIONS
    """Sub-dimensions of helpfulness to train: each needs labels. VideoAlign's votes have none of informativeness."""
    tags: tuple[Tag, ...] = tuple(tag for tag in TAGS if tag != "child_abuse")
    """Harm tags to train: each needs videos with and without it. Of child abuse no row is ever kept."""
    use_safety_labels: bool = True
    """Whether `is_safe` places the zero of the cost. False for data without it: costs then only compare."""
    ties: Literal["soft", "rao_kupper"] = "soft"
    """How ties of helpfulness and its parts are learnt. `soft`: as half a win for each video; for forced choices,
    shares of votes, and the odd tie. `rao_kupper`: as an outcome with a likelihood of its own; for votes that may say
    `same`, and do. Each dimension then needs ties, and has a theta of its own, fitted to the validation split at the
    start and at each validation. Costs are compared as in `soft`."""
    margin: NonNegativeFloat = 0.0
    """How far ahead the chosen video's helpfulness, and each part of it, should be, in units of the raw scores. For
    labels that are sure: it widens the gaps of all pairs alike, and probabilities of preference then are too bold. Not
    with `rao_kupper`, whose log theta is such a margin."""
    weights: LossWeights = LossWeights()
    num_steps: PositiveInt = 1_000
    batch_size: PositiveInt = 24
    """Prompts a step, on all processes together."""
    accumulate: PositiveInt = 1
    """Parts that a process does its share of a step in, one after the other, to save memory. A step's loss is the mean
    of theirs, each a mean over its own known labels: where few are known, those of a part with few count for more."""
    learning_rate: PositiveFloat = 3e-4
    weight_decay: NonNegativeFloat = 0.05
    warmup_steps: int = 50
    mixed_precision: Literal["no", "bf16"] = "no"
    validate_every: PositiveInt = 50
    patience: PositiveInt = 6
    """Validations without a new least loss after which training stops."""
    cache: Path = Path("runs/cache/features")
    """Features of videos and texts, shared by all runs."""
    trackers: tuple[Tracker, ...] = ()
    seed: int = Field(default=0, ge=0)


def rewards_of(config: RewardConfig) -> tuple[Dimension, ...]:
    """Give the dimensions of reward that are trained: helpfulness, parts of it, or both."""
    weights = config.weights
    return (*(("helpfulness",) if weights.helpfulness else ()), *(config.parts if weights.parts else ()))


def check_examples(train: Example, validation: Example, config: RewardConfig) -> None:
    """Refuse data that cannot train or validate what the settings ask for.

    Raises: DataError: a head without labels or with ties only; safety of one kind only; labels that the likelihood of
        ties is not for.
    """
    heads = {"helpfulness": config.weights.helpfulness, "cost": config.weights.cost}
    heads |= {part: config.weights.parts if part in config.parts else 0.0 for part in SUB_DIMENSIONS}
    for split, example in (("training", train), ("validation", validation)):
        for dimension in DIMENSIONS:
            labels = example.preference(dimension)
            if heads[dimension] and not (labels.isfinite() & (labels != 0.5)).any():
                kind = "ties only" if labels.isfinite().any() else "no label"
                remedy = "leave it out of parts" if dimension in SUB_DIMENSIONS else f"set weights.{dimension}=0"
                raise DataError(f"{dimension}: {kind} among the {len(labels)} {split} pairs; {remedy}, or add labels")
        known = example.unsafe[example.unsafe.isfinite()]
        if config.weights.cost and config.use_safety_labels and len(known.unique()) < 2:
            raise DataError(
                f"is_safe: expected safe and unsafe {split} videos, got {len(known)} labels of one kind or none; "
                "without them costs only compare: use_safety_labels=false"
            )
        for dimension in rewards_of(config) if config.ties == "rao_kupper" else ():
            _check_outcomes(example.preference(dimension), f"{dimension}: ties=rao_kupper", split)


def _check_outcomes(labels: Float[Tensor, " p"], what: str, split: str) -> None:
    """Refuse shares of votes, and labels without ties: no theta fits them."""
    known = labels[labels.isfinite()]
    if len(shares := known[(2 * known).frac() != 0]):
        raise DataError(
            f"{what}: expected wins, losses and ties, got a share of votes, {shares[0].item():g}, "
            f"among the {split} pairs; set ties=soft"
        )
    if not (known == 0.5).any():
        raise DataError(
            f"{what}: expected ties, got none among the {len(known)} labelled {split} pairs; set ties=soft, "
            "add ties, or change data.validation_share"
        )


def check_batch(config: RewardConfig, num_processes: int) -> None:
    """Refuse steps that would leave a process without a prompt, losses that are all left out, and settings for none.

    Raises: ConfigError: so it is.
    """
    if config.batch_size < num_processes * config.accumulate:
        raise ConfigError(
            f"batch_size={config.batch_size}: fewer prompts than the {num_processes} processes times "
            f"accumulate={config.accumulate}; give one prompt at least to each part"
        )
    weights = config.weights
    if not (weights.helpfulness or (weights.parts and config.parts) or weights.cost or (weights.tags and config.tags)):
        raise ConfigError("weights: all are 0, so nothing would be trained; give one a number > 0")
    if weights.swapped:
        if "instruction_following" not in config.parts or not weights.parts:
            raise ConfigError(
                f"weights.swapped={weights.swapped:g}: is about instruction following, which is not trained; "
                "set it to 0, or add instruction_following to parts"
            )
        if config.margin or config.ties != "soft":
            raise ConfigError(
                f"weights.swapped={weights.swapped:g}: has no margin and no likelihood of ties; leave it out, or set "
                "margin=0 and ties=soft"
            )
        if config.batch_size < 2 * num_processes * config.accumulate:
            raise ConfigError(
                f"batch_size={config.batch_size}: weights.swapped={weights.swapped:g} needs two prompts for each of "
                f"{num_processes} processes times accumulate={config.accumulate}; raise it"
            )
    if config.ties == "rao_kupper" and not rewards_of(config):
        raise ConfigError("ties=rao_kupper: is about helpfulness and its parts, and none is trained; leave it out")
    if config.margin and config.ties == "rao_kupper":
        raise ConfigError(f"margin={config.margin:g}: ties=rao_kupper has one of its own, log theta; leave one out")
    if config.margin and not rewards_of(config):
        raise ConfigError(
            f"margin={config.margin:g}: is about helpfulness and its parts, and none is trained; leave it out"
        )


def tag_weights(train: Example, config: RewardConfig) -> Float[Tensor, " tags"]:
    """Give the balance of each trained tag.

    Raises: DataError: a tag that no or every training video has.
    """
    try:
        return losses.positive_weights(train.tags[:, [TAGS.index(tag) for tag in config.tags]], config.tags)
    except ValueError as error:
        raise DataError(f"tags: {error}; or name those to train, as in tags=[contraband,violence]") from error


def load_examples(config: RewardConfig) -> dict[Literal["train", "validation"], list[Example]]:
    """Give the examples of the two splits that training may see; that pairs are unscreened is said on the terminal.

    Raises: DataError: the data cannot be read, or a split has no pairs.
    """
    data = preferences.load(config.data)
    preferences.warn_of_unscreened(config.data, [*data.pairs("train"), *data.pairs("validation")])
    found = {}
    for split in ("train", "validation"):
        found[split] = examples_of(data.pairs(split))
        if not found[split]:
            raise DataError(f"{config.data.path}: no {split} pairs; they are carved out by data.validation_share")
    return found
