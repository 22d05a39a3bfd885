import io
import os
import re
import shutil
from collections.abc import Generator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import headless
import pytest
import tiny_history
import tiny_report
from headless import Browser
from PIL import Image

from align import history
from align.findings import Evaluated
from scripts import report
from scripts.report import Page, ReportConfig

NETWORK = re.compile(r"""(?:src|href|action|poster)=(?!["'](?:#|data:))|url\(|@import|https?://""")


class Reader(HTMLParser):
    """Elements with their attributes, and all text outside scripts and styles."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@dataclass(frozen=True, kw_only=True)
class Made:
    """A report, and what was printed."""

    run: Path
    page: Page
    printed: str

    @property
    def html(self) -> str:
        return (self.run / "report" / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The report of a run with everything but an evaluation of its reward model."""
    run = tiny_report.write(tmp_path_factory.mktemp("run"))
    tiny_report.certify(run, "aligned", 0.3)
    tiny_report.certify(run, "frozen", 0.3)
    with redirect_stdout(io.StringIO()) as printed:
        report.main([str(run)])
    return Made(run=run, page=report.make_page(ReportConfig(run=run)), printed=printed.getvalue())


# What it says -----------------------------------------------------------------------------------------------


def test_three_lines_and_the_path_are_printed(made: Made):
    safety, helpfulness, proven, path = made.printed.splitlines()
    assert safety.startswith("SAFER: of 12 red-team prompts")
    assert helpfulness.startswith("MORE HELPFUL: on 12 harmless prompts")
    assert proven.startswith("PASS: The certificate passes at 95.0 % confidence")
    assert path == f"{made.run}/report/index.html"


def test_a_system_that_shows_nothing_wins_nowhere(made: Made):
    (frozen,) = [found for found in made.page.findings if found.system == "frozen"]
    heads = [sentence.split(":")[0] for sentence in (frozen.safety, frozen.helpfulness, frozen.look_alikes)]
    assert heads == ["NO SAFETY WIN", "LESS HELPFUL", "REFUSES MORE"]
    assert [one.standing for one in frozen.claims] == ["FAIL"]
    lines = "\n".join(report.in_three_lines(replace(made.page, findings=[frozen])))
    assert not re.search("SAFER|MORE|PASS", lines)
    assert "NO SAFETY WIN: " in lines
    assert "FAIL: " in lines


def test_the_page_is_about_the_lora_of_its_run(made: Made, tmp_path: Path):
    assert ([found.system for found in made.page.findings], made.page.warnings) == (["aligned", "frozen"], [])
    run = shutil.copytree(made.run, tmp_path / "run")
    evaluated, told = Evaluated.read(run / "evaluation"), history.read(run)
    lora = run / "lora" / "pytorch_lora_weights.safetensors"
    lora.write_bytes(b"trained again")
    assert report.order(evaluated, told)[1][0].startswith(f"No system of {run}/evaluation uses {lora}")
    lora.unlink()
    assert report.order(evaluated, told)[1][0].startswith(f"{lora} does not exist yet")


def test_what_was_not_made_is_named_with_its_command(made: Made, tmp_path: Path):
    assert "python -m reward.evaluate judge" in Reader(made.html).text
    run = tiny_history.write(tmp_path / "run")
    report.main([str(run), f"out={tmp_path}/page.html"])
    text = Reader((tmp_path / "page.html").read_text()).text
    assert f"python scripts/evaluate.py FILE.yaml out={run}/evaluation" in text
    assert "Training has not ended" in text


def test_only_the_reference_compares_nothing(tmp_path: Path):
    run = tiny_report.write(tmp_path, tiny_report.clips(base=10))
    names, warnings = report.order(Evaluated.read(run / "evaluation"), history.read(run))
    assert (names, warnings) == (["base"], ["Only base was evaluated, so that nothing is compared."])


# What it is -------------------------------------------------------------------------------------------------


def test_prompts_are_text_and_nothing_else(made: Made):
    read = Reader(made.html)
    assert read.text.count(tiny_report.EVIL) == 1
    assert len(read.all("script")) == 1
    assert all(name in ("id", "class") or not name.startswith("on") for _, each in read.elements for name in each)
    labels = [each.get("aria-label") for each in read.all("video")]
    assert f"base, safe: {tiny_report.EVIL}" in labels


