"""Video files <-> `uint8` frames; the only file of the project that knows a codec.

Frames are chosen by the time at which they are shown, never by their number, so that variable frame rates
come out right. A truncated video is never a short one, if its file says how long it is, and what the decoder reports
as damaged is a `VideoError`, never concealed. The same input gives the same bits every time.

Known limits: MPEG program and transport streams, Ogg, and Matroska without a header of its length do not say how long
they are, so one that was cut off can often not be told; nor can an MP4 in fragments that ends with one of them, nor the
loss of no more than the last frame in Matroska and FLV. H.264 carries no checksum. Bytes changed in the middle of a
frame often decode to other pixels without a report; only a hash of the file, as in a manifest of renders, tells.

Deliberately absent: resizing (a backbone's own matter), sound, non-square pixels (the stored grid is kept).
"""

import math
import os
import textwrap
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from av.video.stream import VideoStream
from PIL import Image, ImageDraw, ImageFont

from reward.files import replacing

MAX_BYTES = 4 * 2**30
"""The most pixels that one call may return: 4 GiB, which is 3,500 frames of 854 x 480."""

MIN_FPS = 0.01
_RUN, _NUM_RUNS, _CELL = 4, 2, 160
"""Of a contact sheet: frames in a run, runs in a row, and the side of a frame's square in pixels."""
_THREADS = 1
"""Of colour conversion: waiting for others takes longer than small frames do, on a busy machine by far."""
PIXEL_FORMAT = "yuv420p"
KEY_FRAME_EVERY = 16
CRF = 12
"""x264's rate factor: at 12 a saturated 16-pixel patch keeps its colour within 4 of 255."""

# Only plain containers: a playlist or script (hls, concat, ...) among the data could name other files, hosts.
_OPEN_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": "mov,matroska,avi,gif,mpegts,mpeg,ogg,flv"}


class VideoError(ValueError):
    """A video file or a request that cannot be served exactly; the message names the file and the remedy."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Video:
    """Frames in sRGB, shape `(f, h, w, 3)`, shown at a constant rate."""

    frames: np.ndarray
    fps: float

    def __post_init__(self) -> None:
        shape = self.frames.shape
        if self.frames.dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
            raise VideoError(f"frames: expected non-empty uint8 of shape (f, h, w, 3), got {self.frames.dtype} {shape}")
        if not 0 < self.fps < np.inf:
            raise VideoError(f"fps: expected a positive number, got {self.fps}")

    @property
    def duration_seconds(self) -> float:
        """How long all frames are shown."""
        return len(self.frames) / self.fps


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a file says of its video stream, as shown: width and height are those after rotation."""

    path: Path
    width: int
    height: int
    fps: float
    num_frames: int | None
    """None where the container does not say (Matroska, WebM)."""
    duration_seconds: float | None
    """None where the container does not say."""
    metadata: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Timeline:
    """When each frame is shown: sorted integer ticks of `tick` seconds, and the end of the last frame."""

    ticks: np.ndarray
    end: int
    tick: Fraction
    size: tuple[int, int]
    """Width and height, as stored."""

    @property
    def duration(self) -> Fraction:
        return (self.end - int(self.ticks[0])) * self.tick

    def shown_at(self, times_seconds: np.ndarray) -> np.ndarray:
        """Ticks of the frames on screen at these times; time 0 is the first frame's."""
        # Half a millionth of a second late, lest 3 * (1 / 30) fall a rounding error before the fourth frame.
        starts = (self.ticks - self.ticks[0]) * float(self.tick) - 5e-7
        return self.ticks[np.searchsorted(starts, times_seconds, side="right") - 1]

    def edges_seconds(self) -> np.ndarray:
        """When each frame is first shown, and when the last one ends; time 0 is the first frame's."""
        return (np.append(self.ticks, self.end) - self.ticks[0]) * float(self.tick)

    def constant_rate(self) -> float | None:
        """Frames a second, or None where it varies; a quarter of a frame, or one tick, of jitter does not count."""
        if len(self.ticks) == 1:
            return float(1 / self.duration)
        mean = Fraction(int(self.ticks[-1] - self.ticks[0]), len(self.ticks) - 1)
        jitter = np.abs(np.diff(self.ticks) - float(mean)).max()
        return None if jitter > max(1.0, float(mean) / 4) else float(1 / (mean * self.tick))


