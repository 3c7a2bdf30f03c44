"use strict";
// The operator's page.  Everything it shows comes from the gateway's admin endpoints; texts are set as text, never as markup.

const EVERY = 2000; // milliseconds between two looks at the newest decisions
const SLOWLY = 5; // of those looks, the fifth reads the charts anew
const COLOURS = ["#0b6bcb", "#d9730d", "#2a8c4a", "#8e44ad", "#c2185b", "#00838f", "#827717", "#5d4037"];
const $ = (id) => document.getElementById(id);
const EDGE = { class: "edge", stroke: "transparent", points: { show: false } }; // of a band
const charts = {};
let key = sessionStorage.getItem("deferral-admin-key");
let timer = null;
let looks = 0;
let settings = null;

class Refused extends Error {}

async function ask(path) {
  const reply = await fetch(`admin/${path}`, { headers: { authorization: `Bearer ${key}` }, cache: "no-store" });
  if (reply.status === 401 || reply.status === 403) throw new Refused((await reply.json()).error.message);
  if (!reply.ok) throw new Error(`${path}: the gateway answered ${reply.status}`);
  return reply.json();
}

function element(name, text, ...classes) {
  const made = document.createElement(name);
  made.textContent = text;
  made.classList.add(...classes);
  return made;
}

function row(...cells) {
  const made = document.createElement("tr");
  made.append(...cells.map(([text, ...classes]) => element("td", text, ...classes)));
  return made;
}

const dollars = (value) => `$${Number(value.toPrecision(value < 1000 ? 3 : 6))}`;
const signed = (value) => (value < 0 ? `−${dollars(-value)}` : dollars(value));
const share = (value) => `${(100 * value).toFixed(1)}%`;
const named = (expert) => expert || "(nobody)";
const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function draw(place, options, data) {
  const room = $(place);
  const axis = { stroke: ink("--quiet"), grid: { stroke: ink("--line"), width: 1 }, ticks: { stroke: ink("--line"), width: 1 } };
  if (charts[place]) charts[place].destroy();
  charts[place] = new uPlot(
    { width: room.clientWidth, height: 240, ...options, axes: options.axes.map((each) => ({ ...axis, ...each })) }, data, room,
  );
}

function drawHistory(found) {
  const times = found.requests.map((_, step) => found.start + (step + 0.5) * found.width);
  const experts = Object.keys(found.experts);
  draw("shares", {
    scales: { y: { range: [0, 1] } },
    axes: [{}, { values: (_, ticks) => ticks.map(share), size: 60 }],
    series: [{}, ...experts.map((expert, place) => ({
      label: named(expert), stroke: COLOURS[place % COLOURS.length], width: 2, spanGaps: true,
      points: { show: true, size: 4 }, // a line of one step alone is nothing to see
      value: (_, value) => (value == null ? "" : share(value)),
    }))],
  }, [times, ...experts.map((expert) => found.experts[expert].map(
    (count, step) => (found.requests[step] ? count / found.requests[step] : null)))]);
  let [spent, saved, squares] = [0, 0, 0];
  const sums = found.price.map((price, step) => {
    spent += price;
    saved += found.saving[step];
    squares += found.saving_half[step] ** 2; // independent steps: squares of halves add up
    return [spent, saved, saved - Math.sqrt(squares), saved + Math.sqrt(squares)];
  });
  draw("money", {
    axes: [{}, { values: (_, ticks) => ticks.map(signed), size: 76 }],
    series: [
      {},
      { label: "spent", stroke: COLOURS[1], width: 2, value: (_, value) => (value == null ? "" : signed(value)) },
      { label: "saved", stroke: COLOURS[2], width: 2, value: (_, value) => (value == null ? "" : signed(value)) },
      EDGE, EDGE,
    ],
    bands: [{ series: [4, 3], fill: `${COLOURS[2]}33` }],
  }, [times, ...[0, 1, 2, 3].map((column) => sums.map((each) => each[column]))]);
  return { saved, half: Math.sqrt(squares) };
}

