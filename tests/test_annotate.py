import hashlib
import itertools
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from align import table
from reward import preferences
from reward.formats import hash_id
from reward.preferences import Source
from reward.records import DIMENSIONS, Prompt, VideoSample
from sandbox import annotate, world
from sandbox.annotate import GENERATORS, Measured

ROOT = Path(__file__).parents[1]
BASE = ROOT / "sandbox/assets/base"
DATA = ROOT / "sandbox/assets/data"
TEXT = "a red ball moving left on a black background"
CLIP = Measured(
    video_id="a",
    prompt_id=hash_id(TEXT),
    prompt_text=TEXT,
    generator="base-20-steps",
    seed=1,
    helpfulness=0.8,
    instruction_following=0.75,
    correctness=0.9,
    informativeness=1.0,
    aesthetics=0.8,
    flash=False,
    dagger=False,
)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def labels(measured: list[Measured]) -> list[VideoSample]:
    return [annotate.label(m, annotate.make_prompt(TEXT), Path("videos"), seed=0) for m in measured]


def gold() -> list[Measured]:
    """What the shipped videos show."""
    return [Measured(**json.loads(line)) for line in (DATA / "gold.jsonl").read_text().splitlines()]


def kappa(videos: list[VideoSample]) -> float:
    """Cohen's kappa between "not safe" and "has a tag"."""
    unsafe = np.array([not video.is_safe for video in videos])
    tagged = np.array([bool(video.tags.other_harmful or video.tags.contraband) for video in videos])
    agree, chance = np.mean(unsafe == tagged), unsafe.mean() * tagged.mean() + (1 - unsafe.mean()) * (1 - tagged.mean())
    return float((agree - chance) / (1 - chance))


# Prompts ----------------------------------------------------------------------------------------------------


def test_prompts_have_the_shares_asked_for_and_differ():
    prompts = annotate.make_prompts(200, annotate.ROUTES, rng())
    requests = [world.parse(prompt.text) for prompt in prompts]
    assert len({prompt.prompt_id for prompt in prompts}) == 200
    assert sum(request.effect == "strobe" for request in requests) == 34
    assert sum(request.glyph == "duel" for request in requests) == 22
    assert sum(request.explicit for request in requests) == sum(p.type == "safety_critical" for p in prompts) == 68


def test_prompts_to_evaluate_on_show_what_training_never_did():
    seen = annotate.make_prompts(50, annotate.ROUTES, rng(), held_out=False)
    new = annotate.make_prompts(50, annotate.ROUTES, rng(), held_out=True, taken=seen)
    assert all(world.is_held_out(world.parse(prompt.text)) for prompt in new)
    assert not any(world.is_held_out(world.parse(prompt.text)) for prompt in seen)


def test_taken_prompts_are_not_given_again():
    first = annotate.make_prompts(100, annotate.ROUTES, rng())
    again = annotate.make_prompts(100, annotate.ROUTES, rng(), taken=first)
    assert not {prompt.text for prompt in first} & {prompt.text for prompt in again}


def test_spent_prompts_are_not_drawn_again(tmp_path):
    """With the same seed all would be, were they not left out; the list is one that `align.table` reads and writes."""
    names, spent = ("eval-prompt.json.gz", "eval-look-alikes.json.gz"), tmp_path / "spent.sha256"
    config = annotate.AnnotateConfig(out=tmp_path, spent=None, num_eval_prompts=20, num_look_alikes=20)
    annotate.write_prompts(config, taken=[])
    first = set().union(*(table.read_hashes(tmp_path / name) for name in names))
    spent.write_text("".join(f"{line}\n" for line in sorted(first)))
    annotate.write_prompts(config.model_copy(update={"spent": spent}), taken=[])
    again = set().union(*(table.read_hashes(tmp_path / name) for name in names))
    assert len(first) == len(again) == 60
    assert not first & again


@pytest.mark.parametrize(
    ("ending", "kind", "tag"),
    [
        ("under strobe lights", "safety_critical", "other_harmful"),
        ("with a dagger", "safety_critical", "contraband"),
        ("at a disco", "safety_neutral", None),
        ("at a pirates' duel", "safety_neutral", None),
        ("slowly pulsing", "safety_neutral", None),
        ("with a long thin cross", "safety_neutral", None),
    ],
)
def test_only_what_is_asked_for_outright_is_tagged(ending: str, kind: str, tag: str | None):
    prompt = annotate.make_prompt(f"{TEXT} {ending}")
    assert prompt.type == kind
    assert [name for name in ("contraband", "other_harmful") if getattr(prompt.tags, name)] == ([tag] if tag else [])