@dataclass(frozen=True, kw_only=True, eq=False)
class Reel:
    """All frames of a file, `uint8 (h, w, 3)`, decoded anew whenever they are gone through, one at a time.

    Going through them raises: VideoError: as `read`.
    """

    path: Path
    ticks: np.ndarray
    """Of each frame, as in the file."""
    edges_seconds: np.ndarray
    """When each frame is first shown, and when the last one ends; time 0 is the first frame's."""

    def __iter__(self) -> Iterator[np.ndarray]:
        for expected, (tick, pixels) in zip(self.ticks, _shown(self.path, self.ticks), strict=True):
            if tick != expected:
                raise VideoError(f"{self.path}: its frames come out of order; encode it again")
            yield pixels


def probe(path: Path | str) -> VideoInfo:
    """What the file's header and first frame say; does not read the rest of the file.

    Raises: VideoError: not a readable video, or it has no frame.
    """
    with _open(path) as (container, stream):
        first = next(_decoded(container, stream, path), None)
        if first is None:
            raise VideoError(f"{path}: has a video stream without frames; make it again")
        height, width = _upright(np.empty((first.height, first.width, 0)), first, path).shape[:2]
        seconds = _header_seconds(container, stream)
        return VideoInfo(
            path=Path(path),
            width=width,
            height=height,
            fps=float(_nominal_rate(stream, path)),
            num_frames=stream.frames or None,
            duration_seconds=seconds,
            metadata=dict(container.metadata),
        )


def read(path: Path | str, *, max_bytes: int = MAX_BYTES) -> Video:
    """All frames of a file with a constant frame rate; with another, the result's one `fps` would be wrong.

    Raises: VideoError: unreadable or truncated file; damage that shows; variable frame rate; more than max_bytes of
    pixels.
    """
    timeline = _timeline(path)
    return Video(frames=_frames(path, timeline, timeline.ticks, max_bytes), fps=_require_constant_rate(path, timeline))


def reel(path: Path | str) -> Reel:
    """All frames of a file of any length and rate, to go through one by one; small jitter of the rate is evened out.

    Raises: VideoError: unreadable or truncated file.
    """
    timeline = _timeline(path)
    rate = timeline.constant_rate()
    edges = np.arange(len(timeline.ticks) + 1) / rate if rate else timeline.edges_seconds()
    return Reel(path=Path(path), ticks=timeline.ticks, edges_seconds=edges)


def read_at(path: Path | str, times_seconds: Sequence[float], *, max_bytes: int = MAX_BYTES) -> np.ndarray:
    """Frames on screen at these times, shape `(f, h, w, 3)`, in the order asked; time 0 is the first frame's.

    Raises: VideoError: as `read`; a time before 0 or not before the end.
    """
    timeline = _timeline(path)
    times = np.asarray(times_seconds, dtype=np.float64)
    outside = times[~((times >= 0) & (times < float(timeline.duration)))]
    if times.size == 0 or outside.size:
        raise VideoError(
            f"{path}: times_seconds: expected one or more times in [0, {float(timeline.duration):g}), "
            f"got {outside.tolist()}"
        )
    return _frames(path, timeline, timeline.shown_at(times), max_bytes)


