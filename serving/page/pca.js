// What is computed from the patch features [N, D], given row after row: principal components and cosines.

const MAX_ITERATIONS = 1000;
const TOLERANCE = 1e-9;
// A smaller share of the variance is rounding.
const NEGLIGIBLE = 1e-10;

/** Rows of length 1; a row of zeros has no direction, and stays. */
export function normalized(features, num, width) {
  const unit = new Float32Array(features);
  for (let row = 0; row < num; row++) {
    let square = 0;
    for (let k = 0; k < width; k++) square += features[row * width + k] ** 2;
    const length = Math.sqrt(square) || 1;
    for (let k = 0; k < width; k++) unit[row * width + k] /= length;
  }
  return unit;
}

/** Cosines [N] between one row and all, from rows of length 1. */
export function cosines(unit, num, width, anchor) {
  return Float64Array.from({ length: num }, (_, row) => {
    let sum = 0;
    for (let k = 0; k < width; k++) sum += unit[row * width + k] * unit[anchor * width + k];
    return sum;
  });
}

/**
 * The first `count` principal components of the rows: `scores`, one array [N] for each, and `shares` of the variance.
 * A sign is free: the entry furthest from zero is made positive. Components that are not there have scores 0.
 */
export function principalComponents(features, num, width, count) {
  const rows = centred(features, num, width);
  // Of the two products that have the same eigenvalues the smaller.
  const tall = num > width;
  const size = tall ? width : num;
  const matrix = tall ? columnProducts(rows, num, width) : rowProducts(rows, num, width);
  let variance = 0;
  for (let i = 0; i < size; i++) variance += matrix[i * size + i];
  const scores = [], shares = [];
  for (let component = 0; component < count; component++) {
    const { value, vector } = largestEigenpair(matrix, size);
    if (!(value > NEGLIGIBLE * variance)) {
      scores.push(new Float64Array(num));
      shares.push(0);
      continue;
    }
    deflate(matrix, size, value, vector);
    scores.push(withFixedSign(tall ? projected(rows, num, width, vector) : vector.map((x) => x * Math.sqrt(value))));
    shares.push(value / variance);
  }
  return { scores, shares };
}

function centred(features, num, width) {
  const rows = Float64Array.from(features);
  for (let k = 0; k < width; k++) {
    let mean = 0;
    for (let row = 0; row < num; row++) mean += rows[row * width + k] / num;
    for (let row = 0; row < num; row++) rows[row * width + k] -= mean;
  }
  return rows;
}

function rowProducts(rows, num, width) {
  const products = new Float64Array(num * num);
  for (let i = 0; i < num; i++) {
    for (let j = 0; j <= i; j++) {
      let sum = 0;
      for (let k = 0; k < width; k++) sum += rows[i * width + k] * rows[j * width + k];
      products[i * num + j] = products[j * num + i] = sum;
    }
  }
  return products;
}

function columnProducts(rows, num, width) {
  const products = new Float64Array(width * width);
  for (let row = 0; row < num; row++) {
    for (let i = 0; i < width; i++) {
      for (let j = 0; j < width; j++) products[i * width + j] += rows[row * width + i] * rows[row * width + j];
    }
  }
  return products;
}

/** By power iteration: a map of colours needs no more, and any number of patches stays fast. */
function largestEigenpair(matrix, size) {
  let start = 0;
  for (let i = 1; i < size; i++) if (matrix[i * size + i] > matrix[start * size + start]) start = i;
  // A column of the matrix lies where its eigenvectors do.
  let vector = matrix.slice(start * size, (start + 1) * size);
  let value = 0;
  for (let iteration = 0; iteration < MAX_ITERATIONS; iteration++) {
    const length = Math.hypot(...vector);
    if (!length) return { value: 0, vector };
    vector = vector.map((x) => x / length);
    const next = product(matrix, size, vector);
    value = Math.hypot(...next);
    let change = 0;
    for (let i = 0; i < size; i++) change = Math.max(change, Math.abs(next[i] - value * vector[i]));
    if (change <= TOLERANCE * value) break;
    vector = next;
  }
  const length = Math.hypot(...vector) || 1;
  return { value, vector: vector.map((x) => x / length) };
}

function product(matrix, size, vector) {
  const result = new Float64Array(size);
  for (let i = 0; i < size; i++) {
    let sum = 0;
    for (let j = 0; j < size; j++) sum += matrix[i * size + j] * vector[j];
    result[i] = sum;
  }
  return result;
}

function deflate(matrix, size, value, vector) {
  for (let i = 0; i < size; i++) {
    for (let j = 0; j < size; j++) matrix[i * size + j] -= value * vector[i] * vector[j];
  }
}

function projected(rows, num, width, vector) {
  return Float64Array.from({ length: num }, (_, row) => {
    let sum = 0;
    for (let k = 0; k < width; k++) sum += rows[row * width + k] * vector[k];
    return sum;
  });
}

function withFixedSign(scores) {
  const furthest = scores.reduce((a, b) => (Math.abs(b) > Math.abs(a) ? b : a));
  return furthest < 0 ? scores.map((x) => -x) : scores;
}
