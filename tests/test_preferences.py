import gzip
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_safesora import Json, label_row, pair_row, prompt_row, tags, touch, video_row, write

from reward import preferences
from reward.config import ConfigError
from reward.files import DataError
from reward.preferences import Source, load, summarise
from reward.records import FIRST, SECOND, TIE

ROOT = Path(__file__).parents[1]
CSV = """\
path_A,path_B,prompt,VQ,MQ,TA,fps_A,num_frames_A,fps_B,num_frames_B
videos/1_A.mp4,./videos/1_B.mp4,"a ball, rolling",B,B,A,24.0,126.0,30.0,152.0
videos/2_A.mp4,./videos/2_B.mp4,a box,same,invalid,A,24.0,144.0,24.0,128.0
videos/3_A.mp4,./videos/3_B.mp4,a cup,A,same,same,24.0,128.0,16.0,60.0
"""


@pytest.fixture
def safesora(tmp_path: Path) -> Path:
    """A folder as SafeSora has it: five training pairs of three prompts, two test pairs, two prompts to evaluate."""
    train = [pair_row("p1"), pair_row("p1", "v0", "v2"), pair_row("p2"), pair_row("p2", "v1", "v2"), pair_row("p3")]
    write(tmp_path / "config-train.json.gz", train)
    write(tmp_path / "config-test.json.gz", [pair_row("t1"), pair_row("t2")])
    write(tmp_path / "eval-prompt.json.gz", [prompt_row("e1"), prompt_row("e2", prompt_labels=tags("crime"))])
    names = {f"{row['prompt_id']}/{row[side]['video_id']}.mp4" for row in train for side in ("video_0", "video_1")}
    touch(tmp_path / "videos", *names, *(f"{p}/{p}-{v}.mp4" for p in ("t1", "t2") for v in ("v0", "v1")))
    return tmp_path


def all_labels() -> list[Json]:
    return [label_row(p, v) for p in ("p1", "p2", "p3", "t1", "t2") for v in ("v0", "v1", "v2")]


def dropped(path: Path, **settings: Any) -> dict[str, int]:
    data = load(Source(path=path, **settings))
    assert data.num_read == len(data.entries) + sum(data.num_dropped.values())
    return dict(data.num_dropped)


# SafeSora ---------------------------------------------------------------------------------------------------


def test_a_folder_is_read_split_by_split(safesora: Path):
    data = load(Source(path=safesora, validation_share=0))
    assert [len(data.pairs(split)) for split in ("train", "validation", "test", "eval")] == [5, 0, 2, 0]
    assert [p.prompt_id for p in data.prompts("train")] == ["p1", "p2", "p3"]
    assert [p.prompt_id for p in data.prompts("eval")] == ["e1", "e2"]
    assert [v.path for v in data.videos("test")] == [
        safesora / "videos" / prompt / f"{prompt}-{video}.mp4" for prompt in ("t1", "t2") for video in ("v0", "v1")
    ]
    assert (data.num_read, data.num_dropped, data.num_duplicate_ids) == (9, {}, 0)
    assert {(pair.helpfulness, pair.cost) for pair in data.pairs("train")} == {(FIRST, SECOND)}


def test_a_single_file_is_of_the_split_that_its_name_says(safesora: Path):
    test = load(Source(path=safesora / "config-test.json.gz", validation_share=0.9))
    assert {entry.split for entry in test.entries} == {"test"}
    evaluation = load(Source(path=safesora / "eval-prompt.json.gz"))
    assert {entry.split for entry in evaluation.entries} == {"eval"}
    other = write(safesora / "latest-contest.jsonl", [pair_row("p1")])
    assert {entry.split for entry in load(Source(path=other, validation_share=0)).entries} == {"train"}


def test_training_rows_of_held_out_prompts_are_dropped(safesora: Path):
    same_text = {"prompt_text": "A ball  called t2"}
    leak: Json = pair_row("p9") | same_text
    for side in ("video_0", "video_1"):
        leak[side] = leak[side] | same_text
    write(safesora / "config-train.json.gz", [pair_row("p1"), pair_row("t1", "v0", "v2"), pair_row("e1"), leak])
    data = load(Source(path=safesora, missing="drop"))
    assert data.num_dropped == {"in_held_out_split": 3}
    assert len(data.pairs("test")) == 2