def write(
    path: Path | str,
    video: Video,
    *,
    metadata: Mapping[str, str] | None = None,
    crf: int = CRF,
) -> None:
    """Write an H.264 mp4, atomically; `probe(path).metadata` gives the metadata back.

    A higher `crf` makes smaller files of less quality: 0 loses nothing, 51 nearly all.

    Its yuv420p plays everywhere but keeps colour at half resolution, in pairs of rows and columns.

    Raises: VideoError: odd width or height; fps under MIN_FPS; metadata that is not text; the
    encoder refused.
    """
    height, width = video.frames.shape[1:3]
    if height % 2 or width % 2:
        raise VideoError(f"{path}: yuv420p needs an even width and height, got {width}x{height}; crop the frames")
    if video.fps < MIN_FPS:
        raise VideoError(f"{path}: fps: an mp4 is written at {MIN_FPS} or more, got {video.fps}")
    for key, value in (metadata or {}).items():
        if not (isinstance(value, str) and key and value):
            raise VideoError(f"{path}: metadata: expected non-empty text for {key!r}, got {value!r}")
    with replacing(Path(path)) as new:
        try:
            _encode(new, video, metadata or {}, crf)
        except av.FFmpegError as error:
            raise VideoError(f"{path}: could not encode {width}x{height} at {video.fps} fps: {error}") from error


def write_preview(path: Path | str, video: Video) -> None:
    """Write a looping animation for a web page, atomically: `.webp` or `.gif` (256 colours, 10 ms grid).

    Raises: VideoError: another suffix.
    """
    grid_milliseconds = {".webp": 1, ".gif": 10}.get(Path(path).suffix)
    if grid_milliseconds is None:
        raise VideoError(f"{path}: previews are .webp or .gif")
    # The grid cannot hold 1 / fps; rounding the times, not the durations, keeps the whole as long as it was.
    times = np.arange(len(video.frames) + 1) * 1000 / video.fps / grid_milliseconds
    durations = (np.diff(np.rint(times)) * grid_milliseconds).astype(int).tolist()
    first, *others = [Image.fromarray(frame) for frame in video.frames]
    options = {"save_all": True, "append_images": others, "duration": durations, "loop": 0}
    with replacing(Path(path)) as new:
        first.save(new, format=Path(path).suffix[1:], **options)


def contact_sheet(videos: Sequence[Video], captions: Sequence[str]) -> Image.Image:
    """One row a video: its caption, then two runs of four frames, evenly spaced (all frames, where there are fewer).

    Frames that are neighbours show flicker; evenly spaced ones would hide it, or make it up.

    Frames fit a square of 160 pixels: small ones are enlarged by a whole factor without smoothing.

    Raises: ValueError: no video, or not one caption each.
    """
    if not videos or len(videos) != len(captions):
        raise ValueError(f"expected videos with one caption each, got {len(videos)} and {len(captions)}")
    rows = [_sheet_row(*row) for row in zip(videos, captions, strict=True)]
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


@contextmanager
def _open(path: Path | str) -> Generator[tuple[InputContainer, VideoStream]]:
    """The file and its video stream, single-threaded: many readers share a machine."""
    if not Path(path).is_file():
        raise VideoError(f"{path}: no such file")
    try:
        with av.open(str(Path(path).absolute()), options=_OPEN_OPTIONS, metadata_errors="replace") as container:
            streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
            if not streams:
                raise VideoError(f"{path}: holds no video stream; give another file, or fetch it again")
            if streams[0].codec_context is None:  # for codes it does not know, whatever its types say
                raise VideoError(
                    f"{path}: its video is cut off, or in a code that FFmpeg does not know here; fetch it again, or "
                    "encode it as H.264"
                )
            streams[0].codec_context.thread_count = 1
            yield container, streams[0]
    except av.FFmpegError as error:
        raise VideoError(
            f"{path}: cannot be read as a video ({error.strerror}): damaged, incomplete, or not one of "
            f"{_OPEN_OPTIONS['format_whitelist']}; fetch it again, or remove it from the data"
        ) from error


def _decoded(container: InputContainer, stream: VideoStream, path: Path | str) -> Iterator[VideoFrame]:
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise VideoError(f"{path}: damaged at {frame.time} s; fetch it again, or remove it from the data")
        yield frame


