"""A picture of rows of images with a line of text under each."""

from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from serving.masks import picture
from serving.preprocess import PILLOW_MAX_PIXELS, ImageError, decode, to_array, to_mode

CELL_PX = 112
TEXT_PX = 30
GAP_PX = 8
FONT_PX = 11
NUM_COLUMNS = 8
WHITE, GREY, BLACK = (255, 255, 255), (225, 225, 225), (30, 30, 30)


class Cell(NamedTuple):
    """An image file, and what is written under it above its name."""

    path: str
    text: str


def draw_sheet(rows: list[list[Cell]]) -> Image.Image:
    """Each row from the left, NUM_COLUMNS images wide at most; what does not fit is counted in the last place."""
    width = max((min(len(row), NUM_COLUMNS) for row in rows), default=1)
    height = CELL_PX + TEXT_PX + GAP_PX
    size = (GAP_PX + max(width, 2) * (CELL_PX + GAP_PX), GAP_PX + max(len(rows), 1) * height)
    sheet = Image.new("RGB", size, WHITE)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_PX)
    if not rows:
        draw.text((GAP_PX, GAP_PX), "nothing found", BLACK, font)
    for number, row in enumerate(rows):
        top = GAP_PX + number * height
        shown = row if len(row) <= NUM_COLUMNS else row[: NUM_COLUMNS - 1]
        for column, cell in enumerate(shown):
            left = GAP_PX + column * (CELL_PX + GAP_PX)
            thumbnail = _thumbnail(cell.path)
            sheet.paste(thumbnail or GREY, (left, top, left + CELL_PX, top + CELL_PX))
            if thumbnail is None:
                draw.text((left + GAP_PX, top + CELL_PX // 2), "cannot be read", BLACK, font)
            draw.text((left, top + CELL_PX), cell.text, BLACK, font)
            draw.text((left, top + CELL_PX + FONT_PX + 2), _fit(Path(cell.path).name, font), BLACK, font)
        if len(shown) < len(row):
            left = GAP_PX + len(shown) * (CELL_PX + GAP_PX)
            draw.text((left, top + CELL_PX // 2), f"and {len(row) - len(shown)} more", BLACK, font)
    return sheet


def _thumbnail(path: str) -> Image.Image | None:
    """The image on a grey square, small ones enlarged by whole pixels; None where it cannot be read any more."""
    try:
        decoded = decode(Path(path).read_bytes(), max_pixels=PILLOW_MAX_PIXELS)
        image = to_mode(decoded if isinstance(decoded, Image.Image) else picture(to_array(decoded)), 3)
    except (OSError, ImageError):
        return None
    scale = CELL_PX / max(image.size)
    resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), resample)
    square = Image.new("RGB", (CELL_PX, CELL_PX), GREY)
    square.paste(image, ((CELL_PX - image.width) // 2, (CELL_PX - image.height) // 2))
    return square


def _fit(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """The end of a name, as wide as a cell: what differs in a folder's names stands there."""
    while font.getlength(text) > CELL_PX and len(text) > 1:
        text = "…" + text[2:]
    return text
