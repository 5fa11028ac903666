// The shell command that repeats a call.

import { BASE, hasKey, queryText } from "./api.js";

function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

/**
 * `source` is what was sent: an example of the bundle is fetched by the command itself, a file is expected in the
 * folder where the command runs. The key stays out of the clipboard: the shell takes it from CAE_SERVING_API_KEY.
 */
export function curlCommand({ source, path, query, accept, output }) {
  const key = hasKey() ? [`-H "X-Api-Key: $CAE_SERVING_API_KEY"`] : [];
  const form = accept === "image/png" ? [] : [`-H ${quoted(`Accept: ${accept}`)}`];
  const url = quoted(`${new URL(path, BASE)}?${queryText(query)}`);
  const fetched = source.example ? ["curl -s", ...key, quoted(source.url), "| "].join(" ") : "";
  const file = source.example ? "-" : source.name === "-" ? "./-" : source.name;
  return fetched + ["curl --data-binary", quoted(`@${file}`), ...key, ...form, url, "-o", output].join(" ");
}