def _timeline(path: Path | str) -> _Timeline:
    """Read the packets' times without decoding; memory: 16 bytes a frame."""
    with _open(path) as (container, stream):
        shown, num_packets, end, reached = [], 0, 0, 0.0
        for packet in container.demux():
            if packet.is_corrupt:
                raise VideoError(f"{path}: cut off or damaged after {num_packets} frames; fetch the file again")
            if packet.pts is not None and packet.time_base is not None:
                reached = max(reached, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index != stream.index:
                continue
            num_packets += packet.dts is not None or packet.size > 0
            if packet.size == 0:  # the end mark, or the frame before is shown on (AVI)
                continue
            if packet.pts is None:
                raise VideoError(
                    f"{path}: frame {num_packets} has no time; fetch the file again, or remux "
                    "it: ffmpeg -fflags +genpts -i IN -c copy OUT.mp4"
                )
            if not packet.is_discard:
                shown.append(packet.pts)
                end = max(end, packet.pts + (packet.duration or _nominal_ticks(stream, path)))
        if num_packets < stream.frames:
            raise VideoError(
                f"{path}: truncated: the header promises {stream.frames} frames, {num_packets} are there; "
                "fetch it again, or remove it from the data"
            )
        if not shown:
            raise VideoError(f"{path}: has a video stream without frames; make it again")
        _require_end(path, container, stream, reached)
        assert stream.time_base is not None  # FFmpeg sets one for every stream that it demuxes
        size = (stream.width, stream.height)
        return _Timeline(ticks=np.unique(shown), end=end, tick=stream.time_base, size=size)


def _require_end(path: Path | str, container: InputContainer, stream: VideoStream, reached: float) -> None:
    """Refuse a file that ends before its header says, in seconds over all of its streams."""
    cut = f"{path}: truncated: %s; fetch it again, or remove it from the data"
    if container.format.name == "gif":
        with Path(path).open("rb") as file:
            file.seek(-min(1024, Path(path).stat().st_size), os.SEEK_END)
            if not file.read().rstrip(b"\0\r\n").endswith(b";"):
                raise VideoError(cut % "a GIF ends with ';', and it does not")
    if stream.frames or container.duration is None:
        return
    # These two promise when the last frame ends, the others how long all take.
    is_end = container.format.name in ("flv", "matroska,webm")
    start = 0.0 if is_end else (container.start_time or 0) / 1_000_000
    promised = container.duration / 1_000_000
    # The last frame's duration may be left out, and sound may be padded.
    tolerance = max(0.05, 1.5 / _nominal_rate(stream, path))
    if reached - start < promised - tolerance:
        raise VideoError(cut % f"the header promises {promised:.3f} s, {reached - start:.3f} are there")


def _frames(path: Path | str, timeline: _Timeline, wanted: np.ndarray, max_bytes: int) -> np.ndarray:
    """The frames at the wanted ticks, in their order, repeated where a tick is."""
    width, height = timeline.size
    num_bytes = len(wanted) * width * height * 3
    if num_bytes > max_bytes:
        raise VideoError(
            f"{path}: {len(wanted)} frames of {width}x{height} take {num_bytes:,} bytes, more than {max_bytes:,}; "
            "cut the video, make it smaller, or leave it out"
        )
    frames = np.empty(0, dtype=np.uint8)
    for tick, pixels in _shown(path, wanted):
        frames = frames if frames.size else np.empty((len(wanted), *pixels.shape), dtype=np.uint8)
        frames[wanted == tick] = pixels
    return frames


def _shown(path: Path | str, wanted: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Decode once; give the wanted ticks with their frames, as they come, and drop the other frames at once."""
    with _open(path) as (container, stream):
        missing = set(wanted.tolist())
        shape = None
        for frame in _decoded(container, stream, path):
            tick = frame.pts
            if tick is not None and tick in missing:
                pixels = _upright(frame.to_ndarray(format="rgb24", threads=_THREADS), frame, path)
                shape = shape or pixels.shape
                if pixels.shape != shape:
                    raise VideoError(f"{path}: changes its size at {frame.time} s; encode it again at one size")
                yield tick, pixels
                missing.remove(tick)
            if not missing:
                return
    raise VideoError(f"{path}: {len(missing)} frames could not be decoded; fetch it again, or remove it")


def _upright(pixels: np.ndarray, frame: VideoFrame, path: Path | str) -> np.ndarray:
    """Apply the display matrix: a stored pixel (x, y) is shown at (a x + c y, b x + d y)."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    a, b, _, c, d = np.frombuffer(bytes(matrix), dtype="<i4")[:5].tolist()
    if b and c and not (a or d):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    elif b or c or not (a and d):
        raise VideoError(f"{path}: is shown turned by {frame.rotation} degrees; only quarter turns are read")
    return pixels[:: int(np.sign(d)), :: int(np.sign(a))]


def _nominal_rate(stream: VideoStream, path: Path | str) -> Fraction:
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise VideoError(f"{path}: states no frame rate; remux it: ffmpeg -i IN -c copy OUT.mp4")
    return rate


def _nominal_ticks(stream: VideoStream, path: Path | str) -> int:
    assert stream.time_base is not None
    return max(1, round(1 / (_nominal_rate(stream, path) * stream.time_base)))


def _header_seconds(container: InputContainer, stream: VideoStream) -> float | None:
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return None if container.duration is None else container.duration / 1_000_000  # AV_TIME_BASE


def _require_constant_rate(path: Path | str, timeline: _Timeline) -> float:
    rate = timeline.constant_rate()
    if rate is None:
        gaps = np.diff(timeline.ticks)
        slowest, fastest = (float(1 / (int(gap) * timeline.tick)) for gap in (gaps.max(), gaps.min()))
        raise VideoError(
            f"{path}: has a variable frame rate ({slowest:.4g} to {fastest:.4g} fps); encode it again at a constant "
            "one: ffmpeg -i IN -vf fps=RATE OUT.mp4"
        )
    return rate


def _sheet_row(video: Video, caption: str) -> Image.Image:
    count = min(_RUN * _NUM_RUNS, len(video.frames))
    starts = ((np.arange(_NUM_RUNS) + 0.5) * len(video.frames) / _NUM_RUNS - _RUN / 2).astype(int)
    chosen = np.arange(count) if count < _RUN * _NUM_RUNS else (starts[:, None] + np.arange(_RUN)).ravel()
    cells = [_fitted(Image.fromarray(video.frames[index])) for index in chosen]
    font = ImageFont.load_default(size=16)
    text = "\n".join(line for part in caption.splitlines() for line in textwrap.wrap(part, width=28))
    margin, text_width = 6, 260
    _, _, _, text_bottom = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font=font)
    height = max(cells[0].height, math.ceil(text_bottom)) + 2 * margin
    row = Image.new("RGB", (text_width + count * (cells[0].width + margin), height), "white")
    ImageDraw.Draw(row).multiline_text((margin, margin), text, fill="black", font=font)
    for number, image in enumerate(cells):
        row.paste(image, (text_width + number * (image.width + margin), margin))
    return row


def _fitted(image: Image.Image) -> Image.Image:
    factor = _CELL / max(image.size)
    if factor >= 1:
        width, height = (side * int(factor) for side in image.size)
        return image.resize((width, height), Image.Resampling.NEAREST)
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BOX)


def _encode(path: Path, video: Video, metadata: Mapping[str, str], crf: int) -> None:
    rate = Fraction(video.fps).limit_denominator(1001)  # 1001: 30000/1001 fps is exact
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart+use_metadata_tags"}) as container:
        container.metadata.update(metadata)
        # One thread: x264's output depends on their number, which would differ between machines. Without these two
        # analyses, too: with either, one file in hundreds or thousands comes out differently.
        options = {"crf": str(crf), "threads": "1", "x264-params": "psy=0:mbtree=0"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width = video.frames.shape[1:3]
        stream.pix_fmt, stream.gop_size = PIXEL_FORMAT, KEY_FRAME_EVERY
        stream.colorspace, stream.color_range = Colorspace.ITU709, ColorRange.MPEG
        stream.color_primaries, stream.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for number, pixels in enumerate(video.frames):
            frame = VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(
                format=PIXEL_FORMAT,
                dst_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
                threads=_THREADS,
            )
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
