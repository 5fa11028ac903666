// From a file to the picture that the model sees.

/** A canvas of the model's size: cropped and resized as bundle.preprocessing says, grey where it has one channel. */
export async function asModelSees(blob, preprocessing) {
  // The server turns by EXIF and applies no colour profile.
  const bitmap = await createImageBitmap(blob, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  const { width, height, crop_fraction: share, channels } = preprocessing;
  // Pixels of the file for each pixel of the model's, so that the crop fits on both sides.
  const scale = share * Math.min(bitmap.width / width, bitmap.height / height);
  const canvas = makeCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  // Transparent pixels lie over white.
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  const [cropWidth, cropHeight] = [scale * width, scale * height];
  const [left, top] = [(bitmap.width - cropWidth) / 2, (bitmap.height - cropHeight) / 2];
  context.drawImage(bitmap, left, top, cropWidth, cropHeight, 0, 0, width, height);
  if (channels === 1) turnGrey(context, width, height);
  return { canvas, fileWidth: bitmap.width, fileHeight: bitmap.height };
}

export function makeCanvas(width, height) {
  return Object.assign(document.createElement("canvas"), { width, height });
}

function turnGrey(context, width, height) {
  const pixels = context.getImageData(0, 0, width, height);
  const { data } = pixels;
  for (let i = 0; i < data.length; i += 4) {
    data[i] = data[i + 1] = data[i + 2] = Math.round(0.299 * data[i] + 0.587 * data[i + 1] + 0.114 * data[i + 2]);
  }
  context.putImageData(pixels, 0, 0);
}

/** The picture with its masked patches in the server's grey. */
export function withoutMasked(canvas, masked, columns, patchSize) {
  const seen = makeCanvas(canvas.width, canvas.height);
  const context = seen.getContext("2d");
  context.drawImage(canvas, 0, 0);
  context.fillStyle = "#808080";
  for (const index of masked) {
    context.fillRect((index % columns) * patchSize, Math.floor(index / columns) * patchSize, patchSize, patchSize);
  }
  return seen;
}

/** The leftmost of `panels` equal pictures side by side, in a PNG of the server's. */
export async function leftPanel(data, panels) {
  const bitmap = await createImageBitmap(new Blob([data]));
  const canvas = makeCanvas(bitmap.width / panels, bitmap.height);
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  return canvas;
}

/** A drawn landscape for bundles without example images, as a PNG file. */
export function drawnSample({ width, height }) {
  const canvas = makeCanvas(Math.max(width, 64) * 2, Math.max(height, 64) * 2);
  const context = canvas.getContext("2d");
  const [w, h] = [canvas.width, canvas.height];
  const sky = context.createLinearGradient(0, 0, 0, h);
  sky.addColorStop(0, "#16324f");
  sky.addColorStop(0.65, "#e8a06a");
  context.fillStyle = sky;
  context.fillRect(0, 0, w, h);
  context.fillStyle = "#fff3c4";
  disc(context, 0.68 * w, 0.34 * h, 0.13 * Math.min(w, h));
  hill(context, w, h, 0.62, 0.1, 1.3, "#4d6b57");
  hill(context, w, h, 0.76, 0.07, 2.6, "#24402f");
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

function disc(context, x, y, radius) {
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  context.fill();
}

function hill(context, w, h, level, swing, waves, fill) {
  context.fillStyle = fill;
  context.beginPath();
  context.moveTo(0, h);
  for (let x = 0; x <= w; x++) context.lineTo(x, h * (level + swing * Math.sin(waves * ((2 * Math.PI * x) / w) + waves)));
  context.lineTo(w, h);
  context.fill();
}
