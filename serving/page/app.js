// The page: asks the server what it is, takes images, and hands them to the parts.

import { BASE, call, Problem, readSafetensors, setKey } from "./api.js";
import { Completion } from "./completion.js";
import { curlCommand } from "./curl.js";
import { byId, copyCanvas, make } from "./dom.js";
import { Features } from "./features.js";
import { PatchGrid } from "./grid.js";
import { showLatency } from "./latency.js";
import { clearNotice, copyCommand, showProblem } from "./notice.js";
import { asModelSees, drawnSample, leftPanel } from "./picture.js";

// Pictures of fewer pixels are shown with their pixels.
const SMOOTH_PX = 96;
const SAFETENSORS = "application/x-safetensors";
let page = null;
// What waits for a key.
let pending = start;

async function start() {
  let info;
  try {
    info = JSON.parse(new TextDecoder().decode((await call("info")).data));
  } catch (error) {
    return report(error, start);
  }
  clearNotice();
  if (!page) page = new Page(info);
  return page.begin();
}

/** A key is asked for; any other problem is told. */
function report(error, again) {
  if (!(error instanceof Problem)) {
    console.error(error);
    const hint = "Reload it. If that does not help, tell who runs the server what this says.";
    return showProblem(new Problem({ title: "This page has a fault", detail: String(error), hint }), again);
  }
  if (error.code !== "unauthorized") return showProblem(error, again);
  pending = again;
  byId("key-problem").textContent = byId("key").value ? "The server does not accept this key." : "";
  byId("key-form").hidden = false;
  return byId("key").focus();
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = byId("key").value;
  // A header can carry no others.
  if (!/^[\x21-\x7e]+$/.test(given)) {
    byId("key-problem").textContent = "A key has only letters, digits and signs of the ASCII set, and no blanks.";
    return;
  }
  setKey(given);
  byId("key-form").hidden = true;
  pending();
});

class Page {
  constructor(info) {
    const { bundle, limits } = info;
    const { model, preprocessing } = bundle;
    const [rows, columns] = model.grid;
    const size = { rows, columns, width: preprocessing.width, height: preprocessing.height };
    Object.assign(this, { bundle, limits, taking: null });
    byId("playground").hidden = false;
    document.body.toggleAttribute("data-smooth", size.width >= SMOOTH_PX);
    describe(info);
    this.grid = new PatchGrid(byId("grid"), {
      rows,
      columns,
      paintable: bundle.capabilities.reconstruct,
      onPaint: () => this.completion.painted(),
      onPoint: (index) => this.point(index),
      announce: (text) => (byId("live").textContent = text),
    });
    byId("stage").style.aspectRatio = `${size.width} / ${size.height}`;
    this.features = new Features(size, (index) => this.point(index));
    this.completion = new Completion(bundle, size, this.grid, report);
    this.listen();
  }

  point(index) {
    this.features.point(index);
    this.grid.mark(index);
  }

