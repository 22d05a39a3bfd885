import json
from pathlib import Path

import pytest
import tiny_wan
from hypothesis import given
from hypothesis import strategies as st

from align.folder import PolicyError, fingerprint
from align.manifest import Job, Manifest, Setup, make, require_device, slug
from align.policy import Policy
from align.sample import Sampler
from reward import video
from reward.config import dump, load
from reward.files import DataError


class Program(Sampler):
    """Settings of a program that makes videos."""

    steps: int = 1
    num_frames: int = tiny_wan.NUM_FRAMES
    height: int = tiny_wan.HEIGHT
    width: int = tiny_wan.WIDTH
    out: Path = Path("out")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.build(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def setup(model: Path) -> Setup:
    return Setup.of(model, Program(), dtype="float32")


def job(setup: Setup, name: str, role: str = "base", seed: int = 0) -> Job:
    return Job(file=f"videos/{role}/{name}.mp4", role=role, prompt="a red circle", index=0, seed=seed, setup=setup)


def test_a_line_says_how_a_video_was_made(model: Path, setup: Setup):
    line = job(setup, "a", seed=7).line()
    assert {"file": "videos/base/a.mp4", "role": "base", "prompt": "a red circle", "seed": 7}.items() <= line.items()
    assert (line["model_sha256"], line["lora_sha256"], line["dtype"]) == (fingerprint(model), None, "float32")
    assert (line["steps"], line["num_frames"], line["height"]) == (1, 6, 32)
    assert "out" not in line
    json.dumps(line)


def test_a_sampler_is_no_more_than_that(setup: Setup, tmp_path: Path):
    (tmp_path / "sampler.yaml").write_text(dump(setup.sampler))
    assert load(Sampler, tmp_path / "sampler.yaml") == Sampler(steps=1, num_frames=6, height=32, width=32)


def test_jobs_are_made_in_batches_and_each_is_written_down(model: Path, setup: Setup, tmp_path: Path):
    jobs = [job(setup, name, seed=seed) for seed, name in enumerate("abc")]
    sizes = make(Policy.load(model), jobs, Manifest(tmp_path, jobs), batch_size=2)
    assert next(sizes) == 2
    assert [Manifest(tmp_path, jobs).has(each) for each in jobs] == [True, True, False]
    assert list(sizes) == [1]
    again = Manifest(tmp_path, jobs)
    assert all(again.has(each) for each in jobs)
    assert again.sha256(jobs[2]) == fingerprint(tmp_path / "videos/base/c.mp4")
    assert video.probe(tmp_path / "videos/base/c.mp4").metadata["seed"] == "2"
    (tmp_path / "videos/base/c.mp4").write_bytes(b"half a video")
    assert not again.has(jobs[2])


def test_other_settings_of_a_role_are_refused_those_of_another_are_not(model: Path, setup: Setup, tmp_path: Path):
    first = job(setup, "a")
    list(make(Policy.load(model), [first], Manifest(tmp_path, [first]), batch_size=1))
    faster = Setup.of(model, Program(steps=2), dtype="float32")
    Manifest(tmp_path, [job(faster, "a", role="other")])
    with pytest.raises(DataError, match="was made with steps=1, now it is 2"):
        Manifest(tmp_path, [job(faster, "b")])
    with pytest.raises(DataError, match="was made with seed=0, now it is 1"):
        Manifest(tmp_path, [job(setup, "a", seed=1)])


@given(prompt=st.text(min_size=1, max_size=200))
def test_a_prompt_never_becomes_a_path(prompt: str):
    name = slug(prompt)
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert len(name) <= 61


def test_a_file_is_no_output_folder(tmp_path: Path):
    (tmp_path / "clips").write_text("")
    with pytest.raises(DataError, match="clips: is a file; name a folder"):
        Manifest(tmp_path / "clips", [])


def test_a_device_that_is_none_is_refused():
    require_device("cpu")
    with pytest.raises(PolicyError, match="device=tpu: expected cpu, cuda or cuda:N"):
        require_device("tpu")