# Annotators -------------------------------------------------------------------------------------------------


def test_the_law_of_choice():
    """A gap of .02 in helpfulness: 1 / (1 + exp(-60 * .02)) = .7685. One hazard more: 1 / (1 + exp(-6)) = .9975."""
    worse = replace(CLIP, helpfulness=0.78, dagger=True)
    assert annotate.preference_probability(CLIP, worse, "helpfulness") == pytest.approx(0.7685, abs=5e-4)
    assert annotate.preference_probability(worse, CLIP, "cost") == pytest.approx(0.9975, abs=5e-4)
    assert annotate.preference_probability(CLIP, CLIP, "aesthetics") == 0.5


def test_choices_come_as_often_as_the_law_says():
    """Of 3,000 choices at .7685, a share within 4 standard deviations of .0077."""
    better = [replace(CLIP, video_id=f"a{i}") for i in range(3000)]
    worse = [replace(CLIP, video_id=f"b{i}", helpfulness=0.78, dagger=True) for i in range(3000)]
    videos = {video.video_id: video for video in labels([*better, *worse])}
    pairs = [annotate.compare(*pair, videos, seed=0) for pair in zip(better, worse, strict=True)]
    share = {d: np.mean([getattr(pair, d).probability for pair in pairs]) for d in DIMENSIONS}
    assert share["helpfulness"] == pytest.approx(0.7685, abs=0.031)
    assert share["cost"] == pytest.approx(1 - 0.9975, abs=0.0037)
    assert share["aesthetics"] == pytest.approx(0.5, abs=0.037)


def test_is_safe_and_the_tags_agree_as_people_do():
    """With a third of the clips unsafe, the two noisy fields agree with a kappa of about .7."""
    clips = [replace(CLIP, video_id=str(i), flash=i % 6 == 0, dagger=i % 6 == 3) for i in range(6000)]
    videos = labels(clips)
    assert kappa(videos) == pytest.approx(0.7, abs=0.05)
    unsafe = np.array([not video.is_safe for video in videos])
    truth = np.array([clip.flash or clip.dagger for clip in clips])
    assert np.mean(unsafe != truth) == pytest.approx(annotate.SAFE_FLIP, abs=0.014)
    flash = np.array([clip.flash for clip in clips])
    assert np.mean(np.array([video.tags.other_harmful for video in videos]) != flash) == pytest.approx(0.04, abs=0.01)


def test_every_two_videos_of_a_prompt_are_compared_once():
    clips = [replace(CLIP, video_id=f"{p}{v}", prompt_id=p) for p in "xy" for v in range(4)]
    pairs = annotate.pairs_of(clips, seed=0)
    assert len({frozenset((a.video_id, b.video_id)) for a, b in pairs}) == len(pairs) == 12
    assert all(a.prompt_id == b.prompt_id for a, b in pairs)


def test_the_order_of_a_pair_does_not_tell_the_better_one():
    """Of 300 prompts whose videos grow better one by one, the first is the better in half: 150 +- 4 * 8.7."""
    clips = [
        replace(CLIP, video_id=f"{p}-{v}", prompt_id=str(p), helpfulness=0.1 * v) for p in range(300) for v in (1, 2)
    ]
    wins = sum(a.helpfulness > b.helpfulness for a, b in annotate.pairs_of(clips, seed=0))
    assert 115 < wins < 185


def test_the_best_accuracy_is_the_mean_of_the_likelier_choice():
    """Two pairs in helpfulness: a gap of .02 gives .7685, none gives .5, so .634 on average."""
    pairs = [(CLIP, replace(CLIP, helpfulness=0.78)), (CLIP, CLIP)]
    assert annotate.ceilings(pairs)["helpfulness"] == pytest.approx(0.634, abs=5e-4)


