// The operator's page: its key, and when it asks the gateway's admin endpoints for what.

import { clear, drawDecisions, drawFirsts, drawNow, drawSettings, drawShadow, fit, moveSetting } from "./drawing.js";
import { $, moment, write } from "./texts.js";

const EVERY = 2000; // milliseconds between two looks at the newest decisions
const SLOWLY = 5; // of those looks, the fifth reads all the rest anew
const PATIENCE = 30000; // milliseconds until an answer is given up
const ALL = "gateway"; // beside the paths of its parts, in `faults`
const STORED = "deferral-admin-key";
let key = sessionStorage.getItem(STORED);
let run = new AbortController(); // of the looks since something was chosen: what they still wait for is not to be shown
let timer = null;
let looks = 0;
let heard = null; // when it answered last
const faults = new Map(); // of parts, until they answer again
let standing = { text: "", bad: false };

class Refused extends Error {}
class Failed extends Error {}

async function ask(path, signal) {
  const reply = await fetch(`admin/${path}`, {
    headers: { authorization: `Bearer ${key}` }, cache: "no-store", signal: AbortSignal.any([signal, AbortSignal.timeout(PATIENCE)]),
  });
  if (reply.ok) return reply.json();
  // Others on the way may refuse as well, for reasons that have nothing to do with the key.
  const said = (await reply.json().catch(() => null))?.error;
  if (said?.code === "missing_admin_key" || said?.code === "invalid_admin_key") throw new Refused(said.message);
  throw new Failed(`${path}: ${said?.message ?? `status ${reply.status}`}`);
}

function enter(...found) {
  $("page").hidden = false; // first, for the width of the charts
  $("leave").hidden = false;
  const standing = drawNow(...found);
  if (!$("door").hidden) {
    $("door").hidden = true;
    $("page").focus({ preventScroll: true });
  }
  return standing;
}

async function look(mine) {
  const hours = $("hours").value;
  const parts = [[["decisions"], drawDecisions]];
  if (looks % SLOWLY === 0) {
    parts.unshift([[`history?hours=${hours}`, "experts", "alarms"], enter]);
    parts.push([[`what-if?hours=${hours}`], drawSettings], [[`first-answers?hours=${hours}`], drawFirsts]);
    parts.push([[`shadow?hours=${hours}`], drawShadow]);
  }
  looks += 1;
  for (const [paths, show] of parts) {
    let fault = "";
    try {
      standing = show(...await Promise.all(paths.map((path) => ask(path, mine.signal)))) ?? standing;
    } catch (error) {
      if (mine.signal.aborted) return;
      if (error instanceof Refused) return leave(error.message);
      fault = error.message;
      if (!(error instanceof Failed)) {
        // Nobody is there, and when somebody is again, all is new.
        tell(ALL, fault);
        looks = 0;
        break;
      }
    }
    tell(ALL, "");
    tell(paths[0], fault);
  }
  timer = setTimeout(look, EVERY, mine);
}

function tell(part, fault) {
  faults.delete(part);
  if (fault) faults.set(part, fault);
  const away = faults.get(ALL);
  if (!away) heard = Date.now();
  write("state", away
    ? `no answer${heard ? ` since ${moment(heard / 1000)}, what is shown is of then` : ""}: ${away}`
    : [standing.text, ...faults.values()].filter(Boolean).join("; "));
  $("state").classList.toggle("bad", faults.size > 0 || standing.bad);
}

function halt() {
  clearTimeout(timer);
  run.abort();
  run = new AbortController();
  looks = 0;
  faults.clear();
}

function again() {
  halt();
  if (key) look(run);
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
if (key) again();
else $("key").focus();
