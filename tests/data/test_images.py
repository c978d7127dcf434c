"""Images as they are met (rows 23-30 of the faults). Every fixture is made here, in numbers one can check by eye."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from vlm.batch import ImageSpec
from vlm.data import images as images_module
from vlm.data.images import fit_square, from_pixels, load_image, resolve_image, to_pixels
from vlm.errors import RecordError

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def photo(width: int, height: int) -> Image.Image:
    """Smooth colours with some noise, so that every kind of resizing shows."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 60, (height, width, 3))
    waves = [np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 11)]
    return Image.fromarray(np.clip(np.stack(waves, -1) * 90 + 110 + noise, 0, 255).astype(np.uint8))


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is this big and holds almost nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def rule_of(source, **limits) -> str:
    with pytest.raises(RecordError) as caught:
        load_image(source, **limits)
    assert "0x" not in caught.value.message  # no address of an object
    return caught.value.rule


# Row 23: files that are no images


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage" * 99,
        b"<!DOCTYPE html><html><body>404</body></html>",
        b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        encoded(photo(64, 64))[:900],
        encoded(photo(64, 64), "JPEG")[:900],
        encoded(photo(64, 64), "WEBP")[:400],
        encoded(photo(64, 64), "BMP")[:900],
        encoded(photo(64, 64), "TIFF")[:900],
        encoded(photo(64, 64), "GIF")[:900],
    ],
    ids=[
        "empty",
        "garbage",
        "html",
        "svg",
        *(f"half {kind}" for kind in ("png", "jpeg", "webp", "bmp", "tiff", "gif")),
    ],
)
def test_what_is_no_whole_image_is_unreadable_from_a_file_and_from_bytes(tmp_path, content):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    assert rule_of(path) == rule_of(str(path)) == rule_of(content) == "image_unreadable"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_raster_formats_are_read_whatever_the_file_is_called(tmp_path, format):
    path = tmp_path / "image.dat"
    path.write_bytes(encoded(Image.new("RGB", (8, 4), (200, 100, 50)), format))
    image = load_image(path)
    assert (image.mode, image.size) == ("RGB", (8, 4))
    assert np.abs(np.asarray(image, dtype=int)[0, 0] - (200, 100, 50)).max() <= 3  # JPEG is off by 1, GIF by 0


@pytest.mark.parametrize("format", ["EPS", "PPM", "TGA", "ICO", "PDF", "SGI", "PCX"])
def test_other_formats_are_not_opened_though_pillow_could(format):
    content = encoded(Image.new("RGB", (16, 16)), format)
    assert rule_of(content) == "image_unreadable"


def test_a_folder_a_missing_file_and_a_pipe_are_told_apart(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    assert rule_of(tmp_path) == "image_unreadable"
    assert rule_of(tmp_path / "pipe") == "image_unreadable"
    assert rule_of(tmp_path / "none.png") == "image_missing"


# Row 24: sizes


@pytest.mark.parametrize(("width", "height"), [(10_000, 10_000), (20_000, 20_000), (1_000_000, 1_000)])
def test_a_bomb_is_refused_by_its_header_before_anything_is_decoded(width, height, monkeypatch):
    def never(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    content = png_header(width, height)
    assert len(content) < 80
    assert rule_of(content) == "image_too_large"


def test_the_cap_is_exact_and_ours():
    content = encoded(Image.new("RGB", (100, 50)))
    assert load_image(content, max_pixels=5000).size == (100, 50)
    with pytest.raises(RecordError, match=r"100 x 50 pixels, more than data.max_pixels 4,999"):
        load_image(content, max_pixels=4999)
    assert Image.MAX_IMAGE_PIXELS == 89_478_485  # Pillow's own guard stays up for everybody else


def test_an_image_without_pixels_is_unreadable():
    assert rule_of(png_header(0, 9)) == rule_of(png_header(9, 0)) == "image_unreadable"


@pytest.mark.parametrize("resize", ["pad", "crop", "squash"])
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (1, 1_000_000), (3, 2)])
def test_any_shape_becomes_a_square_without_a_giant_in_between(resize, size):
    """A 1 x 1,000,000 image padded first is 3 TB; with its short side scaled to 24 first it is 1.7 GB."""
    image = load_image(encoded(Image.new("RGB", size, RED)))
    pixels = to_pixels(image, ImageSpec(24, (0, 0, 0), (1, 1, 1), 1, resize, BLUE))
    assert pixels.shape == (3, 24, 24)
    middle = pixels[:, 12, 12].tolist()
    if resize != "pad" or size == (1, 1):
        assert middle == [1, 0, 0]
    else:
        assert middle[1] == 0
        assert middle[0] + middle[2] == pytest.approx(1, abs=0.01)  # a line of red between blue


# Rows 25 and 26: modes