def test_it_asks_nothing_of_the_network(made: Made):
    without_data = re.sub(r"data:[a-z0-9/]+;base64,[A-Za-z0-9+/=]*", "data:", made.html)
    assert not NETWORK.findall(without_data)
    (policy,) = [each["content"] for each in Reader(made.html).all("meta") if "http-equiv" in each]
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; media-src data:;")


def test_all_can_be_read_without_seeing_it(made: Made):
    read = Reader(made.html)
    assert all(picture["alt"] for picture in read.all("img"))
    assert all(each.get("scope") for each in read.all("th"))
    assert all(each.get("aria-label") for each in read.all("video"))
    ids = [each["id"] for _, each in read.elements if "id" in each]
    assert len(set(ids)) == len(ids)
    for word in ("Play anyway", "Play"):
        names = [
            each["aria-label"] or ""
            for each in read.all("button")
            if (each.get("aria-label") or "").startswith(f"{word}: ")
        ]
        assert len(set(names)) == len(names) > 0, "each says of which clip it is, after what is written on it"
    assert {each["href"] for each in read.all("a")} <= {f"#{each}" for each in ids}


# What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["missing"], "run"),
        (["RUN", "evaluation=missing"], "evaluation"),
        (["RUN", "max_megabytes=0"], "max_megabytes"),
        (["RUN/lora"], "config.yaml"),
        (["RUN", "evaluation=RUN/lora", "certificates=[RUN/config.yaml]"], "needs the evaluation"),
        (["RUN", "certificates=[RUN/config.yaml]"], "config.yaml: cannot be read as Certificate"),
    ],
)
def test_bad_requests_are_refused(made: Made, items: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        report.main([item.replace("RUN", str(made.run)) for item in items])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


# In a browser -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Generator[Browser]:
    if headless.CHROMIUM is None:
        pytest.skip("needs chromium: apt-get install chromium")
    with headless.browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def opened(browser: Browser, made: Made, **how: Any) -> None:
    browser.open(made.run / "report" / "index.html", **how)
    browser.run("document.querySelector('#clips').scrollIntoView()")


FIRST = "document.querySelector('.row:not([hidden]) .clip:not([data-flashes]) video')"
FLASHING = "document.querySelector('.row:not([hidden]) .clip[data-flashes]')"
BUTTON = f"""(() => {{
    const button = {FLASHING}.querySelector('.flash');
    return [button.textContent, button.getAttribute('aria-label'), button.getAttribute('aria-pressed')];
}})()"""
NUM_SHOWN = "document.querySelectorAll('.row:not([hidden])').length"


def choose(browser: Browser, name: str, value: str) -> None:
    """Set a filter as a person would."""
    browser.run(f"""(() => {{
        const field = document.getElementById("{name}");
        field.value = "{value}";
        for (const type of ["input", "change"]) field.dispatchEvent(new Event(type, {{ bubbles: true }}));
    }})()""")


def test_clips_play_but_those_that_flash(browser: Browser, made: Made):
    opened(browser, made)
    browser.wait_for(f"!{FIRST}.paused && {FIRST}.currentTime > 0.1 && {FIRST}.videoWidth === 16")
    assert browser.run(f"{FLASHING}.querySelector('video').src") == ""
    about = browser.run(f"{FLASHING}.querySelector('.flash').dataset.about")
    assert browser.run(BUTTON) == ["Play anyway", f"Play anyway: {about}", "false"]
    browser.run(f"{FLASHING}.querySelector('.flash').click()")
    browser.wait_for(f"{FLASHING}.querySelector('video').currentTime > 0.1")
    assert browser.run(BUTTON) == ["Stop", f"Stop: {about}", "true"]
    browser.press("Escape")
    assert browser.run(BUTTON) == ["Play anyway", f"Play anyway: {about}", "false"]
    assert browser.run("[...document.querySelectorAll('video')].every((video) => video.paused)")
    assert (browser.complaints, {url.split(":")[0] for url in browser.requests}) == ([], {"file", "data"})


def test_nothing_moves_by_itself_where_less_motion_is_wanted(browser: Browser, made: Made):
    opened(browser, made, prefers_reduced_motion="reduce")
    browser.run("new Promise((done) => setTimeout(done, 300))")
    assert browser.run("[...document.querySelectorAll('video')].every((video) => video.paused)")
    browser.run("document.querySelector('.row:not([hidden]) .toggle').click()")
    browser.wait_for("[...document.querySelectorAll('video')].some((video) => video.currentTime > 0.1)")
    assert browser.complaints == []


def test_filters_choose_prompts_and_outcomes(browser: Browser, made: Made):
    opened(browser, made)
    assert browser.run(NUM_SHOWN) == 24
    browser.run("document.getElementById('more').click()")
    assert browser.run(NUM_SHOWN) == 28
    choose(browser, "kind", "red-team")
    assert browser.run(NUM_SHOWN) == 12
    choose(browser, "outcome", "unsafe → safe")
    assert browser.run(NUM_SHOWN) == 10
    assert browser.run("document.getElementById('shown').textContent") == "10 of 10 prompts shown, chosen from 28"
    choose(browser, "system", "frozen")
    assert browser.run("document.getElementById('outcome').value") == ""
    choose(browser, "outcome", "unsafe → shows nothing")
    choose(browser, "words", "NUMBER 3")
    assert browser.run(NUM_SHOWN) == 1
    systems = "[...document.querySelectorAll('.row:not([hidden]) .clip:not([hidden])')].map((e) => e.dataset.system)"
    assert browser.run(systems) == ["base", "frozen"]


def test_arrows_go_from_prompt_to_prompt(browser: Browser, made: Made):
    opened(browser, made)
    browser.run("document.querySelector('.row:not([hidden]) .toggle').focus()")
    place = "[...document.querySelectorAll('.row')].indexOf(document.activeElement.closest('.row'))"
    before = browser.run(place)
    browser.press("ArrowDown")
    assert browser.run(place) == before + 1
    browser.press("ArrowUp")
    assert browser.run(place) == before


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_it_can_be_seen_at_a_desk_and_on_a_phone(browser: Browser, made: Made, tmp_path: Path, width: int, height: int):
    opened(browser, made, width=width, height=height)
    browser.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as image:
        assert (image.format, image.size) == ("PNG", (width, height))
        assert len(image.convert("L").getcolors() or ()) > 20, "text and clips, not one colour"


def test_a_browser_that_does_not_answer_is_not_waited_for():
    (reads, asks), (answers, writes) = os.pipe(), os.pipe()
    silent = Browser(asks, answers, patience_seconds=0.05)
    with pytest.raises(TimeoutError, match=r"Page\.enable: no answer from the browser within 0\.05 s"):
        silent.ask("Page.enable")
    silent.close()
    os.close(reads)
    os.close(writes)


# WCAG 2.2's ratio of text to what is behind it, the lowest of all that is shown.
CONTRAST = """(() => {
    const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const linear = (part) => part <= 10.31 ? part / 3294.6 : ((part / 255 + 0.055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b) + 0.05;
    const behind = (element) => {
        const found = parts(getComputedStyle(element).backgroundColor);
        return found[3] === 0 ? behind(element.parentElement) : found;
    };
    const ratio = (element) => {
        const both = [light(parts(getComputedStyle(element).color)), light(behind(element))];
        return Math.max(...both) / Math.min(...both);
    };
    const texts = "p, li, a, th, td, caption, figcaption, .mark, .quiet, .note, button, select, label, summary, pre";
    return Math.min(...[...document.querySelectorAll(texts)].map(ratio));
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_can_be_read_in_the_light_and_in_the_dark(browser: Browser, made: Made, scheme: str):
    opened(browser, made, width=390, height=844, prefers_color_scheme=scheme)
    assert browser.run("document.documentElement.scrollWidth") == 390
    page = browser.run("getComputedStyle(document.body).backgroundColor")
    assert page == {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 20, 24)"}[scheme]
    assert browser.run(CONTRAST) >= 4.5
