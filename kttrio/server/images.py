"""A request's images: fetched, checked, decoded, and made to the model's measure.

Headers come first: they tell how many tokens an image makes, and whether its pixels are worth
unpacking. Both are done in threads, few at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, TypeVar

import trio
from PIL import Image, UnidentifiedImageError

from kttrio.config import ServerConfig
from kttrio.request import ImageInput
from kttrio.server.errors import BadRequestError
from kttrio.server.image_memory import Hold, ImageMemory
from kttrio.server.image_urls import (
    DATA,
    Allows,
    UrlError,
    fetch,
    is_public,
    read_data_url,
)
from kttrio.server.requests import ImageSource
from kttrio.text.images import ImageError, ImageFormat

KINDS = ("PNG", "JPEG", "WEBP")
MOST_PIXELS = 1 << 26
"""Of an image as it is sent; unpacked it takes four bytes for each."""
LOW_DETAIL_PIXELS = 512 * 512
"""What OpenAI's `detail: low` makes of an image."""
THREADS = 2
ORIENTATION = 0x0112
TURNS = {
    # EXIF's orientation -> what sets the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LYING = (5, 6, 7, 8)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class OpenedImage:
    """An image whose header has been read."""

    source: ImageSource
    content: Image.Image
    orientation: int
    rows: int
    columns: int

    @property
    def num_tokens(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True, slots=True)
class ImageReader:
    """Reads images for one model."""

    format: ImageFormat
    config: ServerConfig
    allows: Allows = is_public
    """Addresses that may be asked for images."""
    memory: ImageMemory = field(default_factory=ImageMemory)
    threads: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(THREADS))

    @property
    def limit(self) -> str:
        """For the operator."""
        return f"up to {self.format.most_pixels // self.format.token_side**2} tokens each"

    async def open(self, sources: Sequence[ImageSource], *, most_tokens: int) -> Pictures:
        """Fetch the images and read their headers. `most_tokens`: of all of them together. Raises
        BadRequestError that names the image."""
        if len(sources) > most_tokens:  # none makes less than a token
            raise _too_many_tokens(sources[most_tokens], most_tokens)
        content = await self._fetch(sources)
        images: list[OpenedImage] = []
        num_tokens = 0
        for source, data in zip(sources, content, strict=True):
            images.append(await self.in_thread(open_image, source, data, self.format))
            num_tokens += images[-1].num_tokens
            if num_tokens > most_tokens:
                raise _too_many_tokens(source, most_tokens)
        return Pictures(self, tuple(images))

    async def in_thread(self, work: Callable[..., T], *args: Any) -> T:
        return await trio.to_thread.run_sync(work, *args, limiter=self.threads)

    async def _fetch(self, sources: Sequence[ImageSource]) -> list[bytes]:
        config, found = self.config, list[bytes]()
        left = config.max_image_bytes
        with trio.CancelScope(deadline=trio.current_time() + config.image_url_seconds) as scope:
            for source in sources:
                await trio.lowlevel.checkpoint()  # thousands of data: URLs must not hold others up
                found.append(await self._content(source, left))
                left -= len(found[-1])
        if scope.cancelled_caught:
            complaint = f"did not arrive within {config.image_url_seconds:g} s"
            raise refusal(sources[len(found)], f"{complaint} (--image-url-seconds)")
        return found

    async def _content(self, source: ImageSource, most_bytes: int) -> bytes:
        try:
            if source.url.startswith(DATA):
                return read_data_url(source.url, most_bytes=most_bytes)
            if self.config.allow_image_urls:
                return await fetch(source.url, most_bytes=most_bytes, allows=self.allows)
        except UrlError as error:
            raise refusal(source, str(error)) from error
        complaint = "must be a data: URL: this server fetches no images (--allow-image-urls)"
        raise refusal(source, complaint)


