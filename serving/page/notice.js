// Messages to the person: what went wrong, and the command that was copied.

import { byId } from "./dom.js";

const box = byId("notice");
const retry = byId("retry");
let timer = null;

export function clearNotice() {
  clearInterval(timer);
  box.hidden = true;
}

/** A Problem, with a button that calls `again` no earlier than the server allows. */
export function showProblem(problem, again) {
  clearInterval(timer);
  box.querySelector("strong").textContent = problem.title;
  box.querySelector("p").textContent = [problem.detail, problem.hint].filter(Boolean).join(" ");
  box.querySelector("small").textContent = [problem.file, problem.requestId && `Request ${problem.requestId}`]
    .filter(Boolean)
    .join(" · ");
  box.hidden = false;
  retry.hidden = problem.retryAfter === null || !again;
  if (retry.hidden) return;
  retry.onclick = () => {
    clearNotice();
    again();
  };
  let left = problem.retryAfter;
  const tick = () => {
    retry.disabled = left > 0;
    retry.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    if (left-- <= 0) clearInterval(timer);
  };
  tick();
  timer = setInterval(tick, 1000);
}

byId("dismiss").addEventListener("click", clearNotice);

const command = byId("command");

/** Copy a command, and show it: where the browser does not let a page copy, the person can. */
export async function copyCommand(text) {
  const code = command.querySelector("code");
  code.textContent = text;
  command.hidden = false;
  let message = "Copied. It repeats this call:";
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    getSelection().selectAllChildren(code);
    message = "Press Ctrl+C or ⌘C to copy:";
  }
  command.querySelector("p").textContent = message;
}

command.querySelector("button").addEventListener("click", () => (command.hidden = true));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") command.hidden = true;
});
