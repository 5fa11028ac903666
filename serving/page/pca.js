// What is computed from the patch features [N, D], given row after row: principal components and cosines.

// Steps of Lanczos' method. The first components come out within a few dozen, however many patches and features.
const MAX_STEPS = 60;
const MAX_SWEEPS = 30;
// What is smaller, as a share of the whole, is rounding.
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
  return times(unit, num, width, unit.subarray(anchor * width, (anchor + 1) * width));
}

/**
 * The first `count` principal components of the rows: `scores`, one array [N] for each, and `shares` of the variance.
 * A sign is free: the entry furthest from zero is made positive. Components that are not there have scores 0.
 */
export function principalComponents(features, num, width, count) {
  const rows = centred(features, num, width);
  const variance = dot(rows, rows);
  const pairs = variance > NEGLIGIBLE * dot(features, features) ? eigenpairs(rows, num, width, variance) : [];
  const scores = [], shares = [];
  for (let component = 0; component < count; component++) {
    const { value = 0, vector } = pairs[component] ?? {};
    const present = value > NEGLIGIBLE * variance;
    scores.push(present ? withFixedSign(times(rows, num, width, vector)) : new Float64Array(num));
    shares.push(present ? value / variance : 0);
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

/** Largest first: eigenvalues and eigenvectors [D] of X'X, by Lanczos' method with full orthogonalisation. */
function eigenpairs(rows, num, width, variance) {
  const steps = Math.min(MAX_STEPS, width, num);
  const basis = [], diagonal = [], beside = [];
  let next = anyVector(width, 0);
  for (let step = 0; step < steps; step++) {
    let length = orthogonalized(next, basis);
    beside.push(length);
    if (length < NEGLIGIBLE * variance) {
      // Nothing is left in this direction; another may hold an eigenvalue that comes twice.
      beside[step] = 0;
      next = anyVector(width, step);
      length = orthogonalized(next, basis);
    }
    const vector = next.map((x) => x / length);
    basis.push(vector);
    next = transposedTimes(rows, num, width, times(rows, num, width, vector));
    diagonal.push(dot(vector, next));
  }
  return smallEigenpairs(diagonal, beside).map(({ value, weights }) => ({
    value,
    vector: Float64Array.from({ length: width }, (_, k) => basis.reduce((sum, vector, j) => sum + weights[j] * vector[k], 0)),
  }));
}

/** Take the basis out of a vector, in place; what is left of its length. Twice, for the sake of rounding. */
function orthogonalized(vector, basis) {
  for (const member of [...basis, ...basis]) {
    const share = dot(vector, member);
    for (let k = 0; k < vector.length; k++) vector[k] -= share * member[k];
  }
  return Math.sqrt(dot(vector, vector));
}

/** The same for the same step, and in no special direction. */
function anyVector(width, step) {
  return Float64Array.from({ length: width }, (_, k) => Math.sin(12.9898 * (k + 1) + 78.233 * (step + 1) * (k + 2)));
}

/** Of the symmetric matrix with this diagonal and these values beside it, by Jacobi's rotations; largest first. */
function smallEigenpairs(diagonal, beside) {
  const size = diagonal.length;
  const matrix = diagonal.map((value, i) => {
    const row = new Float64Array(size);
    row[i] = value;
    if (i > 0) row[i - 1] = beside[i];
    if (i + 1 < size) row[i + 1] = beside[i + 1];
    return row;
  });
  const vectors = diagonal.map((_, i) => Float64Array.from({ length: size }, (__, j) => Number(i === j)));
  const scale = Math.max(...diagonal);
  for (let sweep = 0; sweep < MAX_SWEEPS; sweep++) {
    let largest = 0;
    for (let p = 0; p < size; p++) {
      for (let q = p + 1; q < size; q++) {
        largest = Math.max(largest, Math.abs(matrix[p][q]));
        if (matrix[p][q] !== 0) rotate(matrix, vectors, p, q);
      }
    }
    if (largest < 1e-14 * scale) break;
  }
  const order = [...diagonal.keys()].sort((a, b) => matrix[b][b] - matrix[a][a]);
  return order.map((k) => ({ value: matrix[k][k], weights: vectors.map((row) => row[k]) }));
}

/** Turn in the plane of p and q so that matrix[p][q] becomes 0. */
function rotate(matrix, vectors, p, q) {
  const theta = (matrix[q][q] - matrix[p][p]) / (2 * matrix[p][q]);
  const tangent = (theta < 0 ? -1 : 1) / (Math.abs(theta) + Math.sqrt(theta * theta + 1));
  const cosine = 1 / Math.sqrt(tangent * tangent + 1);
  const sine = tangent * cosine;
  const turn = (row, i, j) => ([row[i], row[j]] = [cosine * row[i] - sine * row[j], sine * row[i] + cosine * row[j]]);
  for (const row of matrix) turn(row, p, q);
  for (let k = 0; k < matrix.length; k++) {
    const [a, b] = [matrix[p][k], matrix[q][k]];
    matrix[p][k] = cosine * a - sine * b;
    matrix[q][k] = sine * a + cosine * b;
  }
  for (const row of vectors) turn(row, p, q);
}

/** X v, [N]. */
function times(rows, num, width, vector) {
  return Float64Array.from({ length: num }, (_, row) => {
    let sum = 0;
    for (let k = 0; k < width; k++) sum += rows[row * width + k] * vector[k];
    return sum;
  });
}

/** X' u, [D]. */
function transposedTimes(rows, num, width, weights) {
  const sums = new Float64Array(width);
  for (let row = 0; row < num; row++) {
    for (let k = 0; k < width; k++) sums[k] += weights[row] * rows[row * width + k];
  }
  return sums;
}

function dot(a, b) {
  let sum = 0;
  for (let k = 0; k < a.length; k++) sum += a[k] * b[k];
  return sum;
}

function withFixedSign(scores) {
  const furthest = scores.reduce((a, b) => (Math.abs(b) > Math.abs(a) ? b : a));
  return furthest < 0 ? scores.map((x) => -x) : scores;
}