function drawSums(history, standing) {
  const failed = Object.values(history.totals).reduce((sum, each) => sum + each.failed, 0);
  const requests = history.requests.reduce((sum, count) => sum + count, 0);
  const spent = history.price.reduce((sum, price) => sum + price, 0);
  const worth = drawHistory(history);
  const sums = [
    ["requests", String(requests), `${history.routed} routed`],
    ["spent", dollars(spent), history.estimated ? `${history.estimated} prices estimated` : ""],
    ["saved", signed(worth.saved), `± ${dollars(worth.half)}, ${history.compared} answers`],
    ["failed", String(failed), requests ? share(failed / requests) : ""],
  ];
  $("sums").replaceChildren(...sums.map(([name, value, more]) => {
    const made = document.createElement("div");
    const said = element("dd", `${value} `);
    said.append(element("small", more));
    made.append(element("dt", name), said);
    return made;
  }));
  const idle = standing.data.map((each) => each.name).filter((name) => !(name in history.totals));
  $("experts").replaceChildren(...[...Object.keys(history.totals), ...idle].map((name) => {
    const each = history.totals[name] || { requests: 0, failed: 0, price: 0, latency_s: null };
    const at = standing.data.find((one) => one.name === name);
    const quality = (settings && settings.qualities[name]) || null;
    return row(
      [named(name)], [String(each.requests), "number"], [requests ? share(each.requests / requests) : "", "number"],
      [String(each.failed), "number", ...(each.failed ? ["bad"] : [])], [dollars(each.price), "number"],
      [each.latency_s == null ? "" : `${each.latency_s.toFixed(2)} s`, "number"],
      [quality ? `${quality[1].toFixed(3)} (${quality[0]} judged)` : "", "number"],
      [at ? at.breaker : "", ...(at && at.breaker !== "closed" ? ["bad"] : [])], [at ? String(at.queued) : "", "number"],
    );
  }));
}

const units = { // of what an alarm looks at
  unlike: share,
  quality: (value) => `${value <= -0.0005 ? "−" : "+"}${Math.abs(value).toFixed(3)}`,
  price: (value) => `×${value.toFixed(2)}`,
};

function drawAlarms(found) {
  $("alarms").replaceChildren(...found.map((each) => {
    const shown = units[each.name];
    const seen = each.found == null ? ["too few", ""] : [shown(each.found), `${shown(each.low)} to ${shown(each.high)}`];
    const since = new Date(1000 * each.since).toLocaleString([], { dateStyle: "short", timeStyle: "short" });
    return row(
      [each.title], [each.expert || "all"], each.ringing ? [`rings since ${since}`, "bad"] : ["quiet"], [seen[0], "number"],
      [seen[1], "number"], [`${shown(each.least)} to ${each.most == null ? "…" : shown(each.most)}`, "number"],
      [String(each.rows), "number"], [each.meaning],
    );
  }));
  $("watched").textContent = found.length
    ? "Looked for every ten minutes.  What to do is in the runbook, docs/operating.md, in the section of an alarm's name."
    : "Not looked for yet: that is done a few seconds after the start, and then every ten minutes.";
  return found.filter((each) => each.ringing).length;
}

function drawShadow(found) {
  $("shadow").hidden = !found.rows;
  if (!found.rows) return;
  $("agreement").textContent = `Decides as the live router does on ${share(found.agree / found.rows)} ` +
    `[${share(found.low)}, ${share(found.high)}] of ${found.rows} requests; it is not used.`;
  $("pairs").replaceChildren(...found.pairs.map(([live, other, count]) => row(
    [live], [other, ...(live === other ? [] : ["differs"])], [String(count), "number"], [share(count / found.rows), "number"])));
  const gain = found.gain;
  $("gain").textContent = gain
    ? `It would save ${gain.estimate.toFixed(4)} ± ${gain.half.toFixed(4)} errors a query (doubly robust, 95%), ` +
      `${gain.weighted.toFixed(4)} by weights alone, from ${gain.rows} judged answers; where the two differ, ${gain.seen[0]} drew ` +
      `the live choice and ${gain.seen[1]} the candidate's.`
    : `What it would save is not known: ${found.why_no_gain}.`;
}

function drawSettings(found) {
  settings = found;
  const slider = $("setting");
  slider.max = String(Math.max(found.points.length - 1, 0));
  slider.disabled = found.points.length === 0;
  if (!found.points.length) {
    $("said").textContent = "Nothing was routed in this time.";
    $("grounds").textContent = "";
    return;
  }
  if (!slider.dataset.moved) slider.value = String(nearest(found));
  $("grounds").textContent = `From ${found.rows} routed answers, ${found.judged} of them with feedback` +
    (found.judged ? "" : " (the qualities are the router's own estimates)") + `, ${found.explored} by an expert that only exploration asked.` +
    (found.explored ? "" : " Without exploration, what others would have answered is the router's own estimate.");
  showSetting();
}

const nearest = (found) => found.points.reduce(
  (best, point, place) => (Math.abs(Math.log(point.price_of_error / found.present)) <
    Math.abs(Math.log(found.points[best].price_of_error / found.present)) ? place : best), 0);

