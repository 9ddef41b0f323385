"""Images in chats over HTTP: what the engine gets, what is counted, what is refused."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from PIL import Image

from kttrio.config import ServerConfig
from kttrio.request import ImageInput
from kttrio.server import images
from kttrio.server.errors import BadRequestError
from kttrio.server.images import ImageReader, draw_image, open_image
from kttrio.server.requests import ImageSource
from kttrio.text.images import ImageFormat
from tests.http_front import Front, Reply, running_front
from tests.pictures import data_url, encode_image, image_part, source

CHECKPOINT = Path(__file__).parents[1] / "fixtures" / "qwen3_5_moe_chat"
FORM = ImageFormat(
    token_id=386,
    token_side=8,
    least_pixels=256,
    most_pixels=16384,
    mean=(0.5, 0.5, 0.5),
    deviation=(0.5, 0.5, 0.5),
)
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def copy_checkpoint(directory: Path) -> Path:
    for file in CHECKPOINT.glob("*.j*"):
        if file.name != "golden.json":
            shutil.copy(file, directory)
    return directory


@asynccontextmanager
async def front_that_sees(**config: Any) -> AsyncIterator[Front]:
    async with running_front(
        config=ServerConfig(**config), write_checkpoint=copy_checkpoint, images=FORM
    ) as front:
        yield front


async def ask(front: Front, *content: object, **fields: object) -> Reply:
    return await front.chat(list(content), **fields)  # type: ignore[arg-type]


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


def plain(colour: tuple[int, ...] = RED, size: tuple[int, int] = (24, 16), **options: Any) -> str:
    return data_url(encode_image(Image.new("RGB", size, colour), **options))


def drawn(content: bytes, **fields: Any) -> ImageInput:
    return draw_image(open_image(source(**fields), content, FORM), 0, FORM)


def pixel(image: ImageInput, x: int, y: int) -> tuple[int, ...]:
    at = 3 * (y * image.columns * image.token_side + x)
    return tuple(image.pixels[at : at + 3])


def first_chunk(front: Front) -> Any:
    return front.runner.history[0].chunks[0]


# Through the server.


async def test_an_image_reaches_the_engine_in_its_place() -> None:
    async with front_that_sees() as front:
        reply = await ask(front, text("What is "), image_part(plain()), text("?"))
        assert reply.status == 200
        chunk = first_chunk(front)
        (image,) = chunk.images
        assert (image.rows, image.columns) == (2, 3)
        assert image.pixels == bytes(RED) * (16 * 24)
        around = chunk.token_ids[image.start - 1], chunk.token_ids[image.end]
        assert around == (384, 385)  # vision_start, vision_end
        assert chunk.token_ids[image.start : image.end] == (386,) * 6
        prompt = front.tokenizer.decode([t for t in chunk.token_ids if t != 386])
        assert "What is <|vision_start|><|vision_end|>?" in prompt


async def test_the_tokens_of_images_are_counted_as_prompt() -> None:
    async with front_that_sees() as front:
        replies = [await ask(front, *[image_part(plain())] * count) for count in (1, 2)]
        one, two = (reply.json()["usage"]["prompt_tokens"] for reply in replies)
        assert two - one == 6 + 2  # and the marks around it


async def test_several_images_keep_their_order() -> None:
    async with front_that_sees() as front:
        await ask(front, image_part(plain(GREEN)), text("and"), image_part(plain(BLUE, (16, 48))))
        first, second = first_chunk(front).images
        assert (first.pixels[:3], second.pixels[:3]) == (bytes(GREEN), bytes(BLUE))
        assert (second.rows, second.columns) == (6, 2)
        assert first.end < second.start


async def test_images_of_earlier_turns_are_seen_again() -> None:
    async with front_that_sees() as front:
        history = [
            {"role": "user", "content": [image_part(plain(GREEN))]},
            {"role": "assistant", "content": "Green."},
            {"role": "user", "content": [text("And"), image_part(plain(BLUE))]},
        ]
        reply = await front.ask("POST", "/v1/chat/completions", {"messages": history})
        assert reply.status == 200
        assert [image.pixels[:3] for image in first_chunk(front).images] == [
            bytes(GREEN),
            bytes(BLUE),
        ]


async def test_choices_share_the_image_and_streams_work() -> None:
    async with front_that_sees() as front:
        reply = await ask(front, image_part(plain()), n=2, stream=True)
        assert reply.events()[-1] == "[DONE]"
        chunks = [chunk for plan in front.runner.history for chunk in plan.chunks]
        assert len({chunk.slot for chunk in chunks}) == 2
        assert len({id(image) for chunk in chunks for image in chunk.images}) == 1


async def test_the_url_may_stand_alone_and_low_detail_makes_less_of_it() -> None:
    large = plain(size=(800, 800))
    async with front_that_sees() as front:
        await ask(front, {"type": "image_url", "image_url": large})
        assert first_chunk(front).images[0].rows == 16
    assert FORM.grid(800, 800, most_pixels=64 * 64) == (8, 8)


async def test_low_detail_is_half_a_thousand_pixels_squared() -> None:
    form = ImageFormat(
        token_id=1,
        token_side=32,
        least_pixels=65536,
        most_pixels=4096 * 1024,
        mean=FORM.mean,
        deviation=FORM.deviation,
    )
    content = encode_image(Image.new("RGB", (2048, 2048)))
    sizes = [open_image(source(low_detail=low), content, form).rows for low in (False, True)]
    assert sizes == [64, 16]


async def test_a_model_for_text_refuses_images() -> None:
    async with running_front() as front:
        error = (await ask(front, text("Look"), image_part(plain()))).error()
        assert error["param"] == "messages[0].content[1].image_url.url"
        assert "the model 'tiny' takes only text" in error["message"]


async def test_a_text_that_holds_the_token_for_images_is_told() -> None:
    async with front_that_sees() as front:
        reply = await ask(front, text("<|image_pad|>"), image_part(plain()))
        assert reply.status == 400
        assert "2 places for 1 images" in reply.error()["message"]
        assert (await ask(front, text("<|image_pad|>"))).status == 200


async def test_what_the_context_cannot_hold_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(images, "draw_image", None)
    large = image_part(plain(size=(128, 128)))
    async with front_that_sees() as front:
        for count, blamed in ((5, "messages[0].content[4].image_url.url"), (4, None)):
            error = (await ask(front, *[large] * count, max_tokens=5)).error()
            assert error["code"] == "context_length_exceeded"
            assert error["param"] == blamed


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png,abc", "must be a data: URL of the form data:image/png;base64,"),
        ("data:image/png;base64", "must be a data: URL of the form"),
        ("data:image/png;base64,abcde", "has content that is not base64"),
        (data_url(b"nonsense"), "is no image that can be read, of the kinds PNG, JPEG, WEBP."),
        (plain()[:-40], "is no image that can be read"),
        (plain(size=(1, 201)), "is 1 x 201 pixels; neither side"),
        (data_url(encode_image(Image.new("RGB", (9, 9)), "GIF"), "gif"), "is no image that can"),
        ("https://example.com/a.png", "this server fetches no images (--allow-image-urls)"),
        ("file:///etc/passwd", "this server fetches no images"),
        ("", "must be a string that is not empty"),
    ],
    ids=lambda value: value[:24],
)
async def test_what_is_no_image_is_a_400_that_names_the_part(url: str, message: str) -> None:
    async with front_that_sees() as front:
        reply = await ask(front, text("Look"), image_part(url))
        error = reply.error()
        assert reply.status == 400
        assert error["param"] == "messages[0].content[1].image_url.url"
        assert message in error["message"]


async def test_the_bytes_of_all_images_together_are_limited() -> None:
    content = encode_image(Image.effect_noise((64, 64), 50).convert("RGB"))
    part = image_part(data_url(content))
    async with front_that_sees(max_image_bytes=2 * len(content)) as front:
        assert (await ask(front, part, part)).status == 200
        error = (await ask(front, part, part, part)).error()
        assert error["param"] == "messages[0].content[2].image_url.url"
        assert "(--max-image-bytes)" in error["message"]


async def test_a_crowd_of_images_is_refused_before_any_is_read() -> None:
    reader = ImageReader(FORM, ServerConfig())
    crowd = [ImageSource("data:;base64,", f"image {number}", False) for number in range(101)]
    with pytest.raises(BadRequestError, match="too many or too large") as caught:
        await reader.open(crowd, most_tokens=100)
    assert caught.value.param == "image 100"


async def test_a_crowd_of_images_lets_others_run() -> None:
    """Their bytes are in the request: nothing is waited for."""
    reader = ImageReader(FORM, ServerConfig())
    crowd = [source(plain())] * 8
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        await reader._fetch(crowd)
        nursery.cancel_scope.cancel()
    assert turns > len(crowd) // 2


# Decoding.


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_three_kinds_are_read(kind: str) -> None:
    content = encode_image(Image.new("RGB", (24, 16), GREEN), kind)
    assert pixel(drawn(content), 5, 5) == pytest.approx(GREEN, abs=2)


def test_what_is_transparent_is_white() -> None:
    half = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    half.paste((0, 0, 255, 255), (8, 0, 16, 16))
    image = drawn(encode_image(half))
    assert (pixel(image, 0, 5), pixel(image, 15, 5)) == (WHITE, BLUE)
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([9, 9, 9, 255, 0, 0])
    assert pixel(drawn(encode_image(palette, transparency=0)), 3, 3) == WHITE


def test_grey_and_sixteen_bits_are_read() -> None:
    assert pixel(drawn(encode_image(Image.new("L", (16, 16), 77))), 3, 3) == (77, 77, 77)
    deep = Image.new("I;16", (16, 16), 77 * 256)
    assert pixel(drawn(encode_image(deep)), 3, 3) == (77, 77, 77)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_set_upright(orientation: int, kind: str) -> None:
    """As Pillow's own transposition, from the header alone."""
    image = Image.new("RGB", (48, 16), RED)
    image.paste(BLUE, (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = drawn(encode_image(image, kind, exif=exif, quality=100))
    assert (found.rows, found.columns) == ((6, 2) if orientation > 4 else (2, 6))
    corners = {1: (0, 0), 2: (-1, 0), 3: (-1, -1), 4: (0, -1)}
    corners |= {5: (0, 0), 6: (-1, 0), 7: (-1, -1), 8: (0, -1)}
    width, height = 8 * found.columns, 8 * found.rows
    x, y = corners[orientation]
    assert pixel(found, x % width, y % height) == pytest.approx(BLUE, abs=8)


def test_broken_notes_do_not_make_a_broken_image() -> None:
    content = encode_image(Image.new("RGB", (16, 16), RED), exif=b"Exif\x00\x00nonsense")
    assert pixel(drawn(content), 3, 3) == RED


@pytest.mark.parametrize("size", [(8193, 8192), (16000, 16000), (60000, 60000)])
def test_a_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    """A file of a few bytes that says it is enormous; nothing of it is unpacked."""
    content = bytearray(encode_image(Image.new("L", (1, 1))))
    content[16:24] = size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    with pytest.raises(BadRequestError, match="has more than 67108864 pixels; send it smaller"):
        drawn(bytes(content))


def test_a_cut_file_is_refused_when_it_is_drawn() -> None:
    content = encode_image(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")
    opened = open_image(source(), content[: len(content) // 2], FORM)
    with pytest.raises(BadRequestError, match="is no image that can be read"):
        draw_image(opened, 0, FORM)


def test_the_checkpoint_of_the_tests_has_these_measures() -> None:
    assert ImageFormat.load(CHECKPOINT, max_tokens=256) == FORM
    assert json.loads((CHECKPOINT / "config.json").read_text())["image_token_id"] == 386
