import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from align.policy import Policy
from align.rollouts import Judges, Maker, RolloutPlan, Round, judge, read_rewrites
from align.sample import Sampler
from reward import video
from reward.files import DataError
from reward.judge import Judge
from reward.records import Prompt
from reward.rules import Flash
from tests import tiny_judge, tiny_wan

PLAN = RolloutPlan(num_per_prompt=2, num_counterfactuals=1)
PROMPTS = [Prompt(prompt_id=text, text=text, type="safety_neutral") for text in ("a red circle", "a blue square")]
REWRITES = {"a red circle": "a red circle moving left"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("rollouts")
    tiny_wan.build(home / "wan")
    tiny_judge.write_run(home)
    return home


def maker(home: Path, *, cost: float, root: Path, rules: tuple[Flash, ...] = ()) -> Maker:
    """A maker whose judge says this cost of every video."""
    shutil.copytree(home / "run", root / "run")
    judges = Judges(model=Judge.load(tiny_judge.refill(root / "run", cost=cost)), rules=rules)
    sampler = Sampler(steps=2, num_frames=tiny_wan.NUM_FRAMES, height=32, width=32)
    return Maker(policy=Policy.load(home / "wan"), sampler=sampler, judges=judges, seed=5)


def test_a_chunk_holds_each_prompts_videos_and_what_was_said(home: Path, tmp_path: Path):
    chunk = Round(tmp_path / "round", "")
    made = chunk.make(0, PROMPTS, PLAN, REWRITES, maker(home, cost=-1.0, root=tmp_path))
    assert [rollout.prompt for rollout in made] == [prompt.text for prompt in PROMPTS for _ in range(2)]
    assert [rollout.cost for rollout in made] == pytest.approx([-1.0] * 4)
    assert not any(rollout.unsafe or rollout.is_counterfactual for rollout in made)
    assert len({rollout.seed for rollout in made}) == 4
    assert chunk.rollouts(0) == made
    assert chunk.latents(0).shape == (4, 4, 6, 4, 4)


def test_the_judge_sees_the_file(home: Path, tmp_path: Path):
    chance = maker(home, cost=-1.0, root=tmp_path)
    made = Round(tmp_path / "round", "").make(0, PROMPTS[:1], PLAN, {}, chance)
    seen = [video.read(tmp_path / "round" / rollout.file) for rollout in made]
    rewards = [score.reward for score in judge(chance.judges, [PROMPTS[0].text] * 2, seen)]
    assert rewards == [rollout.reward for rollout in made]


def test_latents_are_those_of_the_video(home: Path, tmp_path: Path):
    """Compression blurs the noise that a random model makes, so each file is asked which latents it is nearest to."""
    chance, chunk = maker(home, cost=-1.0, root=tmp_path), Round(tmp_path / "round", "")
    made = chunk.make(0, PROMPTS, PLAN, {}, chance)
    decoded = chance.policy.decode(chunk.latents(0)).astype(float)
    for place, rollout in enumerate(made):
        seen = video.read(tmp_path / "round" / rollout.file).frames
        assert np.abs(decoded - seen).mean(axis=(1, 2, 3, 4)).argmin() == place


def test_a_prompt_without_a_safe_video_gets_its_counterfactual(home: Path, tmp_path: Path):
    """Only one of the two has a rewrite; it is judged by what the user asked for."""
    made = Round(tmp_path / "round", "").make(0, PROMPTS, PLAN, REWRITES, maker(home, cost=1.0, root=tmp_path))
    (extra,) = (rollout for rollout in made if rollout.is_counterfactual)
    assert (extra.prompt, extra.text) == ("a red circle", "a red circle moving left")
    assert len(made) == 5


def test_a_finished_chunk_is_not_made_again_and_anothers_is(home: Path, tmp_path: Path):
    chance = maker(home, cost=-1.0, root=tmp_path)
    Round(tmp_path / "round", "one").make(0, PROMPTS, PLAN, {}, chance)
    path = tmp_path / "round/0000.safetensors"
    written = path.stat().st_mtime_ns
    Round(tmp_path / "round", "one").make(0, PROMPTS, PLAN, {}, chance)
    assert path.stat().st_mtime_ns == written
    Round(tmp_path / "round", "two").make(0, PROMPTS, PLAN, {}, chance)
    assert path.stat().st_mtime_ns > written


def test_a_damaged_chunk_is_named(home: Path, tmp_path: Path):
    (tmp_path / "0000.safetensors").write_bytes(b"what")
    with pytest.raises(DataError, match=r"0000\.safetensors.*damaged.*remove it"):
        Round(tmp_path, "").rollouts(0)


def test_a_rule_makes_a_video_unsafe_that_the_model_finds_safe(home: Path, tmp_path: Path):
    judges = maker(home, cost=-1.0, root=tmp_path, rules=(Flash(),)).judges
    found = list(judge(judges, ["a"] * 2, [tiny_judge.flashing(), tiny_judge.still()]))
    assert found[0].cost > 0 > found[1].cost


def test_scores_of_tags_are_logits_of_those_that_were_trained(home: Path, tmp_path: Path):
    judges = maker(home, cost=-1.0, root=tmp_path).judges
    (found,) = judge(judges, ["a"], [tiny_judge.still()])
    said = judges.model(["a"], [tiny_judge.still()]).tags
    assert "child_abuse" not in found.tag_costs
    assert found.tag_costs["porn"] == pytest.approx(torch.logit(said[0, 0].double()).item())


@pytest.mark.parametrize("row", [{"prompt": "a"}, {"prompt": None, "safe": "b"}, {"prompt": "a", "safe": 3}])
def test_rewrites_need_both_texts(row: dict[str, object], tmp_path: Path):
    path = tmp_path / "rewrites.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"rewrites\.jsonl, row 1, (prompt|safe): expected a text"):
        read_rewrites(path)


def test_a_prompt_has_one_rewrite(tmp_path: Path):
    path = tmp_path / "rewrites.jsonl"
    path.write_text('{"prompt": "a", "safe": "b"}\n{"prompt": "a", "safe": "c"}\n')
    with pytest.raises(DataError, match="two rewrites of 'a'"):
        read_rewrites(path)


def test_a_finished_round_keeps_what_was_said(home: Path, tmp_path: Path):
    chunk = Round(tmp_path / "round", "")
    made = chunk.make(0, PROMPTS, PLAN, {}, maker(home, cost=-1.0, root=tmp_path))
    chunk.forget_latents()
    assert not list(chunk.folder.glob("*.safetensors"))
    lines = (chunk.folder / "rollouts.jsonl").read_text().splitlines()
    assert [json.loads(line)["reward"] for line in lines] == [rollout.reward for rollout in made]
    chunk.forget_latents()
    assert (chunk.folder / "rollouts.jsonl").read_text().splitlines() == lines
