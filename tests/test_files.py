from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward import files
from reward.files import DataError

CLIMBING = ["", ".", "/", "/a", "..", "../a", "a/../b", "a/..", "a\\b", "..\\a", "a\0b", "a\nb", "\ud800"]


@pytest.mark.parametrize("name", CLIMBING)
def test_a_name_that_may_lead_elsewhere_is_refused(name: str):
    with pytest.raises(DataError, match="stays inside its folder"):
        files.relative(name)


@pytest.mark.parametrize(
    ("name", "plain"),
    [("./videos/x.mp4", "videos/x.mp4"), ("a//b", "a/b"), ("a/./b/", "a/b"), ("..a/b..", "..a/b.."), ("~", "~")],
)
def test_a_relative_name_is_given_in_plain_form(name: str, plain: str):
    assert files.relative(name) == plain


@given(st.text(st.sampled_from("ab./\\\0~ "), max_size=12))
def test_whatever_is_let_through_stays_inside(name: str):
    try:
        plain = files.relative(name)
    except DataError:
        return
    path = PurePosixPath("/root") / plain
    assert path.is_relative_to("/root/")
    assert ".." not in path.parts
    assert path == PurePosixPath("/root", *(part for part in name.split("/") if part not in ("", ".")))


@pytest.mark.parametrize("name", [*CLIMBING, "a/b", ".hidden", "a b", "a:b", "ä"])
def test_an_id_is_no_path(name: str):
    with pytest.raises(DataError, match="letters, digits"):
        files.single(name)


@pytest.mark.parametrize("name", ["a", "0" * 64, "A-b_c.d"])
def test_an_id_is_letters_and_digits(name: str):
    assert files.single(name) == name


def test_absent_files_are_found_in_folders_that_exist_and_that_do_not(tmp_path: Path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "here.mp4").touch()
    (tmp_path / "p" / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    names = ["p/here.mp4", "p/gone.mp4", "p/folder.mp4", "q/gone.mp4", "file/gone.mp4"]
    absent = files.absent([tmp_path / name for name in names], tmp_path)
    assert absent == {tmp_path / name for name in names[1:]}


def test_links_inside_the_root_are_followed(tmp_path: Path):
    root = tmp_path / "root"
    (root / "p").mkdir(parents=True)
    (root / "p" / "a.mp4").touch()
    (root / "p" / "b.mp4").symlink_to("a.mp4")
    (root / "p" / "dangling.mp4").symlink_to("none.mp4")
    (root / "q").symlink_to("p")
    (tmp_path / "link").symlink_to("root")
    names = ["p/b.mp4", "q/a.mp4", "p/dangling.mp4"]
    for start in (root, tmp_path / "link"):
        assert files.absent([start / name for name in names], start) == {start / "p/dangling.mp4"}


@pytest.mark.parametrize("name", ["p/leak.mp4", "leak/secret.mp4"])
def test_a_link_out_of_the_root_is_refused(tmp_path: Path, name: str):
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "p").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret.mp4").touch()
    (root / "p" / "leak.mp4").symlink_to(outside / "secret.mp4")
    (root / "leak").symlink_to(outside)
    with pytest.raises(DataError, match=r"link leads to .*outside.*put the file itself there"):
        files.absent([root / name], root)


def test_a_link_that_no_data_names_is_left_alone(tmp_path: Path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.mp4").touch()
    (tmp_path / "root" / "stray").symlink_to(tmp_path)
    assert files.absent([tmp_path / "root" / "a.mp4"], tmp_path / "root") == set()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), files.replacing(path) as new:
        new.write_text("half of the n\ud800")
    assert path.read_text() == "old"
    with files.replacing(path) as new:
        new.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_needs_its_folder(tmp_path: Path):
    with pytest.raises(DataError, match="make it first"), files.replacing(tmp_path / "none" / "x"):
        pass
