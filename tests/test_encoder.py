import dataclasses
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, XCLIPModel

from reward.run import Run, Stop
from sandbox import encoder, footage, gold, world
from sandbox.encoder import EncoderConfig, Studio
from sandbox.footage import Footage, Part
from sandbox.text import ANSWERS, answers, make_tokenizer
from sandbox.vae import decode_frames

BASE = Path(__file__).parents[1] / "sandbox/assets/base"


def named(indices: list[int]) -> dict[str, str | None]:
    return {name: options[index] for (name, options), index in zip(ANSWERS.items(), indices, strict=True)}


# What is known of takes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "hazard", "name", "answer"),
    [
        ("a red bar moving left on a black background with a dagger", True, "glyph", "dagger"),
        ("a red bar moving left on a black background with a dagger", False, "glyph", None),
        ("a red bar moving left on a black background at a pirates' duel", True, "glyph", "dagger"),
        ("a red bar moving left on a black background with an arrow", False, "glyph", "arrow"),
        ("a red bar moving left on a black background at a disco", True, "effect", "strobe"),
        ("a red bar moving left on a black background in a thunderstorm", False, "effect", None),
        ("a red bar moving left on a black background fading in", False, "effect", "fade"),
    ],
)
def test_what_is_shown_is_what_the_take_shows(text: str, hazard: bool, name: str, answer: str | None):
    told = named(encoder.shown(world.film(world.parse(text), np.random.default_rng(0), hazard=hazard)))
    assert told[name] == answer
    assert (told["colour 1"], told["motion"]) == ("red", "left")


def test_spots_are_where_things_are_drawn():
    """A blue disc on black: its centre of mass, in units of 16 pixels from the middle, and its radius."""
    request = world.parse("a small blue disc moving right on a black background with a dagger")
    take = world.film(request, np.random.default_rng(1), hazard=False)
    frames = world.render(take).astype(float)
    mass = frames[..., 2] - frames[..., 0] > 80
    x, y, radius = encoder._spots(take).T
    where = [np.argwhere(frame).mean(0) + 0.5 for frame in mass]
    assert np.stack([x, y], -1) * 16 + 32 == pytest.approx(np.array(where)[:, ::-1], abs=0.5)
    assert radius * 16 == pytest.approx(np.full(16, world.RADIUS["small"]))


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio(EncoderConfig(base=BASE, young=BASE / "transformer", mixed_precision="no"), torch.device("cpu"))


Filmed = tuple[Part, list[world.Take], np.ndarray]


@pytest.fixture(scope="module")
def filmed() -> Filmed:
    return footage.film_takes(Part(start=0, num_clips=6, seed=0))


@pytest.fixture(scope="module")
def kept(studio: Studio, filmed: Filmed) -> Footage:
    return studio.keep(filmed)


def levels(studio: Studio, latents: torch.Tensor) -> np.ndarray:
    pixels = decode_frames(studio.vae, latents.float().transpose(1, 2).flatten(0, 1)).unflatten(0, (len(latents), -1))
    return ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 1, 3, 4, 2).numpy()


def test_repainted_takes_show_what_they_showed(studio: Studio, kept: Footage, filmed: Filmed):
    """Gold reads each attribute, and hazards too, from clips that differ from those that were filmed.

    By the base model in both halves: a young one is not shipped.
    """
    clean, again = kept.tensors["clean"], kept.tensors["repainted"]
    assert (clean.float() - again.float()).std((1, 2, 3, 4)).min() > 0.05
    for take, clip in zip(filmed[1], levels(studio, again), strict=True):
        plain, seen = dataclasses.replace(take.request, effect=None, glyph=None), gold.look(clip)
        assert set(gold.follow(plain, seen).values()) == {1.0}
        assert (seen.flash, seen.glyph) == (take.strobe is not None, take.glyph)
    assert {take.unsafe for take in filmed[1]} == {False, True}
    assert kept.tensors["by_young"].tolist() == [False] * 3 + [True] * 3


def test_a_part_of_one_take_is_repainted(studio: Studio):
    """There is none for the second generator."""
    kept = studio.keep(footage.film_takes(Part(start=500, num_clips=1, seed=0)))
    assert kept.tensors["repainted"].shape == kept.tensors["clean"].shape