@dataclass(frozen=True, slots=True)
class Pictures:
    """The images of a request, in order."""

    reader: ImageReader
    opened: tuple[OpenedImage, ...]

    def spread(self, ids: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The prompt with all tokens of its images, and where these begin. Raises
        BadRequestError."""
        try:
            return self.reader.format.spread(ids, [image.num_tokens for image in self.opened])
        except ImageError as error:
            raise BadRequestError(f"{error}.", "messages") from error

    def hold(self) -> Hold:
        """Make sure of the memory for their pixels. Raises ApiError."""
        pixels = sum(image.num_tokens for image in self.opened) * self.reader.format.token_side**2
        most_bytes = self.reader.config.max_image_memory
        return self.reader.memory.hold(3 * pixels, most_bytes=most_bytes)

    async def draw(self, starts: Sequence[int]) -> tuple[ImageInput, ...]:
        """Decode the images, which begin at `starts`. Raises BadRequestError."""
        reader, drawn = self.reader, []
        for image, start in zip(self.opened, starts, strict=True):
            drawn.append(await reader.in_thread(draw_image, image, start, reader.format))
        return tuple(drawn)


def open_image(source: ImageSource, data: bytes, form: ImageFormat) -> OpenedImage:
    """Read the header. Raises BadRequestError."""
    try:
        content = Image.open(BytesIO(data), formats=KINDS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels(source) from None
    except Exception as error:  # what a broken file makes its decoder raise is anyone's guess
        raise _unreadable(source, error) from error
    if content.width * content.height > MOST_PIXELS:
        raise _too_many_pixels(source)
    orientation = _orientation(content)
    width, height = content.size if orientation not in LYING else content.size[::-1]
    most = LOW_DETAIL_PIXELS if source.low_detail else None
    try:
        rows, columns = form.grid(width, height, most_pixels=most)
    except ImageError as error:
        raise refusal(source, str(error)) from error
    return OpenedImage(source, content, orientation, rows, columns)


def draw_image(image: OpenedImage, start: int, form: ImageFormat) -> ImageInput:
    """Decode and resize: upright, without transparency, bicubic. Raises BadRequestError."""
    size = (image.columns * form.token_side, image.rows * form.token_side)
    try:
        upright = _opaque(image.content)
        if image.orientation in TURNS:
            upright = upright.transpose(TURNS[image.orientation])
        pixels = upright.resize(size, Image.Resampling.BICUBIC).tobytes()
    except Exception as error:  # as above
        raise _unreadable(image.source, error) from error
    return ImageInput(
        start=start,
        rows=image.rows,
        columns=image.columns,
        pixels=pixels,
        token_side=form.token_side,
        mean=form.mean,
        deviation=form.deviation,
    )


def _orientation(image: Image.Image) -> int:
    """EXIF's, 1 where there is none: read from the header, for Pillow's own way may decode."""
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif", b""))
        return int(exif.get(ORIENTATION, 1))
    except Exception:  # broken notes do not make a broken image
        return 1


def _opaque(image: Image.Image) -> Image.Image:
    """Red, green and blue; what is transparent is white, as on paper."""
    if image.mode.startswith("I"):  # sixteen bits of grey, which conversion would cut off at 255
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if not image.has_transparency_data:
        return image.convert("RGB")
    paper = Image.new("RGBA", image.size, "white")
    paper.alpha_composite(image.convert("RGBA"))
    return paper.convert("RGB")


def refusal(source: ImageSource, complaint: str) -> BadRequestError:
    """The 400 that blames this image: `complaint` follows its place in the body."""
    return BadRequestError(f"'{source.path}' {complaint}.", source.path, "invalid_value")


def _unreadable(source: ImageSource, error: Exception) -> BadRequestError:
    # of bytes that it does not know Pillow says nothing but where in memory they lie
    reason = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
    kinds = ", ".join(KINDS)
    return refusal(source, f"is no image that can be read, of the kinds {kinds}{reason}")


def _too_many_tokens(source: ImageSource, most_tokens: int) -> BadRequestError:
    return BadRequestError(
        f"The images are too many or too large: with '{source.path}' they make more than the "
        f"{most_tokens} tokens of prompt and answer that this server holds.",
        source.path,
        "context_length_exceeded",
    )


def _too_many_pixels(source: ImageSource) -> BadRequestError:
    return refusal(source, f"has more than {MOST_PIXELS} pixels; send it smaller")
