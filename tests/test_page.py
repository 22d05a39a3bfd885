import re
from dataclasses import replace

import pytest

from reward import measures, page
from reward.held_out import Counts
from reward.measures import Evaluation, NotMeasured, ProbeResult, Shift
from reward.metrics import Estimate
from reward.probes import PROBES
from reward.truth import Gold
from tests.tiny_held_out import Case, splits

SHUFFLE, _, FROZEN, *_ = PROBES
SCORES = {"helpfulness": (1.0, 0.0), "cost": (2.0, -1.0), "crime": (0.9, 0.2)}
RIGHT = Case(preferred={"helpfulness": 1.0}, unsafe=(True, False), crime=(True, False), scores=SCORES)
WRONG = replace(RIGHT, preferred={"helpfulness": 0.0})
GOLD = Gold(values={"p0-a": {"helpfulness": 1.0}, "p1-a": {"helpfulness": 0.5}}, hazards={})


def estimate(value: float, width: float = 0.05) -> Estimate:
    return Estimate(value=value, low=value - width, high=value + width, n=8)


def moved(shift: float, size: float, before: float = 0.7) -> Shift:
    return Shift(shift=estimate(shift), size=estimate(size), accuracy_before=estimate(before), accuracy=estimate(0.5))


def probed(shift: Shift) -> ProbeResult:
    counts = Counts(attempted=8, scored=7, failed=1)
    return ProbeResult(counts=counts, shifts={"instruction_following": shift, "helpfulness": shift})


def evaluation() -> Evaluation:
    """Four test pairs, three ranked right, with a ceiling of .8; a cost, a tag, and probes."""
    held = splits([RIGHT, RIGHT, RIGHT, WRONG], [RIGHT], trained=("helpfulness", "cost", "crime", "porn"))
    return Evaluation(
        run="runs/one",
        judge_sha256="0123456789abcdef",
        settings={"blur": 0.02, "seed": 3},
        data={"data/one": measures.Rows(read=9, excluded={"child_abuse": 2})},
        counts={"test_pairs": Counts(attempted=5, scored=4, failed=1, excluded=6)},
        failures={"videos/broken.mp4": "damaged at 0.5 s"},
        ranking=measures.rankings(held, {"helpfulness": 0.8}),
        harm=measures.harms(held, recall=0.95),
        label_agreement=estimate(0.7),
        calibration=measures.calibrations(held),
        probes={probe.name: probed(moved(-0.5, 0.6)) for probe in PROBES},
        gold=measures.against_gold(held, GOLD, {}, margin=0.05, recall=0.95),
    )


@pytest.fixture(scope="module")
def text() -> str:
    return page.to_markdown(evaluation())