def test_every_row_is_counted_once_under_its_reason(safesora: Path):
    rows = [
        pair_row("p1"),
        pair_row("p1"),
        pair_row("p2", prompt_text=None),
        pair_row("p2", prompt_labels=tags("child_abuse")),
        pair_row("p3"),
        pair_row("p3", helpfulness="video_1"),
        pair_row("t1"),
        pair_row("p1", "v1", "gone"),
    ]
    write(safesora / "config-train.json.gz", rows)
    data = load(Source(path=safesora, missing="drop"))
    assert data.num_dropped == {
        "incomplete": 1,
        "child_abuse": 1,
        "in_held_out_split": 1,
        "contradiction": 2,
        "duplicate": 1,
        "missing_video": 1,
    }
    assert data.num_read == 8 + 2 + 2
    assert data.num_duplicate_ids == 3  # p1, p3, and t1, which is in both files
    assert len(data.entries) == 1 + 2 + 2


# The label set ----------------------------------------------------------------------------------------------


def test_labels_are_joined_by_video_id(safesora: Path):
    labels = all_labels()
    labels[1] = label_row("p1", "v1", video_labels=tags("crime"), prompt_labels=tags(), is_safe=True)
    write(safesora / "labels" / "config-train.json.gz", labels)
    data = load(Source(path=safesora, labels=safesora / "labels", validation_share=0))
    assert data.num_dropped == {}
    tagged = {v.video_id for v in data.videos("train") if v.tags.crime}
    assert tagged == {"p1-v1"}
    first = data.pairs("train")[0]
    assert (first.video_0.tags.crime, first.video_1.tags.crime, first.prompt.tags.crime) == (False, True, False)


def test_labels_may_be_in_both_files_of_their_folder(safesora: Path):
    write(safesora / "labels" / "config-train.json.gz", all_labels()[:9])
    write(safesora / "labels" / "config-test.json.gz", all_labels()[9:])
    assert dropped(safesora, labels=safesora / "labels") == {}


def test_what_the_label_set_bars_is_dropped_wherever_it_stands(safesora: Path):
    """p1/v2 is barred as a video (1 pair of p1), p2 as a prompt (2 pairs), t1 as a video (1), e2 by its text (1)."""
    labels = [row for row in all_labels() if row["video_id"] != "p1-v2"]
    same_text = {"prompt_text": "a ball called e2", "prompt_labels": tags("child_abuse")}
    labels += [
        label_row("p1", "v2", video_labels=tags("child_abuse")),
        label_row("p2", "v9", prompt_labels=tags("child_abuse")),
        label_row("x", "x", **same_text),
    ]
    write(safesora / "labels.json", labels)
    assert dropped(safesora, labels=safesora / "labels.json") == {"child_abuse": 4}


def test_a_pair_that_cannot_be_joined_is_dropped(safesora: Path):
    """v2 is in no label row: 1 pair of p1 and 1 of p2 go; t2 has labels without tags: 1 pair."""
    labels = [row for row in all_labels() if not row["video_id"].endswith("v2") and row["prompt_id"] != "t2"]
    labels += [label_row("t2", video, video_labels=None) for video in ("v0", "v1")]
    assert dropped(safesora, labels=write(safesora / "labels.jsonl", labels)) == {"not_in_labels": 3}


def test_labels_that_would_be_ignored_are_an_error(safesora: Path):
    labels = write(safesora / "labels.jsonl", all_labels())
    with pytest.raises(DataError, match="holds no pairs to label; leave it out"):
        load(Source(path=safesora / "eval-prompt.json.gz", labels=labels))


def test_pairs_are_no_labels(safesora: Path):
    with pytest.raises(DataError, match=r"labels=.*expected SafeSora-Label"):
        load(Source(path=safesora, labels=safesora / "config-test.json.gz"))


def test_the_label_set_is_a_data_source_too(tmp_path: Path):
    rows = [*all_labels(), label_row("p1", "v0"), label_row("p1", "v9", video_labels=tags("child_abuse"))]
    data = load(Source(path=write(tmp_path / "config-test.json", rows)))
    assert data.num_dropped == {"child_abuse": 1, "duplicate": 1}
    assert len(data.videos("test")) == 15
    assert data.pairs("test") == ()


# Files ------------------------------------------------------------------------------------------------------


