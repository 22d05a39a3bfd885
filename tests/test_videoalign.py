"""Real pairs with human votes, where they are at hand: read, scored by a video language model, counted."""

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from reward import judge, preferences
from reward.model import ModelConfig, RewardModel
from reward.preferences import Source
from reward.records import FIRST, SECOND, TIE
from reward.vlm import Vlm
from tests import tiny_encoders, tiny_judge

EXAMPLE = Path(__file__).parents[2] / "shared/data/videoalign-example"

pytestmark = pytest.mark.skipif(not EXAMPLE.is_dir(), reason=f"VideoAlign's example pairs are not at {EXAMPLE}")


def test_two_pairs_are_kept_and_the_rest_is_counted():
    """Twelve rows repeat three pairs; the videos of the third are missing, and that is noticed once."""
    data = preferences.load(Source(path=EXAMPLE, missing="drop", validation_share=0))
    assert data.num_read == 12
    assert data.num_dropped == {"duplicate": 9, "missing_video": 1}
    first, second = data.pairs("train")
    assert (first.aesthetics, first.correctness, first.instruction_following) == (SECOND, SECOND, FIRST)
    assert (second.aesthetics, second.correctness, second.instruction_following) == (TIE, TIE, FIRST)
    assert (first.helpfulness, first.cost, first.informativeness) == (None, None, None)
    with pytest.raises(preferences.DataError, match=r"example_3_A.mp4"):
        preferences.load(Source(path=EXAMPLE))


def test_a_video_language_model_scores_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    encoder = tiny_encoders.qwen2_5_vl(tmp_path / "qwen")
    backbone = Vlm(encoder=encoder, num_frames=4, max_pixels=4096, dtype="float32", rank=2, alpha=4)
    RewardModel.build(ModelConfig(backbone=backbone), seed=0).save(tmp_path / "run/model")
    tiny_judge.calibrate(tmp_path / "run", trained=["helpfulness", "aesthetics"])
    out = tmp_path / "scores.parquet"
    assert judge.main([str(tmp_path / "run"), str(EXAMPLE), f"out={out}", "missing=drop", "rules=[]"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["attempted"], printed["scored"], printed["failed"]) == (4, 4, 0)
    assert printed["excluded"] == {"duplicate": 9, "missing_video": 1}
    table = pq.read_table(out)
    rewards = table["reward"].to_pylist()
    assert table["video_id"].to_pylist()[0] == "videos/example_1_A.mp4"
    assert len(set(rewards)) == 4
    assert all(map(math.isfinite, rewards))
    assert table["cost"].to_pylist() == [None] * 4
