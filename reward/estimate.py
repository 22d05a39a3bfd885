"""What a training of a reward model will take, told before it starts.

`python -m reward FILE --dry-run` prints it below the settings, for one device. The encoder is loaded, and all videos
are read, since only their bytes tell whether their features are known; those of the first new one are made, to tell
what all take on disk. Nothing is written. Memory is without what a step holds between its layers. There is no time,
which nobody has measured.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from reward.config import ConfigError
from reward.examples import Example, joined
from reward.features import BackboneError, FeatureCache
from reward.files import DataError
from reward.model import RewardModel
from reward.settings import RewardConfig, check_batch, check_examples, load_examples
from reward.video import VideoError, read

_GIB = 2**30
_COPIES = 4
"""Of the trained numbers on the device: weights, gradients, and the optimiser's two moments."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """Videos of both splits, by what is known of them."""

    cached: int
    """Their features are there; one that is damaged is made again all the same."""
    new: tuple[Path, ...]
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
    """Give the estimate as a table; one line where data, encoder or a video cannot be read."""
    try:
        return "\n".join(_table(config))
    except (BackboneError, ConfigError, DataError, VideoError) as error:
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
    yield f"  features     of {known.cached:,} videos in the cache, of {len(known.new):,} to be made{absent}"
    if known.new:
        takes = len(known.new) * features_bytes(model, known.new[0]) / _GIB
        yield f"  disk, GiB    {takes:,.3f} for the new videos' features, if all are as large as the first;"
        yield f"               {free_bytes(config.cache) / _GIB:,.3f} are free in {config.cache}"
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
    new = [path for path in tqdm(there, desc="videos", unit="video", leave=False) if not cache.has_video(path)]
    return Known(cached=len(there) - len(new), new=tuple(new), absent=len(paths) - len(there))


def features_bytes(model: RewardModel, path: Path) -> int:
    """Count what the features of a video file take.

    Raises: VideoError: it cannot be read.
    """
    return sum(tensor.nbytes for tensor in vars(model.backbone.encode_video(read(path))).values())


def free_bytes(folder: Path) -> int:
    """Give the space that is left where a folder is, or will be made."""
    return shutil.disk_usage(next(each for each in (folder, *folder.absolute().parents) if each.exists())).free


def weigh(model: RewardModel) -> Weights:
    """Count what a model holds."""
    trained = list(model.trained().values())
    num_bytes = sum(weight.nbytes for weight in trained)
    return Weights(
        num_trained=sum(weight.numel() for weight in trained),
        frozen_bytes=sum(weight.nbytes for weight in model.parameters()) - num_bytes,
        trained_bytes=_COPIES * num_bytes,
    )
