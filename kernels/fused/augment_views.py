"""Views cut from decoded ROIs: crop, antialiased bicubic resize, flip and turn, stains, colour jitter, blur,
normalisation.

Resizing is linear and separable: view = Wy crop Wx^T, where each row of a W is the cubic kernel (a = -1/2), stretched
when downsampling, truncated at the crop and normalised to sum 1. Gaussian blur is the same with other weights. Both are
matrix products of small tiles, whose weights are computed on the fly.

There are three launches, all on a uint8 copy of the views. ``resize_kernel`` reads the crops, changes the stains and
applies the colour steps before contrast. Contrast needs the mean grey of the whole view, so every tile stores its part
of that sum. ``colour_kernel`` continues from contrast and finishes the views that are not blurred; ``blur_kernel``
finishes the others. Between steps, values are whole levels in 0..255, rounded where torchvision's uint8 functions round
and truncated where they truncate. No atomics: every run is bit-identical.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..namespace import NAMESPACE

TILE = 32  # side of a tile of a view, in pixels
CHUNK = 16  # side of the pixels multiplied at a time; 32 would spill registers
BLOCK = 1024  # pixels of a view whose colours a program changes

# Columns of `boxes` and of `colours`.
IMAGE, X, Y, SIDE, FLIP, TURNS = (tl.constexpr(column) for column in range(6))
BOX_COLUMNS = tl.constexpr(6)
ORDER, GREY, SIGMA, SOLARISE = tl.constexpr(4), tl.constexpr(8), tl.constexpr(9), tl.constexpr(10)
STAINS = tl.constexpr(11)  # three factors, then three shifts
COLOUR_COLUMNS = tl.constexpr(17)
# Colour steps, as numbered in the order columns, and the columns of their strengths.
BRIGHTNESS, CONTRAST, SATURATION, HUE = (tl.constexpr(step) for step in range(4))


@triton.jit
def cubic(t):
    """Keys' kernel with a = -1/2, the usual one for antialiased resizing."""
    t = tl.abs(t)
    near = (1.5 * t - 2.5) * t * t + 1
    far = ((-0.5 * t + 2.5) * t - 4) * t + 2
    return tl.where(t < 1, near, tl.where(t < 2, far, 0.0))


@triton.jit
def resize_weight(out, pixel, side, size):
    """Weight of the crop's pixel ``pixel`` in the view's pixel ``out`` along an axis, not normalised.

    The centre of the output pixel is split into an integer number of crop pixels and a fraction: plain float32 would
    lose digits in a large crop.
    """
    middle = (2 * out + 1) * side
    whole, rest = middle // (2 * size), (middle % (2 * size)).to(tl.float32) / (2 * size)
    stretch = tl.maximum(side.to(tl.float32) / size, 1.0)
    weight = cubic(((pixel - whole).to(tl.float32) + (0.5 - rest)) / stretch)
    return tl.where((pixel >= 0) & (pixel < side), weight, 0.0)


@triton.jit
def resize_bounds(tile, side, size, TILE: tl.constexpr):
    """Range of the crop's pixels that a tile of the view depends on along an axis."""
    reach = 2 * tl.maximum(tl.cdiv(side, size), 1) + 1
    first = (2 * tile * TILE + 1) * side // (2 * size)
    last = (2 * tl.minimum(tile * TILE + TILE, size) - 1) * side // (2 * size)
    return tl.maximum(first - reach, 0), tl.minimum(last + reach + 1, side)


@triton.jit
def multiply(a, b, total):
    return tl.dot(a, b, total, input_precision="tf32x3")


@triton.jit
def level(value):
    """The nearest whole level."""
    return tl.floor(tl.minimum(tl.maximum(value, 0.0), 255.0) + 0.5)


@triton.jit
def cut(value):
    """The whole level below, as in torchvision after each step of jitter."""
    return tl.floor(tl.minimum(tl.maximum(value, 0.0), 255.0))


