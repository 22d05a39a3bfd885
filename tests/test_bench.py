import json
import time

import pytest

from scripts import bench

SMALL = bench.BenchConfig(width=16, height=16, num_frames=4)


def test_one_line_a_part_with_the_speed_it_must_reach(capsys):
    bench.main(["width=16", "height=16", "num_frames=4", "num_repeats=1"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["name"] for line in lines] == list(bench.BENCHMARKS)
    assert all(line["times_real_time"] > 0 and line["required"] > 0 for line in lines)
    assert lines[0]["work"] == "4 frames of 16x16 at 16 fps"


def test_every_name_has_its_benchmark():
    assert bench.BenchConfig().names == tuple(bench.BENCHMARKS)


def test_the_fastest_repeat_counts():
    """4 frames at 16 fps are 0.25 s of video; the core is busy for 0.2, 0.02 and 0.2 s; 0.02 counts."""
    busy_seconds = iter([0.2, 0.02, 0.2])

    def work():
        until = time.process_time() + next(busy_seconds)
        while time.process_time() < until:
            pass

    assert 2 < bench._speed("busy", work, 1, SMALL).times_real_time <= 0.25 / 0.02
    assert next(busy_seconds, None) is None


def test_the_sample_strobes_on_its_left():
    frames = bench.sample_video(SMALL).frames
    left, right = frames[..., :8, :].mean(axis=(1, 2, 3)), frames[..., 8:, :].mean(axis=(1, 2, 3))
    assert abs(left[0] - left[1]) > 100 > 20 > abs(right[0] - right[1])


def test_an_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["flush"])
    assert "flush" in capsys.readouterr().err
