// The operator's page: its key, and when it asks the gateway's admin endpoints for what.

import {
  clear, drawAlarms, drawDecisions, drawFirsts, drawHistory, drawSettings, drawShadow, drawStandings, fit, moveSetting, standing,
} from "./drawing.js";
import { $, moment, write } from "./texts.js";

const OFTEN = 2000; // milliseconds between two looks at the newest decisions
const SLOWLY = 10000; // and at all the rest
const PATIENCE = 30000; // milliseconds until an answer is given up
const NEWEST = "decisions"; // asked for so often that it tells first that nobody is there
const STORED = "deferral-admin-key";
let key = sessionStorage.getItem(STORED);
let run = new AbortController(); // of the looks since something was chosen: what they still wait for is not to be shown
let heard = null; // when it answered last
let answers = 0;
let away = ""; // why nobody is there
const faults = new Map(); // of parts, until they answer again

class Refused extends Error {}

// Each is asked for, shown and waited for by itself, so that none keeps the others waiting.
const parts = (hours) => [
  [NEWEST, drawDecisions, OFTEN], ["experts", drawStandings, SLOWLY], ["alarms", drawAlarms, SLOWLY],
  [`history?hours=${hours}`, drawHistory, SLOWLY], [`what-if?hours=${hours}`, drawSettings, SLOWLY],
  [`first-answers?hours=${hours}`, drawFirsts, SLOWLY], [`shadow?hours=${hours}`, drawShadow, SLOWLY],
];

async function ask(path, signal) {
  const reply = await fetch(`admin/${path}`, {
    headers: { authorization: `Bearer ${key}` }, cache: "no-store", signal: AbortSignal.any([signal, AbortSignal.timeout(PATIENCE)]),
  });
  heard = Date.now();
  answers += 1;
  if (reply.ok) return reply.json();
  // Others on the way may refuse as well, for reasons that have nothing to do with the key.
  const said = (await reply.json().catch(() => null))?.error;
  if (said?.code === "missing_admin_key" || said?.code === "invalid_admin_key") throw new Refused(said.message);
  throw new Error(said?.message ?? `status ${reply.status}`);
}

function enter() {
  if ($("door").hidden) return;
  $("door").hidden = true;
  $("page").hidden = false;
  $("leave").hidden = false;
  $("page").focus({ preventScroll: true });
}

async function look(path, show, signal) {
  const part = path.split("?")[0];
  const before = answers;
  let why = "";
  try {
    const found = await ask(path, signal);
    enter(); // first, for the width of the charts
    show(found);
  } catch (error) {
    if (signal.aborted) return;
    if (error instanceof Refused) return leave(error.message);
    why = error.name === "TimeoutError" ? `no answer within ${PATIENCE / 1000} s` : error.message;
  }
  // Where another part was answered meanwhile, somebody is there.
  if (answers > before) away = "";
  else if (part === NEWEST) away = why;
  if (why) faults.set(part, `${part}: ${why}`);
  else faults.delete(part);
  if (away) faults.clear(); // nobody is there to have them
  tell();
}

async function watch(path, show, every, signal) {
  while (!signal.aborted) {
    await look(path, show, signal);
    await new Promise((done) => setTimeout(done, away ? OFTEN : every)); // when somebody is there again, all is new
  }
}

function tell() {
  const { text, bad } = standing();
  write("state", away
    ? `no answer${heard ? ` since ${moment(heard / 1000)}, what is shown is of then` : ""}: ${away}`
    : [text, ...faults.values()].join("; "));
  $("state").classList.toggle("bad", Boolean(away) || faults.size > 0 || bad);
}

function halt() {
  run.abort();
  run = new AbortController();
  away = "";
  faults.clear();
}

function again() {
  halt();
  if (!key) return;
  for (const part of parts($("hours").value)) watch(...part, run.signal);
}

function leave(why) {
  halt();
  sessionStorage.removeItem(STORED);
  key = heard = null;
  clear();
  $("page").hidden = true;
  $("leave").hidden = true;
  $("door").hidden = false;
  write("refused", why);
  write("state", "not connected");
  $("state").classList.remove("bad");
  $("key").focus();
}

for (const [role, cells] of [["table", "table"], ["rowgroup", "thead, tbody"], ["row", "thead tr"], ["columnheader", "thead th"]]) {
  // As stacked rows on a narrow screen they are tables still.
  for (const each of document.querySelectorAll(cells)) each.setAttribute("role", role);
}
for (const each of document.querySelectorAll("thead th")) each.scope = "col";
$("zone").textContent = `Times are of ${Intl.DateTimeFormat().resolvedOptions().timeZone}.`;
$("door").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = $("key").value.trim();
  $("key").value = "";
  if (!/^[\x21-\x7e]+$/.test(given)) return leave("A key has no spaces, and letters, digits and signs of ASCII alone.");
  key = given;
  write("refused", "");
  write("state", "connecting");
  sessionStorage.setItem(STORED, key);
  again();
});
$("leave").addEventListener("click", () => leave(""));
$("hours").addEventListener("change", again);
$("setting").addEventListener("input", moveSetting);
for (const query of ["(prefers-color-scheme: dark)", "(forced-colors: active)"]) matchMedia(query).addEventListener("change", again);
addEventListener("resize", fit);
$("door").hidden = false; // it does nothing without this script
if (key) again();
else $("key").focus();
