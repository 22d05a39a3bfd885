import importlib.util

import pytest

from reward import trackers
from reward.config import ConfigError


def missing(package: str) -> pytest.MarkDecorator:
    found = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(found, reason=f"{package} is installed")


def test_no_tracker_is_started_by_default(tmp_path):
    assert trackers.start([], tmp_path, {}) == []


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        pytest.param("tensorboard", r"pip install 'safelight\[trackers\]'", marks=missing("tensorboard")),
        pytest.param("trackio", r"pip install 'safelight\[trackers\]'", marks=missing("trackio")),
        pytest.param("wandb", "pip install 'wandb'", marks=missing("wandb")),
    ],
)
def test_a_tracker_that_is_not_installed_is_refused_with_the_remedy(tmp_path, name, remedy):
    with pytest.raises(ConfigError, match=f"trackers: {name} is not installed; {remedy}"):
        trackers.start([name], tmp_path, {})


def test_tensorboard_receives_values(tmp_path):
    pytest.importorskip("tensorboard")
    (tracker,) = trackers.start(["tensorboard"], tmp_path / "run", {"lr": 1e-4, "note": None})
    tracker.log({"loss": 0.5}, step=3)
    tracker.finish()
    assert list((tmp_path / "run" / "trackers" / "run").glob("events.*"))