def row(text: str, *starts: str) -> list[str]:
    """The cells of the first line that begins with these."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {' | '.join(starts)} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_accuracy_stands_beside_its_ceiling(text: str):
    assert row(text, "helpfulness", "4")[2].startswith("75.0 (")
    fairness = row(text.split("gap in points")[1], "helpfulness")
    assert fairness[-2:] == ["80.00", "-5.0"]
    assert fairness[1] == "not measured: no such pair has a label"


def test_the_agreement_of_labels_stands_with_its_number_of_videos_or_the_reason_that_there_is_none(text: str):
    assert "\n0.70 (0.65 to 0.75), 8 videos.\n" in text
    nothing = NotMeasured(not_measured="no video has both is_safe and all tags")
    without = page.to_markdown(replace(evaluation(), label_agreement=nothing))
    assert "\nnot measured: no video has both is_safe and all tags.\n" in without


def test_ties_with_a_likelihood_of_their_own_stand_beside_the_tuned_threshold(text: str):
    """theta = 5 and a scale of 1: log 4.6 = 1.53, so the differences of 1 are called ties, and none is one.

    Three times log sigmoid(1 - log 5) = -1.043 came, and once log sigmoid(-1 - log 5) = -2.680: mean -1.452.
    """
    held = splits([RIGHT, RIGHT, RIGHT, WRONG], [RIGHT], trained=("helpfulness",), thetas={"helpfulness": 5.0})
    with_ties = page.to_markdown(replace(evaluation(), ranking=measures.rankings(held, {})))
    cells = row(with_ties.split("likelihood of their own")[1], "helpfulness")
    assert (cells[1:4], cells[4][:4], cells[5][:6]) == (["5.00", "1.53", "0"], "0.0 ", "-1.45 ")
    assert "likelihood of their own" not in text


def test_what_was_published_is_marked_as_not_measured(text: str):
    assert row(text.split("SafeSora published")[1], "helpfulness") == ["helpfulness", "65.29", "not measured here"]
    assert row(text, "harmlessness") == ["harmlessness", "72.41", "not measured here"]


def test_harm_has_two_lines_and_reasons_for_what_has_none(text: str):
    cost = row(text, "cost", "8")
    assert (cost[2], cost[3][:5], cost[4], cost[5][:5]) == ("4", "1.00 ", "0", "100.0")
    assert row(text, "", "", "", "")[4] == "2"
    assert "- porn: no such video has a label" in text
    assert re.search("- violence, .*child_abuse.*: the model was not trained to tell", text)


def test_counts_and_what_was_left_out(text: str):
    assert row(text, "test pairs") == ["test pairs", "5", "4", "1", "6"]
    assert "- `data/one`: 9 rows read; excluded: 2 child abuse" in text
    assert "  - `videos/broken.mp4`: damaged at 0.5 s" in text
    assert row(text, "blur", "8") == ["blur", "8", "7", "1", "0"]
    assert "It knows 2 of the test videos" in text


def test_every_table_is_whole(text: str):
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1, block
    without = page.to_markdown(replace(evaluation(), gold=None))
    assert "exact measures" in text
    assert "exact measures" not in without


@pytest.mark.parametrize(
    ("shift", "size", "words"),
    [
        (-0.5, 0.6, "falls, as it should"),
        (0.5, 0.6, "**rises: rewards stillness**"),
        (0.02, 0.03, "**hardly moves: does not look at motion**"),
        (-0.02, 0.03, "**hardly moves: does not look at motion**"),
        (0.0, 0.5, "**no clear direction: it changes, but is not put off**"),
        (-0.07, 0.5, "**no clear direction: it changes, but is not put off**"),
    ],
)
def test_the_shortcut_is_named(shift: float, size: float, words: str):
    assert page.reading(FROZEN, probed(moved(shift, size))) == words


@pytest.mark.parametrize("shift", [-0.2, 0.2])
def test_an_interval_over_zero_has_no_direction(shift: float):
    wide = replace(moved(shift, 0.6), shift=estimate(shift, width=0.3))
    assert page.reading(FROZEN, probed(wide)).startswith("**no clear direction")


@pytest.mark.parametrize(
    ("before", "after", "width", "words"),
    [
        (0.7, 0.51, 0.03, "accuracy falls to chance"),
        (0.7, 0.49, 0.03, "accuracy falls to chance"),
        (0.7, 0.53, 0.05, "accuracy may fall to chance; 8 pairs are too few to tell"),
        (0.7, 0.47, 0.05, "accuracy may fall to chance; 8 pairs are too few to tell"),
        (0.7, 0.65, 0.05, "**accuracy stays above chance: part needs no prompt**"),
        (
            0.7,
            0.40,
            0.05,
            "**accuracy falls below chance: without its prompt the worse of two videos is liked better**",
        ),
        (0.52, 0.51, 0.05, "accuracy was not above chance before"),
    ],
)
def test_without_the_prompt_accuracy_should_fall_to_chance(before: float, after: float, width: float, words: str):
    shift = replace(moved(-0.5, 0.6, before), accuracy=estimate(after, width))
    assert page.reading(SHUFFLE, probed(shift)) == f"falls, as it should; {words}"


def test_no_reading_without_numbers():
    nothing = NotMeasured(not_measured="scores are equal")
    equal = replace(moved(0.0, 0.0), shift=nothing, size=nothing)
    assert page.reading(FROZEN, probed(equal)) == "not measured"
    assert page.reading(FROZEN, replace(probed(equal), shifts={})) == "helpfulness was not trained"