def test_cmyk_grey_and_one_bit_become_rgb():
    assert load_image(encoded(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF")).getpixel((0, 0)) == RED
    assert load_image(encoded(Image.new("L", (2, 2), 77))).getpixel((0, 0)) == (77, 77, 77)
    one_bit = Image.new("1", (2, 1), 1)
    one_bit.putpixel((1, 0), 0)
    image = load_image(encoded(one_bit))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [WHITE, BLACK]


def with_palette(transparency: bytes | int) -> bytes:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    return encoded(image, transparency=transparency)


def grey_16(values: list[int], **options) -> bytes:
    return encoded(Image.fromarray(np.array([values], dtype=np.uint16)), **options)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encoded(Image.new("RGBA", (2, 1), (*RED, 0))), [BLUE, BLUE]),  # red is there, but must not show
        (encoded(Image.new("RGBA", (2, 1), (*RED, 255))), [RED, RED]),
        (encoded(Image.new("RGBA", (2, 1), (*RED, 51))), [(51, 0, 204), (51, 0, 204)]),  # a fifth of red
        (encoded(Image.new("LA", (2, 1), (200, 0))), [BLUE, BLUE]),
        (encoded(Image.new("LA", (2, 1), (200, 255))), [(200, 200, 200)] * 2),
        (with_palette(bytes([0, 255])), [BLUE, GREEN]),
        (with_palette(0), [BLUE, GREEN]),
        (encoded(Image.new("RGB", (2, 1), RED), transparency=RED), [BLUE, BLUE]),
        (encoded(Image.new("RGBA", (2, 1), (*RED, 0)), "WEBP", lossless=True, exact=True), [BLUE, BLUE]),
        (encoded(Image.new("RGBA", (2, 1), (*RED, 0)), "TIFF"), [BLUE, BLUE]),
        (grey_16([0, 65535], transparency=0), [BLUE, WHITE]),
    ],
    ids=[
        "rgba_clear",
        "rgba_full",
        "rgba_part",
        "la_clear",
        "la_full",
        "p_bytes",
        "p_one",
        "rgb_colour",
        "webp",
        "tiff",
        "grey_16",
    ],
)
def test_transparency_shows_the_background_and_never_the_hidden_colour(content, expected):
    image = load_image(content, background=BLUE)
    assert [image.getpixel((x, 0)) for x in (0, 1)] == expected


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "F"])
def test_bands_make_the_image_that_one_piece_makes(mode, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (10, 7, 4), dtype=np.uint8)
    rgba = Image.fromarray(noise)
    image = {
        "RGBA": rgba,
        "LA": rgba.convert("LA"),
        "P": rgba.convert("RGB").quantize(16),
        "I;16": Image.fromarray(noise[..., 0].astype(np.uint16) * 250),
        "F": Image.fromarray(noise[..., 0].astype(np.float32) - 100),
    }[mode]
    content = encoded(image, "TIFF" if mode == "F" else "PNG", **({"transparency": bytes(16)} if mode == "P" else {}))
    whole = load_image(content, background=BLUE)
    monkeypatch.setattr(images_module, "_BAND", 3)
    assert np.array_equal(np.asarray(load_image(content, background=BLUE)), np.asarray(whole))


def tiff(values, dtype) -> bytes:
    return encoded(Image.fromarray(np.array([values], dtype=dtype)), "TIFF")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (grey_16([0, 40_000, 65_535]), [0, 156, 255]),  # clipped it would be 0, 255, 255
        (grey_16([0, 100, 255]), [0, 0, 1]),  # a dark image stays dark
        (tiff([0, 40_000, 65_535], "<u2"), [0, 156, 255]),
        (tiff([0, 40_000, 65_535], np.int32), [0, 156, 255]),
        (tiff([0, 1_000_000, 2_500_000], np.int32), [0, 102, 255]),
        (tiff([0.0, 0.5, 1.0], np.float32), [0, 128, 255]),
        (tiff([0.0, 60.0, 180.0], np.float32), [0, 60, 180]),
        (tiff([0.0, 40_000.0, 50_000.0], np.float32), [0, 156, 195]),
        (tiff([-1.0, 0.0, 1.0], np.float32), [0, 128, 255]),
        (tiff([0.0, 0.0, 0.0], np.float32), [0, 0, 0]),
    ],
)
def test_greys_of_more_than_8_bit_are_scaled_not_clipped(content, expected):
    image = load_image(content)
    assert [image.getpixel((x, 0)) for x in range(3)] == [(grey,) * 3 for grey in expected]


def test_a_float_image_with_a_value_that_is_no_number_is_unreadable():
    assert rule_of(tiff([0.0, float("nan")], np.float32)) == "image_unreadable"


