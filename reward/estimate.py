"""What a training of a reward model will take, told before it starts.

`python -m reward FILE --dry-run` prints it below the settings, for one device. The encoder is loaded, and all videos
are read, since only their bytes tell whether their features are known; nothing is written. Memory is without what a
step holds between its layers. There is no time, which nobody has measured.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from reward.config import ConfigError
from reward.examples import Example, joined
from reward.features import BackboneError, FeatureCache
from reward.files import DataError
from reward.model import RewardModel
from reward.settings import RewardConfig, check_batch, check_examples, load_examples

_GIB = 2**30
_COPIES = 4
"""Of the trained numbers on the device: weights, gradients, and the optimiser's two moments."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """Videos of both splits, by what is known of them."""

    cached: int
    """Their features are there; one that is damaged is made again all the same."""
    new: int
    """Their features have to be made."""
    absent: int
    """There is no such file."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What the model holds."""

    num_trained: int
    frozen_bytes: int
    trained_bytes: int
    """Gradients and optimiser included."""


def describe(config: RewardConfig) -> str:
    """Give the estimate as a table; one line where data or encoder cannot be read."""
    try:
        return "\n".join(_table(config))
    except (BackboneError, ConfigError, DataError) as error:
        return f"no estimate: {error}"


def _table(config: RewardConfig) -> Iterator[str]:
    examples = load_examples(config)
    check_batch(config, num_processes=1)
    check_examples(joined(examples["train"]), joined(examples["validation"]), config)
    model = RewardModel.build(config.model, seed=config.seed)
    known, weights = count_known(config, model, [*examples["train"], *examples["validation"]]), weigh(model)
    yield "estimate, for one device"
    for split, found in examples.items():
        whole = joined(found)
        yield f"  {split:<11}  {len(found):,} prompts, {len(whole.paths):,} videos, {len(whole.pairs):,} pairs"
    absent = f", and {known.absent:,} videos are not there" if known.absent else ""
    yield f"  features     of {known.cached:,} videos in the cache, of {known.new:,} to be made{absent}"
    passes = config.num_steps * config.batch_size / len(examples["train"])
    yield f"  steps        {config.num_steps:,} at most, {passes:.3g} times through the training prompts"
    yield f"  trained      {weights.num_trained:,} parameters"
    yield "  memory, GiB, without activations"
    yield f"    frozen encoder        {weights.frozen_bytes / _GIB:9.3f}"
    yield f"    trained, optimiser    {weights.trained_bytes / _GIB:9.3f}"


def count_known(config: RewardConfig, model: RewardModel, examples: Sequence[Example]) -> Known:
    """Count the videos of some examples, with a progress bar, for all of them are read."""
    paths = dict.fromkeys(path for example in examples for path in example.paths)
    there = [path for path in paths if path.is_file()]
    cache = FeatureCache(config.cache, model.backbone)
    cached = sum(map(cache.has_video, tqdm(there, desc="videos", unit="video", leave=False)))
    return Known(cached=cached, new=len(there) - cached, absent=len(paths) - len(there))


def weigh(model: RewardModel) -> Weights:
    """Count what a model holds."""
    trained = list(model.trained().values())
    num_bytes = sum(weight.nbytes for weight in trained)
    return Weights(
        num_trained=sum(weight.numel() for weight in trained),
        frozen_bytes=sum(weight.nbytes for weight in model.parameters()) - num_bytes,
        trained_bytes=_COPIES * num_bytes,
    )
