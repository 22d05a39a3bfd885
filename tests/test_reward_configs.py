"""The files in configs/reward; the data and encoders that they name need not be here."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from reward.config import Config, load
from reward.settings import RewardConfig, check_batch

FOLDER = Path(__file__).parents[1] / "configs/reward"
FILES = sorted(FOLDER.glob("*.yaml"))


def repeated(config: Config) -> Iterator[str]:
    """Settings that a file states though they are the defaults."""
    for name in config.model_fields_set - {"kind"}:
        value, field = getattr(config, name), type(config).model_fields[name]
        if isinstance(value, Config):
            yield from repeated(value)
        elif not field.is_required() and value == field.get_default(call_default_factory=True, validated_data={}):
            yield name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_can_be_trained_with_and_states_only_what_differs(path: Path):
    config = load(RewardConfig, path)
    check_batch(config, num_processes=1)
    assert list(repeated(config)) == []
    assert path.read_text().startswith("#"), "says what it is for"


def test_those_that_are_promised_are_there():
    assert {"safesora-dual", "safesora-vlm", "videoalign"} <= {path.stem for path in FILES}


def test_videoalign_trains_only_what_its_votes_are_about():
    config = load(RewardConfig, FOLDER / "videoalign.yaml")
    assert "informativeness" not in config.parts
    assert (config.tags, config.weights.cost, config.weights.tags) == ((), 0, 0)
    assert config.ties == "rao_kupper"