def test_a_part_is_repainted_the_same_way_each_time(studio: Studio, filmed: Filmed, kept: Footage):
    assert torch.equal(studio.keep(filmed).tensors["repainted"], kept.tensors["repainted"])
    other = studio.keep((dataclasses.replace(filmed[0], start=500), *filmed[1:]))
    assert not torch.equal(other.tensors["repainted"], kept.tensors["repainted"])


# Captions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_rival_asks_for_something_else(number: int):
    """As many answers differ as were to be changed, each to another answer of the same question."""
    rng = np.random.default_rng(number)
    for _ in range(50):
        request = world.sample_training_request(rng)
        other = encoder.rival(request, number, rng)
        before, after = named(answers(request)), named(answers(other))
        changed = [name for name in ANSWERS if before[name] != after[name]]
        assert len(changed) == number
        assert all(before[name] and after[name] for name in changed)
        assert world.parse(world.caption(other, rng)) == other
        assert not world.is_held_out(other)
        assert len({thing.colour for thing in other.things}) == len(other.things)


@pytest.mark.parametrize(
    ("text", "required"),
    [
        ("a red bar moving left on a black background", 5),
        ("a small red bar moving left on a black background", 6),
        ("a red bar and a blue ring moving left on a black background", 6),
        ("a red bar moving left on a black background with a dagger", 6),
        ("a red bar moving left on a black background at a pirates' duel", 5),
        ("a red bar moving left on a black background under strobe lights", 5),
        ("a red bar moving left on a black background at a disco", 4),
    ],
)
def test_only_what_a_caption_asks_for_is_required(text: str, required: int):
    """Colour, shape, motion, background and number of things; no background under changing light."""
    assert sum(encoder.requires(world.parse(text))) == required


def test_the_share_of_what_is_shown_by_hand():
    """Of a red bar that moves left on black with a dagger, a take without the dagger shows five of six."""
    texts = ["a red bar moving left on a black background with a dagger", "a blue bar rising on a beige background"]
    requests = [world.parse(text) for text in texts]
    asked = encoder.ask(requests, make_tokenizer(end_last=True), np.random.default_rng(0))
    takes = [world.film(request, np.random.default_rng(0), hazard=False) for request in requests]
    shares = asked.shares(torch.tensor([encoder.shown(take) for take in takes]))
    assert shares.shape == (2, 2, 1 + encoder.NUM_RIVALS)
    # Its own; and of what the next one asks for: the shape and the number, or these and a dagger that is not there.
    assert shares[:, :, 0].tolist() == [pytest.approx([5 / 6, 1]), pytest.approx([2 / 5, 2 / 6])]
    assert shares[0, 1].tolist() == pytest.approx([1, 4 / 5, 3 / 5, 2 / 5])


def test_the_end_mark_is_the_largest_token():
    """There X-CLIP reads a text: at any other token it would not know the words behind it."""
    tokenizer = make_tokenizer(end_last=True)
    ids = tokenizer("a red bar moving left on a black background").input_ids
    assert ids[-1] == tokenizer.eos_token_id == max(tokenizer.get_vocab().values())
    assert make_tokenizer().eos_token_id == 1  # the base model's
    marked = tokenizer("a red bar </S> moving left on a black background", split_special_tokens=True).input_ids
    assert marked == ids  # nobody ends a text early for the judge, and goes on for the generator


# Damage -----------------------------------------------------------------------------------------------------


def draw(**settings: float) -> encoder.Damage:
    config = EncoderConfig().model_copy(update=settings)
    return encoder.draw_damage(config, 64, torch.Generator().manual_seed(0))


def test_without_damage_a_take_stays_as_it_is(studio: Studio, kept: Footage):
    latents = kept.tensors["clean"][:2].float()
    none = encoder.draw_damage(EncoderConfig(damaged=0.0), 2, torch.Generator().manual_seed(0))
    assert not none.amount.any()
    pixels = encoder.damaged(studio.vae, latents, none, torch.Generator())
    ours = ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 1, 3, 4, 2).numpy()
    np.testing.assert_array_equal(ours, levels(studio, latents))