  listen() {
    byId("file").addEventListener("change", (event) => {
      this.takeFile(event.target.files[0]);
      // The same file may be chosen again after an error.
      event.target.value = "";
    });
    const dropping = (on) => document.body.classList.toggle("dropping", on);
    document.addEventListener("dragover", (event) => {
      event.preventDefault();
      dropping(true);
    });
    document.addEventListener("dragleave", (event) => dropping(Boolean(event.relatedTarget)));
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      dropping(false);
      this.takeFile(event.dataTransfer.files[0]);
    });
    document.addEventListener("paste", (event) => this.takeFile(event.clipboardData.files[0]));
  }

  takeFile(file) {
    if (file) this.take({ name: file.name, blob: file });
  }

  /** The examples, or a drawn picture where the bundle has none; the first is taken. */
  async begin() {
    if (this.begun) return;
    const { examples, preprocessing } = this.bundle;
    const sources = [];
    try {
      for (const name of examples) {
        const url = new URL(`examples/${encodeURIComponent(name)}`, BASE).href;
        // Fetched rather than linked: an image element could not send a key.
        sources.push({ name, blob: new Blob([(await call(`examples/${name}`)).data]), example: true, url });
      }
    } catch (error) {
      report(error, () => this.begin());
      return;
    }
    if (!sources.length && [1, 3].includes(preprocessing.channels)) {
      sources.push({ name: "sample.png", blob: await drawnSample(preprocessing), sample: true });
    }
    this.begun = true;
    byId("examples").replaceChildren(...sources.map((source, index) => this.thumbnail(source, index)));
    if (sources.length) await this.take(sources[0]);
  }

  thumbnail(source, index) {
    const name = source.sample ? "Drawn sample" : `Example ${index + 1}`;
    const image = make("img", { src: URL.createObjectURL(source.blob), alt: "" });
    const button = make("button", { type: "button", title: name }, image);
    button.setAttribute("aria-label", name);
    button.addEventListener("click", () => this.take(source));
    source.button = button;
    return button;
  }

  /** Show an image once the server has read it; until then, and where it cannot, the one before stays. */
  async take(source) {
    this.taking?.abort();
    const { signal } = (this.taking = new AbortController());
    clearNotice();
    byId("stage").toggleAttribute("data-busy", true);
    this.features.busy(true);
    try {
      const picture = await this.drawn(source);
      const outputs = this.bundle.outputs.includes("class_attention") ? "patches,attention" : "patches";
      const query = { outputs };
      const answer = await call("embed", { query, body: source.blob, accept: SAFETENSORS, signal });
      const canvas = picture?.canvas ?? (await this.drawnByServer(source, signal));
      this.show(source, canvas, picture);
      const { patches, attention = null } = readSafetensors(answer.data);
      this.features.show(patches, attention);
      showLatency("features", answer);
      const command = curlCommand({ source, path: "embed", query, accept: SAFETENSORS, output: "features.safetensors" });
      byId("copy-embed").onclick = () => copyCommand(command);
      this.completion.take(source, canvas);
    } catch (error) {
      if (error.name !== "AbortError") report(named(error, source), () => this.take(source));
    } finally {
      if (!signal.aborted) {
        byId("stage").toggleAttribute("data-busy", false);
        this.features.busy(false);
      }
    }
  }

  /** The picture, null where the browser cannot read the file. Errors: Problem for what the server would refuse. */
  async drawn({ blob }) {
    const { max_body_bytes: maxBytes, max_pixels: maxPixels, min_side_px: minSide } = this.limits;
    const refuse = (title, detail, hint) => {
      throw new Problem({ title, detail, hint });
    };
    if (!blob.size) refuse("This file is empty", "", "Take another one.");
    if (blob.size > maxBytes) {
      refuse("This file is too large", `It has ${megabytes(blob.size)}; the server takes ${megabytes(maxBytes)}.`, "Save it smaller, then drop it again.");
    }
    // The server has the last word on a file that cannot be drawn: it reads more kinds than a browser.
    const picture = await asModelSees(blob, this.bundle.preprocessing).catch(() => null);
    if (!picture) return null;
    const { fileWidth, fileHeight } = picture;
    const sides = `It has ${fileWidth} × ${fileHeight} pixels; `;
    if (fileWidth * fileHeight > maxPixels) {
      refuse("This picture has too many pixels", `${sides}the server takes ${maxPixels.toLocaleString("en")} in all.`, "Make it smaller, then drop it again.");
    }
    if (Math.min(fileWidth, fileHeight) < minSide) {
      refuse("This picture is too small", `${sides}each side needs at least ${minSide}.`, "Take a larger one.");
    }
    return picture;
  }

  /** What the browser cannot draw (TIFF, NumPy files), the server can where it has a decoder. */
  async drawnByServer({ blob }, signal) {
    const { reconstruct, skip_reconstruct: skip } = this.bundle.capabilities;
    if (!reconstruct && !skip) return null;
    const query = { view: "side_by_side", ...(skip ? { skip_regressor: true } : {}) };
    const { data } = await call("reconstruct", { query, body: blob, accept: "image/png", signal });
    return leftPanel(data, skip ? 2 : 3);
  }

  show(source, canvas, picture) {
    const { width, height } = this.bundle.preprocessing;
    const stage = byId("picture");
    if (canvas) copyCanvas(canvas, stage);
    else Object.assign(stage, { width, height });
    const from = picture ? `${picture.fileWidth} × ${picture.fileHeight} px, seen as ` : "seen as ";
    const undrawn = canvas ? "" : " A browser cannot draw this file, and this bundle has no decoder to do it; its features are as good.";
    const about = [make("b", {}, source.name), ` · ${from}${width} × ${height} px.${undrawn} `];
    if (source.sample) {
      const save = make("a", { href: URL.createObjectURL(source.blob), download: source.name }, "Save it");
      about.push("The bundle brings no examples, so this one is drawn; the model knows best what is like the images it learned from. ", save);
    }
    byId("about-image").replaceChildren(...about);
    for (const button of byId("examples").children) button.setAttribute("aria-pressed", button === source.button);
  }
}

function named(error, source) {
  return Object.assign(error, { file: source.name });
}

const megabytes = (bytes) => (bytes < 1e6 ? `${Math.ceil(bytes / 1000)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);

/** What does not change: the bundle and where it runs. */
function describe({ bundle, bundle_sha256: seal, device }) {
  const { model, preprocessing, capabilities } = bundle;
  const [rows, columns] = model.grid;
  const where = device.provider.replace("ExecutionProvider", "");
  const facts = [model.name, `${rows} × ${columns} patches of ${model.patch_size} px`, where, device.precision];
  byId("facts").replaceChildren(...facts.map((text) => make("li", {}, text)));
  byId("bundle").textContent = `Bundle ${seal.slice(0, 12)}`;
  const walk = "The arrow keys walk over the patches";
  byId("grid-help").textContent = capabilities.reconstruct
    ? `Paint with pointer or finger to mask patches. ${walk}, the space bar masks and unmasks.`
    : `Point at a patch to compare it with the others. ${walk}.`;
  if (![1, 3].includes(preprocessing.channels)) {
    byId("channels-hint").hidden = false;
    byId("channels-hint").textContent =
      `This encoder reads images of ${preprocessing.channels} channels. Drop them as NumPy files (.npy); ` +
      "they are sent as they are, and the page draws the first three channels, or the first one of two.";
    byId("drop-hint").textContent = "or drop a .npy file anywhere";
  }
}

start();
