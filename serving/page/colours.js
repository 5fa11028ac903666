// Colours of maps: one scale whose lightness grows evenly, from dark violet by way of green to pale yellow.

const STEPS = 256;

/** OKLCH (Ottosson's OKLab in polar form) to linear sRGB, which may lie outside 0 to 1. */
function linearRgb(lightness, chroma, hue) {
  const a = chroma * Math.cos((hue * Math.PI) / 180);
  const b = chroma * Math.sin((hue * Math.PI) / 180);
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
}

function byte(linear) {
  const value = linear <= 0.0031308 ? 12.92 * linear : 1.055 * linear ** (1 / 2.4) - 0.055;
  return Math.round(255 * Math.min(1, Math.max(0, value)));
}

function colour(t) {
  const lightness = 0.22 + 0.72 * t;
  const hue = 300 - 195 * t;
  // As colourful as a screen can show, up to a limit.
  let chroma = 0.125;
  let rgb = linearRgb(lightness, chroma, hue);
  while (chroma > 0.01 && rgb.some((x) => x < 0 || x > 1)) rgb = linearRgb(lightness, (chroma -= 0.005), hue);
  return rgb.map(byte);
}

const TABLE = Array.from({ length: STEPS }, (_, index) => colour(index / (STEPS - 1)));

/** The colour [r, g, b] of a value between `low` and `high`. */
export function scaled(value, low, high) {
  const t = high > low ? (value - low) / (high - low) : 1;
  return TABLE[Math.round(Math.min(1, Math.max(0, t)) * (STEPS - 1))];
}

/** The colour of a patch from its place in each of three ranges; a range of nothing is its middle. */
export function mixed(values, ranges) {
  return values.map((value, k) => {
    const [low, high] = ranges[k];
    return high > low ? Math.round((255 * (value - low)) / (high - low)) : 128;
  });
}

/** One pixel of the canvas for each patch. */
export function drawMap(canvas, rows, columns, colourOf) {
  canvas.width = columns;
  canvas.height = rows;
  const pixels = new ImageData(columns, rows);
  for (let index = 0; index < rows * columns; index++) pixels.data.set([...colourOf(index), 255], 4 * index);
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

/** The scale from left to right. */
export function drawScale(canvas) {
  drawMap(canvas, 1, STEPS, (index) => TABLE[index]);
}