def test_damage_is_told_as_shares_of_the_most():
    found = draw(damaged=1.0)
    assert found.amount.amin() == 0
    assert 0.9 < found.amount.amax() <= 1
    torch.testing.assert_close(found.noise, found.amount[:, 0] * 0.6)
    torch.testing.assert_close(found.ghost, found.amount[:, 1] * 0.4)
    for column in range(4):  # half of the damaged ones are spared each kind
        assert 0.3 < (found.amount[:, column] == 0).float().mean() < 0.7
    still = found.amount[:, 2] == 0
    assert (found.instants[still] == torch.arange(16)).all()
    assert (found.instants[~still] != torch.arange(16)).any()
    assert (found.others != found.instants).all()
    whole = found.amount[:, 3] == 0
    assert not found.pieces[whole].any()


def test_pieces_are_as_large_as_tokens_of_the_base_model():
    pieces = draw(damaged=1.0, most_pieces=1.0).pieces
    tokens = pieces.unfold(1, 2, 2).unfold(2, 4, 4).unfold(3, 2, 2).flatten(4).float().mean(-1)
    assert tokens.unique().tolist() == [0, 1]
    assert tokens.shape == (64, 8, 2, 4)
    config = json.loads((BASE / "transformer/config.json").read_text())
    assert tuple(config["patch_size"]) == encoder.TOKEN


def test_pieces_show_another_instant_and_ghosts_mix_it_in(studio: Studio, kept: Footage):
    latents = kept.tensors["clean"][:1].float()
    none = encoder.draw_damage(EncoderConfig(damaged=0.0), 1, torch.Generator().manual_seed(0))
    other = latents[:, :, none.others[0]]
    for change, expected in (
        ({"pieces": torch.ones_like(none.pieces)}, other),
        ({"ghost": torch.tensor([0.25])}, 0.75 * latents + 0.25 * other),
        ({"instants": none.others}, other),
    ):
        found = encoder.damaged(studio.vae, latents, dataclasses.replace(none, **change), torch.Generator())
        truth = decode_frames(studio.vae, expected.transpose(1, 2).flatten(0, 1))
        torch.testing.assert_close(found[0], truth)


# Losses and training ----------------------------------------------------------------------------------------


def test_right_names_cost_nothing():
    truth = torch.zeros(1, len(ANSWERS), dtype=torch.long)
    logits = torch.cat([torch.eye(len(options))[0] * 50 for options in ANSWERS.values()])[None]
    assert encoder.name_loss(logits, truth).item() == pytest.approx(0, abs=1e-6)
    truth[0, 4] = 1
    assert encoder.name_loss(logits, truth).item() == pytest.approx(50, rel=1e-4)


CAPTIONS = torch.stack([torch.eye(3)[[0, 2]], torch.eye(3)[[1, 2]]])
"""Of two videos along x and y: their own, and rivals along z."""


@pytest.mark.parametrize(("fits", "among"), [([0.5, 0.5], [4, 4]), ([1.0, 0.5], [3, 4])])
def test_contrast_by_hand(fits: list[float], among: list[int]):
    """Two videos, each with a rival: of four captions, and of two videos, one fits; the scale is ln 3.

    Video to caption: 3 of 3 + 1 + 1 + 1 = -ln(1/2), or of 3 + 1 + 1 if its rival fits as well. Caption to video: 3 of
    3 + 1 = -ln(3/4).
    """
    shares = torch.tensor([[1.0, fits[0]], [1.0, fits[1]]])
    found = encoder.contrast(torch.eye(3)[:2], CAPTIONS, shares, torch.tensor(3.0).log()).item()
    expected = (np.mean([np.log((2 + number) / 3) for number in among]) + np.log(4 / 3)) / 2
    assert found == pytest.approx(expected)


def test_the_next_take_is_the_one_behind():
    assert encoder.and_the_next(torch.arange(3)).tolist() == [[0, 1, 2], [1, 2, 0]]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> encoder.Trainer:
    """Of takes that are known by a first latent of their own: even if clean, odd if repainted."""
    out = tmp_path_factory.mktemp("trainer")
    config = EncoderConfig(
        out=out, base=BASE, young=BASE / "transformer", num_clips=6, batch_size=6, damaged=1.0, mixed_precision="no"
    )
    made = encoder.Trainer(config, Run(folder=out), make_tokenizer(end_last=True), Stop())
    made.film.clean[:, 0, 0, 0, 0] = 2 * torch.arange(6)
    made.film.repainted[:, 0, 0, 0, 0] = 2 * torch.arange(6) + 1
    return made


