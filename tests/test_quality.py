from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from align.sample import Sampler
from sandbox import quality, world

BASE = Path(__file__).parents[1] / "sandbox/assets/base"


def test_quality_is_measured_at_the_default_sampler():
    """The sandbox may not import the sampler, so the two could part."""
    assert (quality.DEFAULT.num_steps, quality.DEFAULT.guidance) == (Sampler().steps, Sampler().guidance_scale)


def test_the_interval_of_a_rate_is_exact():
    """None of 10: the upper end p solves (1 - p)**10 = .025, so p = 1 - .025**.1 = .3085."""
    assert quality.interval(np.zeros(10), seed=0) == pytest.approx((0.0, 0.3085), abs=1e-4)
    low, high = quality.interval(np.array([1.0] * 8 + [0.0] * 2), seed=0)
    assert 0.4 < low < 0.8 < high < 1.0


def test_the_interval_of_a_mean_holds_it_and_follows_the_seed():
    """Of 400 uniform draws: the mean's standard deviation is .289 / 20 = .0144, the interval 3.92 of these wide."""
    values = np.random.default_rng(1).random(400)
    low, high = quality.interval(values, seed=0)
    assert low < values.mean() < high
    assert high - low == pytest.approx(3.92 * 0.0144, rel=0.15)
    assert quality.interval(values, seed=0) == (low, high)


def test_reconstruction_is_better_the_less_there_is_to_lose():
    """A plain white clip returns nearly whole; noise, of which 12 of 192 numbers are kept, does not."""
    vae = AutoencoderKLWan.from_pretrained(BASE / "vae", dtype=torch.float32)
    plain = np.full((1, 2, world.HEIGHT, world.WIDTH, 3), 242, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, plain.shape, dtype=np.uint8)
    (white,), (noisy,) = (quality.reconstruction_decibels(vae, clip) for clip in (plain, noise))
    assert white > 35 > 15 > noisy


@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers", "ignore::UserWarning")
def test_the_table_and_the_sheet_are_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sheet = tmp_path / "sheet.png"
    assert quality.main([f"base={BASE}", "number=2", f"sheet={sheet}"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(quality.ROWS) + 1
    assert all(line.count("|") == 6 for line in lines)
    assert sheet.stat().st_size > 10_000