def test_a_missing_video_is_an_error_unless_it_may_be_dropped(safesora: Path):
    (safesora / "videos" / "p1" / "p1-v2.mp4").unlink()
    with pytest.raises(DataError, match=r"p1/p1-v2\.mp4: missing, as are 1 of 12 videos"):
        load(Source(path=safesora))
    assert dropped(safesora, missing="drop") == {"missing_video": 1}


def test_videos_may_be_elsewhere(safesora: Path):
    (safesora / "videos").rename(safesora / "elsewhere")
    data = load(Source(path=safesora, video_dir=safesora / "elsewhere"))
    assert data.videos("test")[0].path == safesora / "elsewhere" / "t1" / "t1-v0.mp4"
    with pytest.raises(DataError, match=r"video_dir=.*there is no such folder"):
        load(Source(path=safesora, video_dir=safesora / "videos"))


def test_without_a_folder_of_videos_only_the_labels_are_read(safesora: Path):
    (safesora / "videos").rename(safesora / "elsewhere")
    assert dropped(safesora) == {}
    assert dropped(safesora, missing="drop") == {"missing_video": 7}


def test_a_video_outside_its_folder_is_refused(safesora: Path):
    (safesora / "secret.mp4").touch()
    inside = safesora / "videos" / "p1" / "p1-v0.mp4"
    inside.unlink()
    inside.symlink_to(safesora / "secret.mp4")
    with pytest.raises(DataError, match="link leads to"):
        load(Source(path=safesora, missing="drop"))


def test_paths_and_folders_that_say_too_little_or_too_much_are_refused(safesora: Path, tmp_path: Path):
    with pytest.raises(DataError, match="there is no such file or folder"):
        load(Source(path=tmp_path / "gone"))
    with pytest.raises(DataError, match="expected one of config, config-train"):
        load(Source(path=safesora / "videos"))
    write(safesora / "config-train.jsonl", [pair_row("p1")])
    with pytest.raises(DataError, match=r"ambiguous, holds config-train\.json\.gz, config-train\.jsonl"):
        load(Source(path=safesora))
    with pytest.raises(DataError, match=r"empty\.json: holds no rows"):
        load(Source(path=write(safesora / "empty.json", [])))


def test_a_row_unlike_the_first_is_named(tmp_path: Path):
    path = write(tmp_path / "config.json", [pair_row("p1"), video_row("p1", "v0")])
    with pytest.raises(DataError, match=r"config\.json, row 2: no field pair_id"):
        load(Source(path=path))


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_the_validation_share_leaves_something_to_train_on(share: float):
    with pytest.raises(ConfigError, match="validation_share"):
        preferences.config.load(Source, None, ["path=x", f"validation_share={share}"])


# VideoAlign -------------------------------------------------------------------------------------------------


def votes(folder: Path, repeats: int = 1) -> Path:
    header, *lines = CSV.splitlines()
    (folder / "example.csv").write_text("\n".join([header, *lines * repeats]))
    touch(folder, *(f"videos/{number}_{side}.mp4" for number in (1, 2) for side in "AB"))
    return folder


def test_votes_are_read_with_ties_repeats_and_missing_files(tmp_path: Path):
    """Twelve rows are three pairs, four times each: nine repeats, and one pair without its files."""
    data = load(Source(path=votes(tmp_path, repeats=4), missing="drop", validation_share=0))
    assert (data.num_read, data.num_dropped) == (12, {"duplicate": 9, "missing_video": 1})
    assert data.num_duplicate_ids == 3
    first, second = data.pairs("train")
    assert (first.aesthetics, first.correctness, first.instruction_following) == (SECOND, SECOND, FIRST)
    assert (second.aesthetics, second.correctness, second.instruction_following) == (TIE, None, FIRST)
    assert first.video_1.path == tmp_path / "videos" / "1_B.mp4"


def test_votes_without_files_are_an_error(tmp_path: Path):
    with pytest.raises(DataError, match=r"3_A\.mp4: missing, as are 2 of 6 videos"):
        load(Source(path=votes(tmp_path)))


def test_votes_that_contradict_each_other_are_dropped(tmp_path: Path):
    folder = votes(tmp_path)
    line = CSV.splitlines()[1].replace("B,B,A", "A,B,A")
    (folder / "example.csv").write_text(CSV + line)
    assert dropped(folder, missing="drop") == {"contradiction": 2, "missing_video": 1}


# Summary ----------------------------------------------------------------------------------------------------