@triton.jit
def density_of(value):
    """Optical density of a level, by the natural logarithm; 0 counts as 1/4, the middle of what is rounded to it."""
    return -tl.log(tl.maximum(value, 0.25) / 255)


@triton.jit
def level_of(density):
    return level(255 * tl.exp(-density))


@triton.jit
def changed(amount, stain):
    return amount * tl.load(stain) + tl.load(stain + 3)


@triton.jit
def change_stains(r, g, b, stain):
    """Scale and shift the amounts of haematoxylin, eosin and residual, with the vectors of Ruifrok and Johnston (2001).

    A density is the sum of amounts times stain vectors; their inverse separates the amounts.
    """
    r, g, b = density_of(r), density_of(g), density_of(b)
    haematoxylin = changed(1.87798274 * r - 0.06590806 * g - 0.60190736 * b, stain)
    eosin = changed(-1.00767869 * r + 1.13473037 * g - 0.48041419 * b, stain + 1)
    residual = changed(-0.55611582 * r - 0.13552180 * g + 1.57358807 * b, stain + 2)
    return (
        level_of(0.65 * haematoxylin + 0.07 * eosin + 0.27 * residual),
        level_of(0.70 * haematoxylin + 0.99 * eosin + 0.57 * residual),
        level_of(0.29 * haematoxylin + 0.11 * eosin + 0.78 * residual),
    )


@triton.jit
def grey_of(r, g, b):
    return tl.floor(0.2989 * r + 0.587 * g + 0.114 * b)


@triton.jit
def shifted_channel(hue, high, chroma, position):
    """One channel of the colour with this hue in 0..6 (modulo 6), largest channel and chroma."""
    k = hue + position
    k -= 6 * tl.floor(k / 6)
    return tl.floor((high - chroma * tl.minimum(tl.maximum(tl.minimum(k, 4 - k), 0.0), 1.0)) * (255.999 / 255))


@triton.jit
def shift_hue(r, g, b, shift):
    high = tl.maximum(r, tl.maximum(g, b))
    chroma = high - tl.minimum(r, tl.minimum(g, b))
    divisor = tl.where(chroma == 0, 1.0, chroma)
    hue = tl.where(high == r, (g - b) / divisor, tl.where(high == g, 2 + (b - r) / divisor, 4 + (r - g) / divisor))
    hue += 6 * shift
    return (
        shifted_channel(hue, high, chroma, 5.0),
        shifted_channel(hue, high, chroma, 3.0),
        shifted_channel(hue, high, chroma, 1.0),
    )


@triton.jit
def jitter(r, g, b, step, colour, mean):
    """Apply one colour step; ``mean`` is the mean grey of the view, for contrast."""
    strength = tl.load(colour + step)
    if step == HUE:
        if strength != 0:
            r, g, b = shift_hue(r, g, b, strength)
    else:
        centre = tl.zeros_like(r)
        if step == CONTRAST:
            centre += mean
        if step == SATURATION:
            centre = grey_of(r, g, b)
        offset = centre * (1 - strength)
        r, g, b = cut(r * strength + offset), cut(g * strength + offset), cut(b * strength + offset)
    return r, g, b


@triton.jit
def normalised(value, channel: tl.constexpr, solarise):
    """Solarise if ``solarise``, then normalise with ImageNet's mean and standard deviation."""
    mean: tl.constexpr = (0.485, 0.456, 0.406)[channel]
    deviation: tl.constexpr = (0.229, 0.224, 0.225)[channel]
    value = tl.where(value >= tl.where(solarise != 0, 128.0, 256.0), 255 - value, value)
    return value * (1 / (255 * deviation)) - mean / deviation


