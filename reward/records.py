"""What a preference file says, in one typed shape whatever the file's format.

`None` always means "not known": a pair without a label in some dimension has no preference there, which is
neither a tie nor a win of either video. Signs: helpfulness and its four parts say which video is *better*;
`cost` says which is *worse* (more harmful).
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

PromptType = Literal["safety_critical", "safety_neutral"]
Dimension = Literal["helpfulness", "cost", "instruction_following", "correctness", "informativeness", "aesthetics"]
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tags:
    """The twelve harm tags of SafeSora: shown (a video) or asked for (a prompt)."""

    porn: bool | None = None
    violence: bool | None = None
    hate: bool | None = None
    terrorism: bool | None = None
    contraband: bool | None = None
    controversial: bool | None = None
    racism: bool | None = None
    other_discrimination: bool | None = None
    animal_abuse: bool | None = None
    child_abuse: bool | None = None
    crime: bool | None = None
    other_harmful: bool | None = None


TAGS = tuple(field.name for field in fields(Tags))
UNTAGGED = Tags()


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What a user asked for."""

    prompt_id: str
    text: str
    type: PromptType | None = None
    tags: Tags = UNTAGGED
    source: str | None = None
    refined_from: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoSample:
    """One generated video, judged by its `prompt`, but made from `text`, which a refiner may have written."""

    video_id: str
    prompt: Prompt
    path: Path
    text: str | None = None
    is_safe: bool | None = None
    tags: Tags = UNTAGGED
    generator: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """How likely the first video is preferred to the second: 1 or 0 for a choice, .5 for a tie.

    Between them lies the share of `num_votes` that the first one got, a tie vote counted half.
    """

    probability: float
    num_votes: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1 or self.num_votes < 1:
            raise ValueError(f"expected a probability in [0, 1] and at least one vote, got {self}")


FIRST, TIE, SECOND = (Preference(probability=probability) for probability in (1.0, 0.5, 0.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two videos of one prompt and what annotators preferred; `cost` is preferred where it is *higher*."""

    pair_id: str
    prompt: Prompt
    video_0: VideoSample
    video_1: VideoSample
    helpfulness: Preference | None = None
    cost: Preference | None = None
    instruction_following: Preference | None = None
    correctness: Preference | None = None
    informativeness: Preference | None = None
    aesthetics: Preference | None = None

    def preference(self, dimension: Dimension) -> Preference | None:
        """Give the preference in one dimension; in `cost`, 1 says that the first video is the costlier."""
        return getattr(self, dimension)


Record = Pair | VideoSample | Prompt
Split = Literal["train", "validation", "test", "eval"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A record and the split that it belongs to."""

    split: Split
    record: Record


def key_of(record: Record) -> tuple[type, str]:
    """Give what tells a record from all others: its kind and its id."""
    match record:
        case Pair():
            return Pair, record.pair_id
        case VideoSample():
            return VideoSample, record.video_id
        case Prompt():
            return Prompt, record.prompt_id


def videos_of(record: Record) -> tuple[VideoSample, ...]:
    """Give the videos that a record is about."""
    match record:
        case Pair():
            return record.video_0, record.video_1
        case VideoSample():
            return (record,)
        case Prompt():
            return ()


def prompts_of(record: Record) -> tuple[Prompt, ...]:
    """Give the prompt of a record, then those of its videos, which should be the same."""
    own = record if isinstance(record, Prompt) else record.prompt
    return own, *(video.prompt for video in videos_of(record))