# Row 27: EXIF


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(orientation):
    """Stored turned as cameras do, so that what EXIF undoes is: red left, green right, blue below both."""
    upright = Image.new("RGB", (32, 48), BLUE)
    upright.paste(RED, (0, 0, 16, 24))
    upright.paste(GREEN, (16, 0, 32, 24))
    turns = Image.Transpose
    stored_by = {2: turns.FLIP_LEFT_RIGHT, 3: turns.ROTATE_180, 4: turns.FLIP_TOP_BOTTOM, 5: turns.TRANSPOSE,
                 6: turns.ROTATE_90, 7: turns.TRANSVERSE, 8: turns.ROTATE_270}  # fmt: skip
    stored = upright.transpose(stored_by[orientation]) if orientation in stored_by else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    for format in ("PNG", "JPEG"):
        image = load_image(encoded(stored, format, exif=exif))
        assert image.size == (32, 48)
        for place, colour in (((8, 12), RED), ((24, 12), GREEN), ((16, 36), BLUE)):
            assert np.abs(np.subtract(image.getpixel(place), colour)).max() <= 3  # JPEG; measured 1


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbage",
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 40,
        b"Exif\0\0",
    ],
)
def test_malformed_exif_is_ignored(exif):
    plain = encoded(Image.new("RGB", (16, 8), (10, 200, 30)), "JPEG")
    app1 = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    image = load_image(plain[:2] + app1 + plain[2:])
    assert image.size == (16, 8)
    assert image.tobytes() == load_image(plain).tobytes()


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"II*\0"])
def test_malformed_exif_of_other_formats_is_ignored(format, exif):
    """Here Pillow raises: "not a TIFF file", "unpack requires a buffer of 4 bytes"."""
    assert load_image(encoded(Image.new("RGB", (16, 8), RED), format, exif=exif)).size == (16, 8)


def test_a_damaged_tag_beside_the_orientation_does_not_leave_the_image_on_its_side():
    entries = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHII", 0x010E, 11, 1, 60)  # a caption of type float
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + bytes(60)
    plain = encoded(Image.new("RGB", (16, 8)), "JPEG")
    content = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]
    with pytest.raises(AttributeError):  # why Pillow's own function is not used
        ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert load_image(content).size == (8, 16)


# Row 28: animations


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_taken_and_said_once(format, capsys, monkeypatch):
    monkeypatch.setattr(images_module, "_told", set())
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if format == "WEBP" else {}
    content = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=50, **options)
    for _ in range(3):
        assert load_image(content).getpixel((4, 4)) == RED
    assert capsys.readouterr().err.count("several frames") == 1
    load_image(encoded(frames[0], format, **options))
    assert capsys.readouterr().err == ""


def test_damage_behind_the_first_frame_of_an_animation_does_no_harm():
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    whole = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    second = whole.index(b"!\xf9")  # where Pillow begins the second frame
    for cut in range(second, len(whole)):  # some cuts make `is_animated` raise
        assert load_image(whole[:cut]).getpixel((4, 4)) == RED


# Rows 29 and 30: names


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """images/ok.png and images/sub/ok.png inside; outside.png, images2/ok.png and links to them outside."""
    for place in ("images/sub", "images2"):
        (tmp_path / place).mkdir(parents=True)
    for place in ("images/ok.png", "images/sub/ok.png", "images2/ok.png", "outside.png"):
        (tmp_path / place).write_bytes(b"x")
    (tmp_path / "images/link_out.png").symlink_to(tmp_path / "outside.png")
    (tmp_path / "images/link_in.png").symlink_to("sub/ok.png")
    (tmp_path / "images/folder_out").symlink_to(tmp_path / "images2")
    (tmp_path / "images/loop.png").symlink_to("loop.png")
    return (tmp_path / "images").resolve()


ESCAPES = [
    "../outside.png",
    "sub/../../outside.png",
    "../images2/ok.png",  # begins with the path of the folder itself
    "link_out.png",
    "folder_out/ok.png",
    "/etc/passwd",
]


@pytest.mark.parametrize("name", [*ESCAPES, ".."])
def test_a_name_that_leads_out_of_the_folder_is_refused(root, name):
    with pytest.raises(RecordError) as caught:
        resolve_image(root, name)
    assert caught.value.rule == "image_outside_root"


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("none.png", "image_missing"),
        ("sub", "image_missing"),
        (".", "image_missing"),
        ("../images", "image_missing"),  # the folder itself
        ("ok.png/x", "image_missing"),
        ("loop.png", "image_missing"),
        ("x" * 5000, "image_missing"),
        ("\ud800.png", "image_missing"),
        ("", "bad_image_field"),
        ("  ", "bad_image_field"),
        ("ok.png\0", "bad_image_field"),
    ],
)
def test_a_name_of_no_file_is_refused(root, name, rule):
    with pytest.raises(RecordError) as caught:
        resolve_image(root, name)
    assert caught.value.rule == rule
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("name", ["ok.png", "sub/ok.png", "sub/../ok.png", "./ok.png", "link_in.png", "ABSOLUTE"])
def test_files_inside_are_found_links_and_absolute_names_too(root, name):
    name = str(root / "ok.png") if name == "ABSOLUTE" else name
    assert resolve_image(root, name).read_bytes() == b"x"