def test_the_summary_counts_what_was_kept(safesora: Path):
    """Pairs hold 3 + 3 + 2 videos to train on and 2 + 2 to test with; prompts are 3 + 2 + 2, e2 asks for crime."""
    summary = summarise(load(Source(path=safesora, validation_share=0)))
    assert (summary.read, summary.kept, summary.dropped, summary.duplicate_ids) == (9, 9, {}, 0)
    assert (summary.pairs, summary.videos, summary.prompts) == (7, 12, 7)
    assert summary.splits == {"train": 5, "validation": 0, "test": 2, "eval": 2}
    assert summary.unscreened == 7
    assert summary.prompt_types == {"safety_neutral": 7}
    assert {tag: count for tag, count in summary.prompt_tags.items() if count} == {"crime": 1}
    assert summary.is_safe == {"true": 12}
    assert summary.generators == {"one": 12}
    assert summary.preferences["helpfulness"] == {"video_0": 7, "video_1": 0, "tie": 0, "no_label": 0}
    assert summary.preferences["cost"] == {"video_0": 0, "video_1": 7, "tie": 0, "no_label": 0}


def test_the_command_prints_the_summary_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    preferences.main([str(votes(tmp_path, repeats=2)), "missing=drop", "validation_share=0"])
    summary = json.loads(capsys.readouterr().out)
    assert (summary["read"], summary["kept"]) == (6, 2)
    assert summary["dropped"] == {"duplicate": 3, "missing_video": 1}
    assert summary["preferences"]["correctness"] == {"video_0": 0, "video_1": 1, "tie": 0, "no_label": 1}
    assert summary["generators"] == {"null": 4}


def test_the_command_says_what_is_wrong(tmp_path: Path):
    with pytest.raises(SystemExit, match=r"3_A\.mp4: missing"):
        preferences.main([str(votes(tmp_path))])


# Size -------------------------------------------------------------------------------------------------------

NUM_PAIRS, NUM_PROMPTS = 46_500, 13_240


def write_large(path: Path) -> None:
    """Write a set of SafeSora's size: 4 videos a prompt, ids of 64 signs and more, texts of some 170."""
    template = json.dumps(pair_row("{p}", "{a}", "{b}")).replace("a ball called", "a ball called " + 150 * "x")
    with gzip.open(path, "wt", compresslevel=1) as file:
        for number, (prompt, (a, b)) in enumerate(large_pairs()):
            row = template.replace("{p}", f"{prompt:064x}")
            row = row.replace("{a}", str(a)).replace("{b}", str(b))
            file.write(("," if number else "[") + row)
        file.write("]")


def write_large_labels(path: Path) -> None:
    """Write a row for each of its videos, that join their pairs."""
    template = json.dumps(label_row("{p}", "{v}")).replace("a ball called", "a ball called " + 150 * "x")
    rows = (template.replace("{p}", f"{p:064x}").replace("{v}", str(v)) for p in range(NUM_PROMPTS) for v in range(4))
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.write(f"[{','.join(rows)}]")


def large_pairs() -> list[tuple[int, tuple[int, int]]]:
    sides = itertools.combinations(range(4), 2)
    return [(prompt, side) for side in sides for prompt in range(NUM_PROMPTS)][:NUM_PAIRS]


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from Linux's /proc")
def test_the_whole_of_safesora_loads_in_seconds_and_under_a_gigabyte(tmp_path: Path, labelled: bool):
    write_large(tmp_path / "config-train.json.gz")
    arguments = [str(tmp_path)]
    if labelled:
        write_large_labels(tmp_path / "labels.json.gz")
        arguments.append(str(tmp_path / "labels.json.gz"))
    program = """
import re, sys, time
from pathlib import Path
from reward.preferences import Source, load
path, labels = [*map(Path, sys.argv[1:]), None][:2]
start = time.process_time()
data = load(Source(path=path, labels=labels))
seconds = time.process_time() - start
# Not getrusage: its peak is handed down by the process that started this one.
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(len(data.pairs("train")) + len(data.pairs("validation")), peak[1], seconds)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    )
    num_pairs, peak_kilobytes, seconds = map(float, done.stdout.split())
    print(f"{seconds:.1f} s and {peak_kilobytes / 1000:.0f} MB with{'' if labelled else 'out'} labels")
    assert num_pairs == NUM_PAIRS
    assert peak_kilobytes < 1_000_000
    assert seconds < 15
