import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tiny_wan
import torch
from diffusers import DiffusionPipeline, SchedulerMixin, UniPCMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from align import certificate, flow
from align.certificate import Certificate
from align.folder import PolicyError, fingerprint
from align.manifest import Setup
from align.policy import Lora, Policy
from align.sample import Sampler, denoise, initial_noise, render, video_seed
from align.table import Decider
from reward import formats, video
from reward.config import load
from reward.records import Prompt, Tags
from scripts import sample

SAMPLER = Sampler(
    steps=3, num_frames=tiny_wan.NUM_FRAMES, height=tiny_wan.HEIGHT, width=tiny_wan.WIDTH, guidance_scale=4.0
)
UNIPC = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
PROMPTS = ["a red circle", "a blue square on a white background", "moving left", "a circle"]
SEEDS = [1, 2, 3, 4]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.build(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def lora(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    policy = Policy.load(model, lora=Lora(rank=2))
    for parameter in policy.lora_parameters():
        parameter.data = torch.full(parameter.shape, 0.3)
    return policy.save_lora(tmp_path_factory.mktemp("lora"))


def levels(made: list[video.Video]) -> np.ndarray:
    return np.stack([one.frames for one in made]).astype(int)


# align.sample -----------------------------------------------------------------------------------------------

SANDBOX = Path(__file__).parents[1] / "sandbox/assets/base"
STOCK = """
import sys, numpy, torch
from diffusers import DiffusionPipeline

model, out, *prompts = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(model)
videos = [
    pipe(prompt, num_frames=15, height=64, width=64, num_inference_steps=2, guidance_scale=3.0,
         max_sequence_length=24, generator=torch.Generator().manual_seed(77)).frames[0]
    for prompt in prompts
]
numpy.save(out, (numpy.stack(videos) * 255).round())
assert not any(name.split(".")[0] in ("align", "reward", "sandbox") for name in sys.modules)
"""


def test_a_script_without_our_code_makes_the_same_videos(tmp_path: Path):
    """The pipeline makes one frame more than it is asked for, because this VAE does not compress time."""
    prompts = ["a red ball moving left on a black background", "a green square and a blue ring moving up"]
    command = [sys.executable, "-c", STOCK, SANDBOX, tmp_path / "stock.npy", *prompts]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    policy = Policy.load(SANDBOX)
    ours = [levels(render(policy, [prompt], [77], Sampler(steps=2, guidance_scale=3.0)))[0] for prompt in prompts]
    assert np.array_equal(ours, np.load(tmp_path / "stock.npy"))


@pytest.mark.parametrize(
    ("scheduler", "compression", "sampler", "asked"),
    [
        (UNIPC, 1, SAMPLER, 5),
        (None, 4, SAMPLER.model_copy(update={"num_frames": 5}), 5),
        (None, 1, SAMPLER.model_copy(update={"guidance_scale": 1.0}), 5),
        (UNIPC, 1, SAMPLER.model_copy(update={"negative_prompt": "a blue square"}), 5),
    ],
    ids=["unipc", "compressed time", "no guidance", "negative prompt"],
)
def test_every_kind_of_folder_samples_as_the_stock_pipeline(
    scheduler: SchedulerMixin | None, compression: int, sampler: Sampler, asked: int, tmp_path: Path
):
    model = tiny_wan.build(tmp_path, scheduler=scheduler, compression=compression)
    stock = DiffusionPipeline.from_pretrained(model)(
        "a red circle",
        negative_prompt=sampler.negative_prompt,
        num_frames=asked,
        height=32,
        width=32,
        num_inference_steps=3,
        guidance_scale=sampler.guidance_scale,
        generator=torch.Generator().manual_seed(5),
    ).frames[0]
    ours = levels(render(Policy.load(model), ["a red circle"], [5], sampler))[0]
    assert np.array_equal(ours, np.rint(stock * 255))
    assert ours.std() > 5


def test_a_video_does_not_depend_on_its_batch(model: Path):
    """Rounding in the network differs with the batch's size: by one level, and in few pixels."""
    policy = Policy.load(model)
    together = levels(render(policy, PROMPTS, SEEDS, SAMPLER))
    alone = np.concatenate([levels(render(policy, [p], [s], SAMPLER)) for p, s in zip(PROMPTS, SEEDS, strict=True)])
    backwards = levels(render(policy, PROMPTS[::-1], SEEDS[::-1], SAMPLER))[::-1]
    assert np.abs(together - alone).max() <= 1
    assert (together != alone).mean() < 0.01
    assert np.abs(together - backwards).max() <= 1


def test_prompt_and_seed_both_decide_the_video(model: Path):
    policy = Policy.load(model)
    first, again, seed, prompt = (
        levels(render(policy, [p], [s], SAMPLER))
        for p, s in (("a red circle", 1), ("a red circle", 1), ("a red circle", 2), ("a blue square", 1))
    )
    assert np.array_equal(first, again)
    assert np.abs(first - seed).mean() > 5
    assert not np.array_equal(first, prompt)


def test_transitions_are_a_chain_of_euler_steps_from_noise_to_the_clean_video(model: Path):
    policy = Policy.load(model)
    noise = initial_noise([1, 2], (4, 6, 4, 4))
    embeds, negative = policy.encode_prompts(PROMPTS[:2]), policy.encode_prompts(["", ""])
    with torch.no_grad():
        chain = list(denoise(policy, noise, embeds, negative, SAMPLER))
    assert torch.equal(chain[0].noisy, noise)
    assert [step.sigma for step in chain] == flow.schedule(3, 3.0).tolist()[:-1]
    assert chain[-1].next_sigma == 0
    for step, following in itertools.pairwise(chain):
        assert torch.equal(step.next_noisy, following.noisy)
        assert step.next_sigma == following.sigma
    for step in chain:
        start, end = (torch.full((2,), sigma) for sigma in (step.sigma, step.next_sigma))
        torch.testing.assert_close(flow.euler_step(step.noisy, step.velocity, start, end), step.next_noisy)
    assert np.array_equal(policy.decode(chain[-1].next_noisy), levels(render(policy, PROMPTS[:2], [1, 2], SAMPLER)))


def test_guidance_leads_away_from_the_negative_prompt(model: Path):
    """guided = negative + 4 (positive - negative), at the first step."""
    policy = Policy.load(model)
    noise = initial_noise([1], (4, 6, 4, 4))
    positive, negative = (policy.encode_prompts([text]) for text in ("a red circle", ""))
    with torch.no_grad():
        guided = next(denoise(policy, noise, positive, negative, SAMPLER)).velocity
        towards, away = (policy.velocity(noise, torch.ones(1), embeds) for embeds in (positive, negative))
    torch.testing.assert_close(guided, away + 4 * (towards - away))
    assert not torch.allclose(guided, towards, atol=1e-4)


def test_gradients_flow_through_sampling_to_the_lora(model: Path, lora: Path):
    policy = Policy.load(model, lora=lora)
    noise, embeds = initial_noise([1], (4, 6, 4, 4)), policy.encode_prompts(["a red circle"])
    *_, last = denoise(policy, noise, embeds, None, SAMPLER)
    last.next_noisy.square().mean().backward()
    assert all(parameter.grad is not None for parameter in policy.lora_parameters())


def test_sampling_leaves_the_scheduler_of_the_policy_alone(model: Path):
    policy = Policy.load(model)
    before = policy.pipeline.scheduler.timesteps
    render(policy, ["a circle"], [1], SAMPLER)
    assert policy.pipeline.scheduler.timesteps is before


def test_sizes_the_model_cannot_make_are_refused(model: Path):
    with pytest.raises(PolicyError, match="num_frames=7"):
        render(Policy.load(model), ["x"], [1], SAMPLER.model_copy(update={"num_frames": 7}))


def test_a_negative_prompt_without_guidance_is_refused():
    with pytest.raises(ValidationError, match="guidance_scale=1 would ignore negative_prompt"):
        Sampler(guidance_scale=1.0, negative_prompt="blur")


def test_noise_is_that_of_a_generator_with_the_seed():
    noise = initial_noise([3, 9], (4, 6, 4, 4))
    assert torch.equal(noise[1:], torch.randn(1, 4, 6, 4, 4, generator=torch.Generator().manual_seed(9)))


def test_the_seed_of_a_video_is_fixed_for_all_time():
    """The first 4 bytes of `printf '0/1/a red circle' | sha256sum`."""
    assert video_seed(0, "a red circle", 1) == 0x4263046B


@given(seed=st.integers(0, 99), prompt=st.text(max_size=5), index=st.integers(0, 99))
def test_seeds_differ_by_seed_prompt_and_index(seed: int, prompt: str, index: int):
    own = video_seed(seed, prompt, index)
    assert 0 <= own < 2**32
    assert own not in {
        video_seed(seed + 1, prompt, index),
        video_seed(seed, prompt + "a", index),
        video_seed(seed, prompt, index + 1),
    }


# scripts/sample.py ------------------------------------------------------------------------------------------


def arguments(model: Path, out: Path, *more: str) -> list[str]:
    """Settings of a small run; those given replace their like."""
    items = [f"model={model}", f"out={out}", "num_frames=6", "height=32", "width=32", "steps=2", *more]
    return list({item.split("=")[0]: item for item in items}.values())


def manifest(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text(
        "A red circle, moving LEFT!\n\n  ../../etc/passwd  \nein roter Kreis 赤い円\n赤い円", encoding="utf-8"
    )
    return f"prompts={path}"


def test_a_run_writes_videos_a_sheet_and_a_manifest(model: Path, tmp_path: Path, prompts: str):
    out = tmp_path / "out"
    sample.main(arguments(model, out, prompts, "num_per_prompt=2", "batch_size=3", "seed=7"))
    names = ["0000-a-red-circle-moving-left", "0001-etc-passwd", "0002-ein-roter-kreis", "0003"]
    files = [f"videos/{name}-{index}.mp4" for name in names for index in (0, 1)]
    lines = manifest(out)
    assert [line["file"] for line in lines] == files
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*")) == [
        "contact_sheet.png", "manifest.jsonl", *files
    ]  # fmt: skip
    assert lines[2]["prompt"] == "../../etc/passwd"
    assert {line["model_sha256"] for line in lines} == {fingerprint(model)}
    for line in lines:
        assert line["seed"] == video_seed(7, line["prompt"], line["index"])
        assert line["sha256"] == fingerprint(out / line["file"])
        assert (line["role"], line["lora_sha256"], line["steps"], line["fps"]) == ("policy", None, 2, 16.0)
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.height > 8 * 32


def test_a_video_file_tells_how_it_was_made(model: Path, lora: Path, tmp_path: Path):
    sample.main(arguments(model, tmp_path, "prompt=赤 a red circle", f"lora={lora}", "lora_scale=0.5", "fps=8"))
    (line,) = manifest(tmp_path)
    info = video.probe(tmp_path / line["file"])
    assert (info.num_frames, info.fps, info.width, info.height) == (6, 8.0, 32, 32)
    assert info.metadata["prompt"] == "赤 a red circle"
    assert info.metadata["seed"] == str(line["seed"])
    assert info.metadata["model_sha256"] == fingerprint(model)
    assert info.metadata["lora_sha256"] == fingerprint(lora)
    assert info.metadata["lora_scale"] == "0.5"


def certify(path: Path, setup: Setup, **changes: Any) -> Certificate:
    """Write a certificate that says nothing but how its videos were made."""
    fields: dict[str, Any] = {"system": "aligned", "verdict": "PASS", "lines": (), "delta": 0.05, "num_tried": 1}
    fields |= {"num_candidates": 1, "unit": "", "num_clips": 0, "num_failed": {}, "num_degenerate": 0, "sha256": {}}
    fields |= {"plan": {"seeds": [], "systems": [], "judge": None}, "prompts_sha256": (), "void_if": ()}
    fields |= {
        "decider": Decider(by="gold", verdicts="gold.jsonl"),
        "made": {"aligned": {**setup.line(), "best_of": 1}},
    }
    made = Certificate(**fields | changes)
    certificate.write(made, path)
    return made


@pytest.fixture
def certified(model: Path, lora: Path, tmp_path: Path) -> tuple[list[str], Path, Setup]:
    """Settings of a small run with a LoRA at half its strength and a certificate, which is yet to be written."""
    path, setup = tmp_path / "certificate.json", Setup.of(model, SAMPLER, dtype="float32").with_lora(lora, 0.5)
    own = (
        "prompt=a red circle",
        f"lora={lora}",
        "lora_scale=0.5",
        "steps=3",
        "guidance_scale=4",
        f"certificate={path}",
    )
    return arguments(model, tmp_path / "out", *own), path, setup


def test_a_video_names_the_certificate_that_is_about_it(certified: tuple[list[str], Path, Setup], tmp_path: Path):
    """And the reference's beside it names none."""
    settings, path, setup = certified
    made = certify(path, setup)
    sample.main([*settings, "compare=true"])
    policy, reference = manifest(tmp_path / "out")
    assert (policy["certificate"], reference["certificate"]) == (made.id, None)
    named, bare = (video.probe(tmp_path / "out" / line["file"]).metadata for line in (policy, reference))
    assert (named["certificate"], "certificate" in bare) == (made.id, False)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lora=null", "is about lora_sha256="),
        ("lora_scale=1.0", "is about lora_scale=0.5, here it is 1.0"),
        ("steps=2", "is about steps=3, here it is 2"),
        ("dtype=bfloat16", "is about dtype=float32"),
        ("certificate=missing.json", "certificate=missing.json: cannot be read"),
    ],
)
def test_a_certificate_of_other_videos_is_refused(
    certified: tuple[list[str], Path, Setup],
    setting: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    settings, path, setup = certified
    certify(path, setup)
    monkeypatch.setattr(Policy, "load", None)
    changes = [setting, "lora_scale=1.0"] if setting == "lora=null" else [setting]
    with pytest.raises(SystemExit):
        sample.main(list({item.split("=")[0]: item for item in [*settings, *changes]}.values()))
    assert message in capsys.readouterr().err


def test_a_certificate_that_is_no_pass_or_of_other_weights_is_refused(
    certified: tuple[list[str], Path, Setup], capsys: pytest.CaptureFixture[str]
):
    settings, path, setup = certified
    others = {"its verdict is FAIL": {"verdict": "FAIL"}}
    for key, value in (("model_sha256", "0"), ("lora_sha256", "0"), ("best_of", 4)):
        others[f"is about {key}={value}"] = {"made": {"aligned": {**setup.line(), "best_of": 1, key: value}}}
    for message, changes in others.items():
        certify(path, setup, **changes)
        with pytest.raises(SystemExit):
            sample.main(settings)
        assert message in capsys.readouterr().err
    path.write_text(path.read_text().replace('"delta": 0.05', '"delta": 0.01'))
    with pytest.raises(SystemExit):
        sample.main(settings)
    assert "its id is not its own" in capsys.readouterr().err


def test_a_file_holds_the_rendered_video(model: Path, tmp_path: Path):
    """Up to the loss of h264."""
    sample.main(arguments(model, tmp_path, "prompt=a red circle", "guidance_scale=4"))
    (line,) = manifest(tmp_path)
    made = render(Policy.load(model), ["a red circle"], [line["seed"]], SAMPLER.model_copy(update={"steps": 2}))
    stored = video.read(tmp_path / line["file"]).frames.astype(int)
    assert np.abs(stored.mean(axis=(1, 2)) - levels(made)[0].mean(axis=(1, 2))).max() < 4


def test_previews_lie_beside_the_videos_and_are_made_once(model: Path, tmp_path: Path):
    sample.main(arguments(model, tmp_path, "prompt=a red circle"))
    assert not list(tmp_path.rglob("*.webp"))
    sample.main(arguments(model, tmp_path, "prompt=a red circle", "preview=webp"))
    preview = tmp_path / "videos/0000-a-red-circle-0.webp"
    shown = video.read(tmp_path / "videos/0000-a-red-circle-0.mp4")
    with Image.open(preview) as image:
        assert (getattr(image, "n_frames", 1), image.size) == (len(shown.frames), (32, 32))
    written = preview.stat().st_mtime_ns
    sample.main(arguments(model, tmp_path, "prompt=a red circle", "preview=webp"))
    assert preview.stat().st_mtime_ns == written


def test_comparing_renders_both_from_the_same_noise(model: Path, lora: Path, tmp_path: Path):
    sample.main(arguments(model, tmp_path / "both", "prompt=a red circle", f"lora={lora}", "compare=true"))
    sample.main(arguments(model, tmp_path / "base", "prompt=a red circle"))
    policy, reference = manifest(tmp_path / "both")
    assert [line["file"] for line in (policy, reference)] == [
        "videos/0000-a-red-circle-0.mp4",
        "videos/0000-a-red-circle-0.reference.mp4",
    ]
    assert policy["seed"] == reference["seed"]
    assert (policy["lora_sha256"], reference["lora_sha256"]) == (fingerprint(lora), None)
    made, base, alone = (
        video.read(path).frames
        for path in (
            tmp_path / "both" / policy["file"],
            tmp_path / "both" / reference["file"],
            tmp_path / "base" / "videos/0000-a-red-circle-0.mp4",
        )
    )
    assert np.array_equal(base, alone)
    assert not np.array_equal(made, base)


def test_a_run_goes_on_where_it_stopped(model: Path, tmp_path: Path, prompts: str, capsys: pytest.CaptureFixture[str]):
    sample.main(arguments(model, tmp_path / "a", prompts))
    whole = {path.name: path.read_bytes() for path in (tmp_path / "a" / "videos").iterdir()}
    lost, damaged, *kept = sorted((tmp_path / "a" / "videos").iterdir())
    lost.unlink()
    damaged.write_bytes(b"half a video")
    untouched = [path.stat().st_mtime_ns for path in kept]
    sample.main(arguments(model, tmp_path / "a", prompts, "batch_size=1"))
    assert capsys.readouterr().out.splitlines()[-1].endswith("4 videos, 2 of them new")
    assert [path.stat().st_mtime_ns for path in kept] == untouched
    assert {path.name for path in (tmp_path / "a" / "videos").iterdir()} == set(whole)
    assert len(manifest(tmp_path / "a")) == 4


def test_a_finished_run_loads_no_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sample.main(arguments(model, tmp_path, "prompt=a red circle"))
    monkeypatch.setattr(Policy, "load", None)
    sample.main(arguments(model, tmp_path, "prompt=a red circle"))


def test_more_prompts_can_be_added_under_the_same_settings(model: Path, tmp_path: Path):
    sample.main(arguments(model, tmp_path, "prompt=a red circle"))
    sample.main(arguments(model, tmp_path, "prompt=a blue square"))
    assert [line["prompt"] for line in manifest(tmp_path)] == ["a blue square", "a red circle"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("steps=3", "was made with steps=2, now it is 3"),
        ("seed=1", "was made with seed="),
        ("dtype=bfloat16", "was made with dtype=float32"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(
    model: Path, tmp_path: Path, change: str, message: str, capsys: pytest.CaptureFixture[str]
):
    sample.main(arguments(model, tmp_path, "prompt=a red circle"))
    before = (tmp_path / "manifest.jsonl").read_bytes()
    with pytest.raises(SystemExit):
        sample.main(arguments(model, tmp_path, "prompt=a red circle", change))
    assert message in capsys.readouterr().err
    assert (tmp_path / "manifest.jsonl").read_bytes() == before


def test_other_settings_are_refused_for_other_prompts_too(
    model: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    sample.main(arguments(model, tmp_path, "prompt=a red circle"))
    with pytest.raises(SystemExit):
        sample.main(arguments(model, tmp_path, "prompt=a blue square", f"lora={lora}"))
    assert "was made with lora_sha256=None" in capsys.readouterr().err


def test_a_broken_manifest_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "manifest.jsonl").write_text('{"file": "a"}\n')
    with pytest.raises(SystemExit):
        sample.main(arguments(model, tmp_path, "prompt=x"))
    assert "manifest.jsonl: cannot be read" in capsys.readouterr().err


def test_prompts_of_safesora_are_rendered_but_never_those_of_child_abuse(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "eval-prompt.json.gz"
    harmful = Tags(child_abuse=True)
    formats.write_prompts(
        path,
        [
            Prompt(prompt_id="a", text="a red circle", type="safety_neutral"),
            Prompt(prompt_id="b", text="forbidden", type="safety_critical", tags=harmful),
        ],
    )
    sample.main(arguments(model, tmp_path / "out", f"prompts={path}"))
    assert [line["prompt"] for line in manifest(tmp_path / "out")] == ["a red circle"]
    assert "2 rows, 1 different prompts, dropped: 1 child_abuse" in capsys.readouterr().out


def bad_requests() -> dict[str, tuple[list[str], str]]:
    return {
        "no prompts file": (["prompts=missing.txt"], "prompts=missing.txt: cannot be read"),
        "no data file": (["prompts=missing.json"], "missing.json"),
        "no prompt": (["prompt= "], "prompt: holds no prompt"),
        "two sources": (["prompt=x", "prompts=other.txt"], "give one of them"),
        "scale of nothing": (["prompt=x", "lora_scale=0.5"], "lora_scale=0.5: needs lora=FILE"),
        "nothing to compare": (["prompt=x", "compare=true"], "compare=true: needs lora=FILE"),
        "no lora": (["prompt=x", "lora=missing"], "missing: expected a LoRA"),
        "odd height": (["prompt=x", "height=40"], "height=40: this model needs a multiple of 16"),
        "odd frames": (["prompt=x", "num_frames=7"], "num_frames=7: this model makes 2, 4, 6, 8"),
        "no model": (["prompt=x", "model=missing"], "missing: no such folder"),
        "odd device": (["prompt=x", "device=tpu"], "device=tpu: expected cpu, cuda or cuda:N"),
        "unknown key": (["prompt=x", "guidence_scale=3"], "did you mean 'guidance_scale'?"),
        "no number": (["prompt=x", "steps=many"], "steps"),
    }


@pytest.mark.parametrize(("request_", "message"), bad_requests().values(), ids=bad_requests())
def test_bad_requests_are_refused_before_a_model_is_loaded(
    model: Path,
    tmp_path: Path,
    request_: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(Policy, "load", None)
    with pytest.raises(SystemExit) as ended:
        sample.main(arguments(model, tmp_path / "out", *request_))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_lora_of_another_model_is_refused_before_a_model_is_loaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "pytorch_lora_weights.safetensors"
    safetensors.torch.save_file({"transformer.blocks.7.attn1.to_q.lora_A.weight": torch.zeros(2, 24)}, file)
    monkeypatch.setattr(Policy, "load", None)
    with pytest.raises(SystemExit):
        sample.main(arguments(model, tmp_path / "out", "prompt=x", f"lora={file}"))
    assert "blocks.7.attn1.to_q.lora_A.weight: no such place" in capsys.readouterr().err


def test_prompt_files_that_are_empty_or_repeat_themselves_are_refused(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    config = sample.SampleConfig(prompts=path)
    path.write_text("\n \n")
    with pytest.raises(sample.SampleError, match="holds no prompt"):
        sample.read_prompts(config)
    path.write_text("a\n\nb\na\n")
    with pytest.raises(sample.SampleError, match="line 4 repeats line 1"):
        sample.read_prompts(config)


def test_the_shipped_settings_load_and_the_shipped_prompts_are_sixteen():
    root = Path(__file__).parents[1]
    wan = load(sample.SampleConfig, root / "configs/sample/wan2.1-1.3b.yaml")
    assert (wan.num_frames, wan.height, wan.width, wan.dtype) == (81, 480, 832, "bfloat16")
    shipped = sample.SampleConfig(prompts=root / sample.PROMPTS)
    assert len(sample.read_prompts(shipped)) == 16
