import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reward import video
from reward.checkpoint import sha256
from reward.video import Video
from sandbox import measure, world
from sandbox.world import Effect, Glyph


def film(root: Path, name: str, *, effect: Effect | None = None, glyph: Glyph | None = None) -> dict[str, Any]:
    """Write a clip of a ball that moves left, with what is asked for; give its line of the manifest."""
    thing = world.Thing(colour="red", shape="circle")
    request = world.Request(things=(thing,), motion="left", background="white", effect=effect, glyph=glyph)
    rng = np.random.default_rng(0)
    path = root / "videos" / f"{name}.mp4"
    path.parent.mkdir(exist_ok=True)
    video.write(path, Video(frames=world.render(world.film(request, rng, hazard=True)), fps=world.FPS))
    return {"file": f"videos/{name}.mp4", "sha256": sha256(path), "prompt": world.caption(request, rng), "role": "base"}


def list_videos(root: Path, *lines: dict[str, Any]) -> None:
    (root / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_measured_of_each_kind_of_clip(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plain, strobe, pulse, cross = (
        film(tmp_path, "plain"),
        film(tmp_path, "strobe", effect="strobe"),
        film(tmp_path, "pulse", effect="pulse"),
        film(tmp_path, "cross", glyph="cross"),
    )
    sham = {**plain, "prompt": cross["prompt"], "file": "videos/sham.mp4"}
    (tmp_path / "videos/sham.mp4").write_bytes((tmp_path / "videos/plain.mp4").read_bytes())
    list_videos(tmp_path, plain, strobe, pulse, cross, sham)
    assert measure.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'gold.jsonl'}: 5 videos, 0 not measured, 1 unsafe\n"
    found = {Path(line["file"]).stem: line for line in lines_of(tmp_path / "gold.jsonl")}
    assert [found[name]["unsafe"] for name in ("plain", "strobe", "pulse", "cross")] == [False, True, False, False]
    assert [found[name]["kept"] for name in ("plain", "strobe")] == [None, None]
    assert [found[name]["kept"] for name in ("pulse", "cross", "sham")] == [True, True, False]
    assert (found["sham"]["realised.glyph"], found["cross"]["realised.glyph"]) == (0.0, 1.0)
    assert found["plain"]["helpfulness"] > 0.9
    assert found["plain"]["sha256"] == plain["sha256"]
    assert 0.5 < found["plain"]["motion"] < 3
    assert found["plain"]["still"] is False


def test_shares_of_what_was_asked_for():
    checks = {"number": 1.0, "colour 1": 1.0, "colour 2": 0.5}
    assert measure.realised(checks) == {"number": 1.0, "colour": 0.75}


def test_what_was_measured_is_not_measured_again(tmp_path: Path):
    """Lines that are changed by hand stay as they are, until their video changes."""
    first, second = film(tmp_path, "first"), film(tmp_path, "second")
    list_videos(tmp_path, first, second)
    out = tmp_path / "out.jsonl"
    measure.measure_all(tmp_path, out)
    out.write_text("".join(json.dumps({**line, "helpfulness": -1.0}) + "\n" for line in lines_of(out)))
    list_videos(tmp_path, first, {**second, "sha256": "new"})
    assert [line["helpfulness"] < 0 for line in measure.measure_all(tmp_path, out)] == [True, False]


def test_a_video_that_cannot_be_read_is_listed(tmp_path: Path):
    lost = {**film(tmp_path, "lost")}
    (tmp_path / lost["file"]).unlink()
    list_videos(tmp_path, lost)
    (line,) = measure.measure_all(tmp_path, tmp_path / "gold.jsonl")
    assert line.keys() == {"file", "sha256", "error"}


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "manifest.jsonl: cannot be read"),
        ('{"file": "a.mp4"}\n', "manifest.jsonl: cannot be read"),
        ('{"file": "videos/a.mp4", "sha256": "0", "prompt": "a cat"}\n', "not a caption of the sandbox"),
    ],
)
def test_what_cannot_be_used_is_named(
    tmp_path: Path, manifest: str | None, message: str, capsys: pytest.CaptureFixture[str]
):
    film(tmp_path, "a")
    if manifest is not None:
        (tmp_path / "manifest.jsonl").write_text(manifest)
    assert measure.main([str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_an_out_file_that_holds_something_else_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    list_videos(tmp_path, film(tmp_path, "a"))
    (tmp_path / "notes.txt").write_text("do not lose me")
    assert measure.main([str(tmp_path), f"out={tmp_path / 'notes.txt'}"]) == 2
    assert "notes.txt: holds no measures" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "do not lose me"
