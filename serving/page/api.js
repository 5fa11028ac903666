// Calls of the server, and what a person should read when one fails.

// The files of the page lie one folder below the server's root, wherever a proxy shows that.
export const BASE = new URL("..", import.meta.url);

let key = "";

/** The key stays in memory: a reload forgets it. */
export function setKey(value) {
  key = value;
}

export function hasKey() {
  return key !== "";
}

/** What went wrong with which file, in sentences; `retryAfter` in seconds where another try may help, else null. */
export class Problem extends Error {
  constructor(fields) {
    super(fields.title);
    Object.assign(this, { code: "", detail: "", hint: "", file: "", requestId: "", retryAfter: null }, fields);
  }
}

const SENTENCES = {
  image_unsupported: ["The server cannot read this file", ""],
  image_truncated: ["This file is cut off or damaged", "Check that it opens in a picture viewer, or take another one."],
  image_too_large: ["This picture has too many pixels", "Make it smaller, then drop it again."],
  image_too_small: ["This picture is too small", "Take a larger one."],
  body_too_large: ["This file is too large", "Save it smaller, then drop it again."],
  empty_body: ["This file is empty", "Take another one."],
  queue_full: ["The server is busy", "Others are ahead of you; it should have room soon."],
  not_ready: ["The server is warming up", "It will answer in a moment."],
  draining: ["The server is stopping", "It takes nothing new until it has been started again."],
  expired: ["The server was too busy and dropped this call", "Try again when fewer people are calling."],
  body_timeout: ["The file took too long to arrive", "Try again over a faster line, or with a smaller file."],
  internal: ["The server failed on this call", "Tell who runs it the number of the request below; the log holds the cause."],
};

/** "queue is full" as "Queue is full." */
function sentence(text) {
  const trimmed = text.trim();
  if (!trimmed) return "";
  return trimmed[0].toUpperCase() + trimmed.slice(1) + (/[.!?]$/.test(trimmed) ? "" : ".");
}

async function problemOf(response) {
  const fields = { code: "", title: `The server answers ${response.status}`, requestId: response.headers.get("x-request-id") ?? "" };
  try {
    const { code, message, hint } = (await response.json()).error;
    const [title, ownHint] = SENTENCES[code] ?? ["The server refuses this call", sentence(hint)];
    Object.assign(fields, { code, title, detail: sentence(message), hint: ownHint });
  } catch {
    // Something between page and server has answered, a proxy for example.
    fields.detail = sentence(response.statusText);
  }
  if (response.status === 429 || response.status >= 500) {
    fields.retryAfter = Number.parseInt(response.headers.get("retry-after"), 10) || 0;
  }
  return new Problem(fields);
}

export function offline() {
  return new Problem({
    code: "offline",
    title: "The server does not answer",
    detail: "It may have stopped, or the network between you and it is down.",
    hint: "Nothing is lost: this page keeps your image and mask.",
    retryAfter: 0,
  });
}

/** `a=1&b=0,2`, commas left readable. */
export function queryText(query) {
  return Object.entries(query)
    .map(([name, value]) => `${name}=${encodeURIComponent(value).replaceAll("%2C", ",")}`)
    .join("&");
}

/**
 * One call: its body as an ArrayBuffer, its headers, and what it took in milliseconds.
 * Errors: Problem, and an AbortError where `signal` says stop.
 */
export async function call(path, { query = {}, body = null, accept = "*/*", signal = null } = {}) {
  const url = new URL(path, BASE);
  url.search = queryText(query);
  const headers = { Accept: accept };
  if (key) headers.Authorization = `Bearer ${key}`;
  // The bytes decide what a file is; its suffix, which the browser goes by, may be wrong.
  if (body) headers["Content-Type"] = "application/octet-stream";
  const started = performance.now();
  let response, data;
  try {
    response = await fetch(url, { method: body ? "POST" : "GET", headers, body, signal });
    if (response.ok) data = await response.arrayBuffer();
  } catch (error) {
    throw error.name === "AbortError" ? error : offline();
  }
  if (!response.ok) throw await problemOf(response);
  return { data, headers: response.headers, total: performance.now() - started, stages: stagesOf(response.headers) };
}

/** Server-Timing as [[stage, milliseconds], ...]. */
function stagesOf(headers) {
  return (headers.get("server-timing") ?? "")
    .split(",")
    .map((entry) => entry.match(/^\s*([\w-]+);dur=([\d.]+)/))
    .filter(Boolean)
    .map(([, stage, duration]) => [stage, Number(duration)]);
}

/** The float32 arrays of a safetensors file: {name: {shape, data}}. */
export function readSafetensors(buffer) {
  // 8 bytes, little-endian: the length of the JSON that says where each array lies.
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const arrays = {};
  for (const [name, { dtype, shape, data_offsets: [start, end] = [] }] of Object.entries(head)) {
    if (dtype !== "F32") continue;
    arrays[name] = { shape, data: new Float32Array(buffer.slice(8 + length + start, 8 + length + end)) };
  }
  return arrays;
}
