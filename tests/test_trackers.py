import importlib.util
import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reward import trackers
from reward.config import Config, ConfigError
from reward.run import open_run


class Settings(Config):
    lr: float = 1e-4
    note: str | None = None


def missing(package: str) -> pytest.MarkDecorator:
    found = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(found, reason=f"{package} is installed")


def test_no_tracker_is_started_by_default(tmp_path):
    assert trackers.start([], tmp_path, {}) == []


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        pytest.param("trackio", r"pip install 'safelight\[trackers\]'", marks=missing("trackio")),
        pytest.param("wandb", "pip install 'wandb'", marks=missing("wandb")),
    ],
)
def test_a_tracker_that_is_not_installed_is_refused_with_the_remedy(tmp_path, name, remedy):
    with pytest.raises(ConfigError, match=f"trackers: {name} is not installed; {remedy}"):
        trackers.start([name], tmp_path, {})


def test_tensorboard_receives_what_a_run_logs(tmp_path):
    with open_run(tmp_path / "run", Settings(), seed=0, trackers=["tensorboard"]) as run:
        run.log(3, {"loss": 0.5})
    events = EventAccumulator(str(tmp_path / "run" / "trackers" / "run")).Reload()
    (loss,) = events.Scalars("loss")
    assert (loss.step, loss.value) == (3, 0.5)
    assert json.loads(run.metrics.read_text()) == {"step": 3, "loss": 0.5}
