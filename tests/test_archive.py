import io
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Literal

import pytest

from reward import archive
from reward.archive import Unpacking, unpack
from reward.files import DataError

CONTENT = {"videos/p/a.mp4": b"one", "videos/p/b.mp4": b"two", "videos/q/c.mp4": bytes(3_000_000)}


def make_tar(path: Path, files: dict[str, bytes], *others: tarfile.TarInfo) -> Path:
    mode: Literal["w:gz", "w"] = "w:gz" if path.suffix in (".gz", ".tgz") else "w"
    with tarfile.open(path, mode) as tar:
        for other in others:
            tar.addfile(other)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's own, about names written twice
        archive.mkdir("videos")
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def make(path: Path, files: dict[str, bytes]) -> Path:
    return make_zip(path, files) if path.suffix == ".zip" else make_tar(path, files)


def entry(name: str, kind: bytes, linkname: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, linkname
    return info


def refused(path: Path, message: str, **limits: int) -> None:
    """An archive is refused, and leaves nothing but itself."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(DataError, match=message) as error:
        unpack(Unpacking(archive=path, target=path.parent / "out", **limits))
    assert str(path) in str(error.value)
    assert sorted(path.parent.iterdir()) == before


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz", "x.tgz"])
def test_an_archive_is_unpacked(tmp_path: Path, name: str):
    path, target = make(tmp_path / name, CONTENT), tmp_path / "out"
    assert unpack(Unpacking(archive=path, target=target)) == 3 + (name == "x.zip")
    assert {str(p.relative_to(target)): p.read_bytes() for p in target.rglob("*.mp4")} == CONTENT
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", name]


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz"])
@pytest.mark.parametrize("inside", ["../evil.mp4", "/tmp/evil.mp4", "videos/../../evil.mp4", "a\\..\\evil"])
def test_a_name_that_climbs_is_refused(tmp_path: Path, name: str, inside: str):
    refused(make(tmp_path / name, {"fine.mp4": b"", inside: b"evil"}), "stays inside its folder")


@pytest.mark.parametrize(
    "special",
    [
        entry("videos", tarfile.SYMTYPE, "/tmp"),
        entry("videos/p", tarfile.SYMTYPE, "q"),
        entry("hard", tarfile.LNKTYPE, "/etc/passwd"),
        entry("device", tarfile.CHRTYPE),
        entry("pipe", tarfile.FIFOTYPE),
    ],
    ids=lambda info: info.name,
)
def test_a_link_or_device_is_refused(tmp_path: Path, special: tarfile.TarInfo):
    refused(make_tar(tmp_path / "x.tar", CONTENT, special), "is a link or a device")


def test_a_link_in_a_zip_is_refused(tmp_path: Path):
    link = zipfile.ZipInfo("videos")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as opened:
        opened.writestr(link, "/tmp")
    refused(tmp_path / "x.zip", "is a link or a device")


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz"])
def test_an_archive_within_its_bounds_is_unpacked_and_one_beyond_is_not(tmp_path: Path, name: str):
    """Three files (the zip has their folder too) of 3 + 3 + 3,000,000 bytes."""
    path = make(tmp_path / name, CONTENT)
    refused(path, "more than max_bytes=3000005", max_bytes=3_000_005)
    refused(path, "more than max_files=2", max_files=2)
    unpack(Unpacking(archive=path, target=tmp_path / "out", max_bytes=3_000_006, max_files=4))


def test_a_zip_that_lies_about_its_size_writes_no_more_than_is_allowed(tmp_path: Path):
    """A size of 10 is claimed for 3,000,000 zeros, in the file's header and in the directory."""
    path = make_zip(tmp_path / "x.zip", {"a": bytes(3_000_000)})
    content = path.read_bytes()
    path.write_bytes(content.replace((3_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    refused(path, "cannot be unpacked", max_bytes=100)


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz"])
def test_a_cut_or_foreign_file_is_refused(tmp_path: Path, name: str):
    path = make(tmp_path / name, CONTENT)
    path.write_bytes(path.read_bytes()[:-200])
    refused(path, "cannot be unpacked|is it complete")
    path.write_bytes(b"neither")
    refused(path, "expected a zip or tar archive")


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz"])
def test_a_file_is_not_written_over_another_of_the_archive(tmp_path: Path, name: str):
    refused(make(tmp_path / name, {"a": b"first", "./a": b"second"}), "cannot be unpacked.*exists")


def test_a_missing_archive_is_named(tmp_path: Path):
    refused(tmp_path / "gone.zip", "cannot be unpacked.*No such file")


def test_an_existing_target_is_left_alone(tmp_path: Path):
    path, target = make_zip(tmp_path / "x.zip", CONTENT), tmp_path / "out"
    target.mkdir()
    with pytest.raises(DataError, match="exists already"):
        unpack(Unpacking(archive=path, target=target))
    assert list(target.iterdir()) == []


def test_a_target_needs_its_folder(tmp_path: Path):
    with pytest.raises(DataError, match="make it first"):
        unpack(Unpacking(archive=make_zip(tmp_path / "x.zip", CONTENT), target=tmp_path / "a" / "b"))


def test_the_command_unpacks_and_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = [str(make_zip(tmp_path / "x.zip", CONTENT)), f"target={tmp_path / 'out'}"]
    archive.main(arguments)
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: 4 files and folders\n"
    with pytest.raises(SystemExit, match="exists already"):
        archive.main(arguments)