def test_each_part_of_the_check_is_needed(root):
    """Weaker checks let escapes through: by prefix of the text, without following links, without is_file."""

    def by_prefix(name: str) -> bool:
        return str((root / name).resolve()).startswith(str(root))

    def without_links(name: str) -> bool:
        return Path(os.path.normpath(root / name)).is_relative_to(root)

    assert [name for name in ESCAPES if by_prefix(name)] == ["../images2/ok.png", "folder_out/ok.png"]
    assert [name for name in ESCAPES if without_links(name)] == ["link_out.png", "folder_out/ok.png"]
    assert (root / "sub").resolve().is_relative_to(root)  # a folder, which only is_file keeps out


# Pixels


def test_pixels_are_normalised_by_hand():
    image = Image.new("RGB", (7, 7), (255, 51, 0))
    pixels = to_pixels(image, ImageSpec(2, (0.5, 0.2, 0.1), (0.5, 0.1, 0.2), 1))
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    expected = torch.tensor([1.0, 0.0, -0.5]).view(3, 1, 1).expand(3, 2, 2)  # (1-.5)/.5, (.2-.2)/.1, (0-.1)/.2
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)


def test_squash_averages_and_keeps_nothing_of_the_shape():
    image = Image.new("RGB", (8, 2), BLACK)
    image.paste(WHITE, (4, 0, 8, 2))
    square = fit_square(image, ImageSpec(2, (0,) * 3, (1,) * 3, 1, "squash"))
    assert np.asarray(square)[:, :, 0].tolist() == [[24, 231], [24, 231]]  # a filter of 16 pixels, wider than a half
    assert square.tobytes() == image.resize((2, 2), Image.Resampling.BICUBIC).tobytes()


def test_pad_centres_on_the_background():
    square = fit_square(Image.new("RGB", (4, 2), RED), ImageSpec(4, (0,) * 3, (1,) * 3, 1, "pad", BLUE))
    assert [square.getpixel((1, y)) for y in range(4)] == [BLUE, RED, RED, BLUE]


def test_crop_takes_the_middle_of_the_longer_side():
    image = Image.new("RGB", (9, 3), RED)
    image.paste(GREEN, (3, 0, 6, 3))
    square = fit_square(image, ImageSpec(3, (0,) * 3, (1,) * 3, 1, "crop"))
    assert set(square.getdata()) == {GREEN}


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (37, 91), (333, 100), (64, 64), (100, 101)])
def test_crop_equals_the_clip_processor_of_transformers(size):
    from vlm.compat import prepare

    prepare()
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    expected = torch.as_tensor(np.asarray(processor(photo(*size))["pixel_values"][0]))
    pixels = to_pixels(photo(*size), ImageSpec(64, CLIP_MEAN, CLIP_STD, 1, "crop"))
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)  # measured 4e-7; one of 255 steps is 0.014


def test_cropping_the_middle_of_a_giant_is_near_to_resizing_all_of_it(monkeypatch):
    spec = ImageSpec(64, CLIP_MEAN, CLIP_STD, 1, "crop")
    exact = np.asarray(fit_square(photo(37, 91), spec), dtype=int)
    monkeypatch.setattr(images_module, "_MAX_BETWEEN", 0)
    boxed = np.asarray(fit_square(photo(37, 91), spec), dtype=int)
    assert np.abs(boxed - exact).max() <= 4  # of 255; measured 0 or 3, by Pillow's version, on average 0.24
    assert np.abs(boxed - exact).mean() < 0.4


def test_padding_a_giant_is_near_to_padding_it_before_it_is_resized(monkeypatch):
    spec = ImageSpec(16, CLIP_MEAN, CLIP_STD, 1, "pad")
    exact = np.asarray(fit_square(photo(400, 80), spec), dtype=int)
    monkeypatch.setattr(images_module, "_MAX_BETWEEN", 320 * 320)
    shrunk = np.asarray(fit_square(photo(400, 80), spec), dtype=int)
    assert 0 < np.abs(shrunk - exact).max() <= 6
    assert np.abs(shrunk - exact).mean() < 1


def test_pixels_become_the_image_again():
    image = photo(16, 16)
    spec = ImageSpec(16, CLIP_MEAN, CLIP_STD, 1, "squash")
    assert from_pixels(to_pixels(image, spec), spec).tobytes() == image.tobytes()