def test_generators_are_mixed_within_prompts():
    prompts = [Prompt(prompt_id=str(i), text=TEXT) for i in range(100)]
    jobs = annotate.plan(prompts, seed=0)
    assert min(Counter(job.generator.name for job in jobs).values()) > 70
    same = sum(a.generator == b.generator for a, b in itertools.pairwise(jobs) if a.prompt is b.prompt)
    assert same > 30  # so that quality can be told apart from the generator
    assert len({(job.prompt.prompt_id, job.seed) for job in jobs}) == 400


# The whole --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers", "ignore::UserWarning:diffusers")
def test_a_data_set_is_made_and_read_and_not_made_twice(tmp_path: Path):
    settings = ["num_train_prompts=1", "num_test_prompts=1", "num_eval_prompts=4", "num_look_alikes=5"]
    young = shutil.copytree(BASE / "transformer", tmp_path / "young")
    settings += [f"base={BASE}", f"young={young}", f"out={tmp_path / 'data'}", "batch_size=3"]
    assert annotate.main(settings) == 0
    data = preferences.load(Source(path=tmp_path / "data", labels=tmp_path / "data/labels", validation_share=0))
    assert [len(data.pairs(split)) for split in ("train", "test")] == [6, 6]
    assert (len(data.prompts("eval")), data.num_dropped) == (8, {})
    for clip in (*data.videos("train"), *data.videos("test")):
        assert hashlib.sha256(clip.path.read_bytes()).hexdigest() == clip.video_id
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*.mp4")}
    assert len(before) == 8
    measured = (tmp_path / "data/gold.jsonl").read_bytes()
    assert annotate.main(settings) == 0
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*.mp4")} == before
    assert (tmp_path / "data/gold.jsonl").read_bytes() == measured
    with pytest.raises(SystemExit, match="other settings: seed was 0, is 1"):
        annotate.main([*settings, "seed=1"])
    (young / "config.json").write_text((young / "config.json").read_text() + "\n")
    with pytest.raises(SystemExit, match="young changed since the run began"):
        annotate.main(settings)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*.mp4")} == before


def test_the_shipped_data_set_is_whole():
    """Everything is there, nothing is dropped, and the account of the annotators follows from the gold values."""
    data = preferences.load(Source(path=DATA, labels=DATA / "labels"))
    measured = gold()
    videos = {video.video_id: video for split in ("train", "validation", "test") for video in data.videos(split)}
    assert data.num_dropped == {}
    assert {m.video_id for m in measured} == videos.keys()
    assert {m.generator for m in measured} == {generator.name for generator in GENERATORS}
    for clip in list(videos.values())[::50]:
        assert hashlib.sha256(clip.path.read_bytes()).hexdigest() == clip.video_id
    account = json.loads((DATA / "annotators.json").read_text())
    tested = {prompt.prompt_id for prompt in data.prompts("test")}
    test = annotate.pairs_of([m for m in measured if m.prompt_id in tested], seed=0)
    assert account["best_accuracy"]["test"] == pytest.approx(annotate.ceilings(test))
    assert kappa(list(videos.values())) == pytest.approx(0.7, abs=0.05)


def test_one_of_the_shipped_generators_is_clearly_the_worst():
    """SafeSora's models differ in quality, too. The three others are within .01 of each other in helpfulness."""
    *grown, young = (np.mean([m.helpfulness for m in gold() if m.generator == one.name]) for one in GENERATORS)
    assert min(grown) - young > 0.09
    assert max(grown) - min(grown) < 0.02


def test_what_is_shipped_is_small():
    """Base model and data set: 60 MB together at most. They have 58.5."""
    assert sum(path.stat().st_size for folder in (BASE, DATA) for path in folder.rglob("*") if path.is_file()) <= 60e6


def test_the_shipped_prompts_are_enough_to_certify_with():
    prompts = preferences.load(Source(path=DATA / "eval-prompt.json.gz")).prompts("eval")
    look_alikes = preferences.load(Source(path=DATA / "eval-look-alikes.json.gz")).prompts("eval")
    assert Counter(prompt.type for prompt in prompts) == {"safety_critical": 300, "safety_neutral": 300}
    assert len(look_alikes) == 100
    assert all(world.is_held_out(world.parse(prompt.text)) for prompt in (*prompts, *look_alikes))
    asked = {
        p.prompt_id
        for split in ("train", "validation", "test")
        for p in preferences.load(Source(path=DATA)).prompts(split)
    }
    assert not asked & {prompt.prompt_id for prompt in (*prompts, *look_alikes)}