function showSetting() {
  const { points, present } = settings;
  const chosen = points[Number($("setting").value)];
  const now = points[nearest(settings)];
  const order = [...points].sort((one, other) => one.price - other.price);
  const only = (point) => order.map((each) => (each === point ? each.quality : null));
  draw("curve", {
    scales: { x: { time: false } },
    axes: [
      { values: (_, ticks) => ticks.map((tick) => dollars(tick)), label: "dollars per 1,000 queries", stroke: ink("--quiet") },
      { label: "quality", stroke: ink("--quiet"), size: 60 },
    ],
    series: [
      { label: "price", value: (_, value) => (value == null ? "" : dollars(value)) },
      { label: "quality", stroke: COLOURS[0], width: 2, points: { show: true, size: 5 } },
      EDGE, EDGE,
      { label: "present", stroke: COLOURS[2], points: { show: true, size: 13, fill: COLOURS[2] } },
      { label: "this setting", stroke: COLOURS[1], points: { show: true, size: 11, fill: COLOURS[1] } },
    ],
    bands: [{ series: [3, 2], fill: `${COLOURS[0]}33` }],
  }, [
    order.map((each) => 1000 * each.price), order.map((each) => each.quality),
    order.map((each) => each.quality - each.quality_half), order.map((each) => each.quality + each.quality_half),
    only(now), only(chosen),
  ]);
  const shares = Object.entries(chosen.shares).filter(([, part]) => part > 0).map(([name, part]) => `${name} ${share(part)}`);
  $("said").textContent = `At ${dollars(chosen.price_of_error)} an error (now ${dollars(present)}): ` +
    `${dollars(1000 * chosen.price)} ± ${dollars(1000 * chosen.price_half)} per 1,000 queries, quality ` +
    `${chosen.quality.toFixed(3)} ± ${chosen.quality_half.toFixed(3)}; ${shares.join(", ")}.`;
}

function drawDecisions(found) {
  $("decisions").replaceChildren(...found.data.map((each) => row(
    [new Date(1000 * each.time).toLocaleTimeString(), "number"], [each.requested], [named(each.expert)],
    [each.outcome, ...(each.outcome === "ok" ? [] : ["bad"])],
    [`${dollars(each.price)}${each.estimated ? " (est.)" : ""}`, "number"],
    [each.latency_s == null ? "" : `${each.latency_s.toFixed(2)} s`, "number"], [each.reason],
  )));
}

async function look() {
  clearTimeout(timer);
  try {
    const hours = $("hours").value;
    if (looks % SLOWLY === 0) {
      const [history, standing] = await Promise.all([`history?hours=${hours}`, "experts"].map(ask));
      $("page").hidden = false;
      drawSums(history, standing);
      drawSettings(await ask(`what-if?hours=${hours}`));
      drawSums(history, standing);
      const ringing = drawAlarms((await ask("alarms")).data);
      drawShadow(await ask(`shadow?hours=${hours}`));
      const trouble = standing.trouble || standing.record;
      $("state").textContent = trouble || (ringing ? `in service; alarms of drift: ${ringing}` : "in service");
      $("state").classList.toggle("bad", Boolean(trouble || ringing));
    }
    drawDecisions(await ask("decisions"));
    looks += 1;
    $("leave").hidden = false;
    if (!$("door").hidden) {
      $("door").hidden = true;
      $("page").focus({ preventScroll: true });
    }
  } catch (error) {
    if (error instanceof Refused) return close(error.message);
    $("state").textContent = `no answer: ${error.message}`;
    $("state").classList.add("bad");
    looks = 0;
  }
  timer = setTimeout(look, EVERY);
}

function close(why) {
  clearTimeout(timer);
  sessionStorage.removeItem("deferral-admin-key");
  key = null;
  $("page").hidden = true;
  $("leave").hidden = true;
  $("door").hidden = false;
  $("refused").textContent = why;
  $("state").textContent = "not connected";
  $("state").classList.remove("bad");
  $("key").focus();
}

function again() {
  looks = 0;
  if (key) look();
}

$("door").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  $("key").value = "";
  $("refused").textContent = "";
  sessionStorage.setItem("deferral-admin-key", key);
  again();
});
$("leave").addEventListener("click", () => close(""));
$("hours").addEventListener("change", again);
$("setting").addEventListener("input", (event) => {
  event.target.dataset.moved = "yes";
  showSetting();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
let waiting = null;
addEventListener("resize", () => {
  clearTimeout(waiting);
  waiting = setTimeout(again, 200);
});
if (key) again();
else $("key").focus();