@triton.jit
def resize_kernel(
    pixels,  # uint8: images one after the other, each [3, height, width]
    images,  # [B, 3] int64: first byte, height and width
    boxes,  # [N, 6] int32
    colours,  # [N, 17] float32
    views,  # [N, 3, size, size] uint8
    greys,  # [N, tiles] float32: the sum of grey over each tile
    size,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program per view and tile."""
    view, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tiles = tl.cdiv(size, TILE)
    box, colour = boxes + view * BOX_COLUMNS, colours + view * COLOUR_COLUMNS
    side = tl.load(box + SIDE)
    image = images + tl.load(box + IMAGE).to(tl.int64) * 3
    height, width = tl.load(image + 1), tl.load(image + 2)
    crop = pixels + tl.load(image) + tl.load(box + Y).to(tl.int64) * width + tl.load(box + X)
    plane = height * width

    row = tile // tiles * TILE + tl.arange(0, TILE)
    column = tile % tiles * TILE + tl.arange(0, TILE)
    top, bottom = resize_bounds(tile // tiles, side, size, TILE)
    left, right = resize_bounds(tile % tiles, side, size, TILE)

    total_across = tl.zeros([TILE], tl.float32)
    for start in range(left, right, CHUNK):
        x = start + tl.arange(0, CHUNK)
        total_across += tl.sum(resize_weight(column[None, :], x[:, None], side, size), 0)
    total_down = tl.zeros([TILE], tl.float32)
    r = tl.zeros([TILE, TILE], tl.float32)
    g = tl.zeros([TILE, TILE], tl.float32)
    b = tl.zeros([TILE, TILE], tl.float32)
    for start_y in range(top, bottom, CHUNK):
        y = start_y + tl.arange(0, CHUNK)
        across_r = tl.zeros([CHUNK, TILE], tl.float32)
        across_g = tl.zeros([CHUNK, TILE], tl.float32)
        across_b = tl.zeros([CHUNK, TILE], tl.float32)
        for start_x in range(left, right, CHUNK):
            x = start_x + tl.arange(0, CHUNK)
            weight = resize_weight(column[None, :], x[:, None], side, size)
            place = crop + y[:, None].to(tl.int64) * width + x[None, :]
            inside = (y < side)[:, None] & (x < side)[None, :]
            across_r = multiply(tl.load(place, mask=inside, other=0).to(tl.float32), weight, across_r)
            across_g = multiply(tl.load(place + plane, mask=inside, other=0).to(tl.float32), weight, across_g)
            across_b = multiply(tl.load(place + 2 * plane, mask=inside, other=0).to(tl.float32), weight, across_b)
        weight = resize_weight(row[:, None], y[None, :], side, size)
        total_down += tl.sum(weight, 1)
        r, g, b = multiply(weight, across_r, r), multiply(weight, across_g, g), multiply(weight, across_b, b)
    unit = (1 / tl.where(row < size, total_down, 1.0))[:, None] * (1 / tl.where(column < size, total_across, 1.0))[
        None, :
    ]
    r, g, b = level(r * unit), level(g * unit), level(b * unit)

    lane, stain = tl.arange(0, 8), colour + STAINS
    unchanged = tl.where(lane < 3, 1.0, 0.0)
    if tl.sum(tl.abs(tl.load(stain + lane, mask=lane < 6, other=0.0) - unchanged), 0) > 0:
        r, g, b = change_stains(r, g, b, stain)

    before = True
    for k in tl.static_range(4):
        step = tl.load(colour + ORDER + k).to(tl.int32)
        before = before & (step != CONTRAST)
        if before:
            r, g, b = jitter(r, g, b, step, colour, 0.0)

    within = (row < size)[:, None] & (column < size)[None, :]
    grey = tl.sum(tl.sum(tl.where(within, grey_of(r, g, b), 0.0), 1), 0)
    tl.store(greys + view * tiles * tiles + tile, grey)

    # Flip and turn together are one affine map of memory offsets.
    flipped, turns = tl.load(box + FLIP) != 0, tl.load(box + TURNS)
    down = tl.where(turns == 0, size, tl.where(turns == 1, 1, tl.where(turns == 2, -size, -1)))
    along = tl.where(turns == 0, 1, tl.where(turns == 1, -size, tl.where(turns == 2, -1, size)))
    along = tl.where(flipped, -along, along)
    first = tl.where(down < 0, -down, 0) + tl.where(along < 0, -along, 0)
    place = views + view * 3 * size * size + first * (size - 1) + row[:, None] * down + column[None, :] * along
    tl.store(place, r.to(tl.uint8), mask=within)
    tl.store(place + size * size, g.to(tl.uint8), mask=within)
    tl.store(place + 2 * size * size, b.to(tl.uint8), mask=within)


@triton.jit
def colour_kernel(
    views,  # [N, 3, size, size] uint8, changed in place if the view is to be blurred
    colours,  # [N, 17] float32
    greys,  # [N, tiles] float32
    out,  # [N, 3, size, size]
    area,  # size * size
    num_tiles,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """One program per view and block of pixels."""
    view = tl.program_id(0).to(tl.int64)
    colour = colours + view * COLOUR_COLUMNS
    lane = tl.arange(0, LANES)
    mean = tl.sum(tl.load(greys + view * num_tiles + lane, mask=lane < num_tiles, other=0.0), 0) / area

    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < area
    place = view * 3 * area + pixel
    r = tl.load(views + place, mask=inside, other=0).to(tl.float32)
    g = tl.load(views + place + area, mask=inside, other=0).to(tl.float32)
    b = tl.load(views + place + 2 * area, mask=inside, other=0).to(tl.float32)
    reached = False
    for k in tl.static_range(4):
        step = tl.load(colour + ORDER + k).to(tl.int32)
        reached = reached | (step == CONTRAST)
        if reached:
            r, g, b = jitter(r, g, b, step, colour, mean)
    if tl.load(colour + GREY) != 0:
        r = grey_of(r, g, b)
        g, b = r, r
    if tl.load(colour + SIGMA) > 0:
        tl.store(views + place, r.to(tl.uint8), mask=inside)
        tl.store(views + place + area, g.to(tl.uint8), mask=inside)
        tl.store(views + place + 2 * area, b.to(tl.uint8), mask=inside)
    else:
        solarise = tl.load(colour + SOLARISE)
        tl.store(out + place, normalised(r, 0, solarise).to(out.dtype.element_ty), mask=inside)
        tl.store(out + place + area, normalised(g, 1, solarise).to(out.dtype.element_ty), mask=inside)
        tl.store(out + place + 2 * area, normalised(b, 2, solarise).to(out.dtype.element_ty), mask=inside)


@triton.jit
def blur_weight(out, pixel, sigma, radius):
    """A Gaussian, not normalised."""
    away = (pixel - out).to(tl.float32)
    return tl.where(tl.abs(away) <= radius, tl.exp(-away * away / (2 * sigma * sigma)), 0.0)


@triton.jit
def reflected(pixel, size):
    """Mirror a pixel beyond the border into the view, without repeating the border itself."""
    pixel = tl.abs(pixel)
    return tl.where(pixel < size, pixel, 2 * size - 2 - pixel)


@triton.jit
def blur_kernel(
    views,  # [N, 3, size, size] uint8
    colours,  # [N, 17] float32
    out,  # [N, 3, size, size]
    size,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program per view and tile; does nothing if the view is not blurred."""
    view, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    colour = colours + view * COLOUR_COLUMNS
    sigma = tl.load(colour + SIGMA)
    if sigma > 0:
        tiles = tl.cdiv(size, TILE)
        top, left = tile // tiles * TILE, tile % tiles * TILE
        row, column = top + tl.arange(0, TILE), left + tl.arange(0, TILE)
        radius = tl.minimum(tl.maximum(tl.floor(3 * sigma + 0.5).to(tl.int32), 1), size // 2 - 1)
        area = size * size
        source = views + view * 3 * area

        r = tl.zeros([TILE, TILE], tl.float32)
        g = tl.zeros([TILE, TILE], tl.float32)
        b = tl.zeros([TILE, TILE], tl.float32)
        total_down = tl.zeros([TILE], tl.float32)
        for start_y in range(top - radius, top + TILE + radius, CHUNK):
            y = start_y + tl.arange(0, CHUNK)
            across_r = tl.zeros([CHUNK, TILE], tl.float32)
            across_g = tl.zeros([CHUNK, TILE], tl.float32)
            across_b = tl.zeros([CHUNK, TILE], tl.float32)
            for start_x in range(left - radius, left + TILE + radius, CHUNK):
                x = start_x + tl.arange(0, CHUNK)
                weight = blur_weight(column[None, :], x[:, None], sigma, radius)
                inside = (y < size + radius)[:, None] & (x < size + radius)[None, :]
                place = source + reflected(y, size)[:, None] * size + reflected(x, size)[None, :]
                across_r = multiply(tl.load(place, mask=inside, other=0).to(tl.float32), weight, across_r)
                across_g = multiply(tl.load(place + area, mask=inside, other=0).to(tl.float32), weight, across_g)
                across_b = multiply(tl.load(place + 2 * area, mask=inside, other=0).to(tl.float32), weight, across_b)
            weight = blur_weight(row[:, None], y[None, :], sigma, radius)
            total_down += tl.sum(weight, 1)
            r, g, b = multiply(weight, across_r, r), multiply(weight, across_g, g), multiply(weight, across_b, b)

        # Every output pixel has the same weights around it, so one sum normalises both axes.
        unit = 1 / (total_down * total_down)[:, None]
        r, g, b = level(r * unit), level(g * unit), level(b * unit)
        place = out + view * 3 * area + row[:, None] * size + column[None, :]
        within = (row < size)[:, None] & (column < size)[None, :]
        solarise = tl.load(colour + SOLARISE)
        tl.store(place, normalised(r, 0, solarise).to(out.dtype.element_ty), mask=within)
        tl.store(place + area, normalised(g, 1, solarise).to(out.dtype.element_ty), mask=within)
        tl.store(place + 2 * area, normalised(b, 2, solarise).to(out.dtype.element_ty), mask=within)


@torch.library.custom_op(f"{NAMESPACE}::augment_views", mutates_args=())
def augment_views(
    pixels: Tensor, images: Tensor, boxes: Tensor, colours: Tensor, size: int, dtype: torch.dtype
) -> Tensor:
    """Return views ``[N, 3, size, size]`` in ``dtype``; see ``ops.augment_views``. Not differentiable."""
    num_views = len(boxes)
    out = pixels.new_empty(num_views, 3, size, size, dtype=dtype)
    if not num_views:
        return out
    views, num_tiles = torch.empty_like(out, dtype=torch.uint8), triton.cdiv(size, TILE) ** 2
    greys = colours.new_empty(num_views, num_tiles)
    boxes, colours = boxes.contiguous(), colours.contiguous()
    with torch.cuda.device_of(pixels):
        resize_kernel[(num_views, num_tiles)](
            pixels.contiguous(), images.contiguous(), boxes, colours, views, greys, size, TILE=TILE, CHUNK=CHUNK
        )
        colour_kernel[(num_views, triton.cdiv(size * size, BLOCK))](
            views, colours, greys, out, size * size, num_tiles, BLOCK=BLOCK, LANES=triton.next_power_of_2(num_tiles)
        )
        blur_kernel[(num_views, num_tiles)](views, colours, out, size, TILE=TILE, CHUNK=CHUNK)
    return out


@augment_views.register_fake
def _(pixels: Tensor, images: Tensor, boxes: Tensor, colours: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    return pixels.new_empty(boxes.shape[0], 3, size, size, dtype=dtype)
