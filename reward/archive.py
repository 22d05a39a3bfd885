"""Unpack a downloaded archive: `python -m reward.archive videos.tar.gz target=DIR`.

Nothing is written outside the target: links, devices and names that climb are refused, and so is more than
was allowed. All of the archive appears as the target at once, or nothing does. Owners, permissions and times
in the archive are not taken over.
"""

import stat
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Generator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import IO

from pydantic import Field

from reward import config, files
from reward.files import DataError, require_folder

_CHUNK_BYTES = 1 << 20

Member = tuple[str, IO[bytes] | None]  # its name, and its content unless it is a folder


class Unpacking(config.Config):
    """Unpack a zip or tar archive, compressed or not, into a new folder."""

    archive: Path
    """The archive; its content tells its kind."""
    target: Path
    """A folder that does not exist yet."""
    max_files: int = Field(default=200_000, gt=0)
    """More files and folders than this are refused; SafeSora has about 72,000."""
    max_bytes: int = Field(default=100 * 2**30, gt=0)
    """More bytes than this, unpacked, are refused; SafeSora has 32e9."""


def unpack(unpacking: Unpacking) -> int:
    """Unpack an archive and give the number of its files and folders.

    Raises: DataError: it is broken, too large, or holds what may not be written; the target exists.
    """
    target = unpacking.target
    if target.exists() or target.is_symlink():
        raise DataError(f"{target}: exists already; name a folder that does not, or remove it")
    require_folder(target)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        content = Path(scratch) / "content"
        content.mkdir()
        try:
            num_members = _write(unpacking, content)
        except (OSError, EOFError, RuntimeError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{unpacking.archive}: cannot be unpacked, {error}") from error
        content.rename(target)
    return num_members


def _write(unpacking: Unpacking, folder: Path) -> int:
    num_members, room = 0, unpacking.max_bytes
    with closing(_members(unpacking.archive)) as members:
        for name, content in members:
            num_members += 1
            if num_members > unpacking.max_files:
                raise DataError(f"{unpacking.archive}: holds more than max_files={unpacking.max_files} entries")
            path = folder / _inside(name, unpacking.archive)
            if content is None:
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                room -= _copy(content, file, room)
            if room < 0:
                raise DataError(f"{unpacking.archive}: holds more than max_bytes={unpacking.max_bytes}")
    return num_members


def _copy(source: IO[bytes], target: IO[bytes], room: int) -> int:
    """Copy what there is, a chunk beyond `room` at the most: the sizes an archive declares may be lies."""
    num_bytes = 0
    while num_bytes <= room and (chunk := source.read(_CHUNK_BYTES)):
        num_bytes += target.write(chunk)
    return num_bytes


def _inside(name: str, archive: Path) -> str:
    try:
        return files.relative(name)
    except DataError as error:
        raise DataError(f"{archive}: refused, {error}") from error


def _members(archive: Path) -> Generator[Member]:
    """Give what an archive holds, one by one; closing the generator closes the archive."""
    if zipfile.is_zipfile(archive):
        return _zip_members(archive)
    if tarfile.is_tarfile(archive):
        return _tar_members(archive)
    raise DataError(f"{archive}: expected a zip or tar archive; is it complete?")


def _zip_members(archive: Path) -> Generator[Member]:
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise DataError(f"{archive}: {info.filename!r} is a link or a device; only files are unpacked")
            if info.is_dir():
                yield info.filename, None
            else:
                with opened.open(info) as content:
                    yield info.filename, content


def _tar_members(archive: Path) -> Generator[Member]:
    with tarfile.open(archive) as opened:
        for info in opened:
            if not (info.isreg() or info.isdir()):
                raise DataError(f"{archive}: {info.name!r} is a link or a device; only files are unpacked")
            with opened.extractfile(info) or nullcontext() as content:
                yield info.name, content


def main(argv: Sequence[str]) -> None:
    """Unpack one archive."""
    unpacking = config.parse(Unpacking, argv, prog="python -m reward.archive", positional="archive")
    try:
        print(f"{unpacking.target}: {unpack(unpacking)} files and folders")
    except DataError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