def test_a_step_tells_of_what_it_shows(trainer: encoder.Trainer):
    """Places are those of the instants that are shown; the damage is not known of what the young one has repainted."""
    film, seen = trainer.film, set()
    for step in range(16):
        batch = trainer.draw_batch(step)
        mark = batch.latents[:, 0, 0, 0, 0].int()
        for row, (pick, repainted) in enumerate(zip((mark // 2).tolist(), (mark % 2).tolist(), strict=True)):
            assert torch.equal(batch.seen[row], film.seen[pick])
            assert batch.asked[row].tolist() == answers(film.requests[pick])
            assert torch.equal(batch.spots[row], film.spots[pick][batch.damage.instants[row]])
            assert batch.known[row].item() is not bool(repainted and film.by_young[pick])
            seen.add((pick, repainted))
        assert torch.equal(trainer.draw_batch(step).tokens, batch.tokens)
    assert len(seen) == 12


def settings(out: Path) -> list[str]:
    sizes = ["num_clips=6", "num_steps=4", "batch_size=4", "save_every=2", "log_every=1"]
    return [*sizes, f"base={BASE}", f"young={BASE / 'transformer'}", f"out={out}"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encoder") / "run"
    assert encoder.main(settings(out)) == 0
    return out


def test_a_stopped_training_goes_on_to_the_same_bits(straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stopped after the third step, between two saves; the takes are not filmed again."""
    out, step = tmp_path / "run", encoder.Trainer._step

    def step_and_signal(self: encoder.Trainer, number: int) -> dict[str, torch.Tensor]:
        if number == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(encoder.Trainer, "_step", step_and_signal)
        assert encoder.main(settings(out)) == 143
    assert max(path.name for path in (out / "checkpoints").iterdir()) == "00000003"
    assert not (out / "model").exists()
    (film,) = (out / "film").iterdir()
    filmed = film.stat().st_mtime_ns
    assert encoder.main(settings(out)) == 0
    assert film.stat().st_mtime_ns == filmed
    assert (out / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    models = [run / "model/model.safetensors" for run in (out, straight)]
    assert models[0].read_bytes() == models[1].read_bytes()
    starts = json.loads((out / "provenance.json").read_text())
    assert [list(start["inputs"]) for start in starts] == [[str(BASE), str(BASE / "transformer")]] * 2


def test_a_young_transformer_that_is_not_there_is_named(tmp_path: Path):
    given = [line for line in settings(tmp_path / "run") if not line.startswith("young")]
    with pytest.raises(SystemExit, match="nowhere: named as an input, but there is no such file or folder"):
        encoder.main([*given, "young=nowhere"])


def test_a_finished_run_is_left_alone(straight: Path):
    before = (straight / "model/model.safetensors").stat().st_mtime_ns
    assert encoder.main(settings(straight)) == 0
    assert (straight / "model/model.safetensors").stat().st_mtime_ns == before


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path):
    with pytest.raises(SystemExit, match=r"step \d: not finite: .*; lower learning_rate"):
        encoder.main([*settings(tmp_path / "run"), "learning_rate=1e30"])


@torch.no_grad()
def test_the_encoder_is_saved_as_a_folder_that_transformers_opens(straight: Path):
    """And what transformers says of a video and texts is what it was trained to say."""
    folder = str(straight / "model")
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert type(model) is XCLIPModel
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    frames = [np.full((64, 64, 3), level, np.uint8) for level in (0, 255)]
    pixels = processor(frames, input_data_format="channels_last", return_tensors="pt").pixel_values
    assert (pixels.amin().item(), pixels.amax().item(), tuple(pixels.shape)) == (-1.0, 1.0, (2, 3, 64, 64))
    tokens = tokenizer(["a red bar", "a blue bar"], padding="max_length", max_length=24, return_tensors="pt").input_ids
    video = pixels.repeat(8, 1, 1, 1)[None]
    theirs = model(input_ids=tokens, pixel_values=video).logits_per_video
    shown, asked = encoder.embed(model, video, tokens)
    ours = torch.cosine_similarity(shown.mean(1), asked) * model.logit_scale.exp()
    torch.testing.assert_close(ours[None], theirs)
    assert not torch.allclose(asked[0], asked[1])
