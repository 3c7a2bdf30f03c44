// What each part of the page shows of what the gateway answered.

import { $, dollars, element, empty, few, fill, fixed, half, known, moment, named, number, seconds, share, short, sum, ticks, whole, write } from "./texts.js";

const LINES = 8; // that a chart can tell apart
const EDGE = { class: "edge", stroke: "transparent", points: { show: false } }; // of an interval
const HOURS = { space: 75, values: (_, times, axis, space, step) => ticks(times, step) };
const TIME = { label: "time", value: (_, time) => (known(time) ? moment(time) : "") };
const charts = {};
let history = null;
let experts = null; // as they are at present
let alarms = [];
let settings = null;
let wish = null; // the price of an error that the slider was moved to

const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (place) => ink(`--c${place}`);

function draw(place, label, options, data) {
  const room = $(place);
  room.setAttribute("aria-label", label);
  const shape = JSON.stringify([options.series.map((each) => each.label), ink("--paper"), ink("--quiet")]);
  const before = charts[place];
  if (before?.shape === shape) {
    before.plot.setData(data); // whoever points at it goes on to
    return fit();
  }
  before?.plot.destroy();
  const axis = { stroke: ink("--quiet"), grid: { stroke: ink("--line"), width: 1 }, ticks: { stroke: ink("--line"), width: 1 } };
  const plot = new uPlot({
    width: room.clientWidth, height: 240, cursor: { drag: { x: false } },
    legend: { markers: { dash: (plot, line) => (plot.series[line].dash ? "dashed" : "solid") } },
    ...options, axes: options.axes.map((each) => ({ ...axis, ...each })),
  }, data, room);
  charts[place] = { shape, plot };
}

function drawShares(found) {
  const times = found.requests.map((_, step) => found.start + (step + 0.5) * found.width);
  const most = Object.entries(found.experts).sort(([, one], [, other]) => sum(other) - sum(one));
  const several = most.length > LINES ? most.splice(LINES - 1) : [];
  // By name, so that a line keeps its colour while the shares change.
  const lines = most.sort(([one], [other]) => (one < other ? -1 : 1));
  if (several.length) {
    lines.push([`${several.length} others`, found.requests.map((_, step) => sum(several.map(([, counts]) => counts[step])))]);
  }
  const requests = sum(found.requests);
  const parts = lines.map(([name, counts]) => `${named(name)} ${share(sum(counts) / requests)}`);
  draw("shares", requests ? `Share of the requests that each expert answered: ${parts.join(", ")}` : "No requests in this time", {
    scales: { y: { range: [0, 1] } },
    axes: [HOURS, { values: (_, found) => found.map(share), size: 60 }],
    series: [TIME, ...lines.map(([name], place) => ({
      label: named(name), stroke: colour(place), width: 2, spanGaps: true, dash: place % 2 ? [6, 3] : undefined,
      points: { show: true, size: 4 }, // a line of one step alone is nothing to see
      value: (_, value) => (known(value) ? share(value) : ""),
    }))],
  }, [times, ...lines.map(([, counts]) => counts.map((count, step) => (found.requests[step] ? count / found.requests[step] : null)))]);
}

function drawMoney(found) {
  const times = found.requests.map((_, step) => found.start + (step + 0.5) * found.width);
  let [spent, saved] = [0, 0];
  const sums = found.price.map((price, step) => {
    spent += price;
    saved += found.saving[step];
    const doubt = found.saving_half[step] ?? 0;
    return [spent, saved, saved - doubt, saved + doubt];
  });
  const value = (_, each) => (known(each) ? dollars(each) : "");
  draw("money", `Summed over time: spent ${dollars(spent)}, saved against always the best expert ${dollars(saved)}`, {
    axes: [HOURS, { values: (_, found) => found.map(dollars), size: 76 }],
    series: [
      TIME,
      { label: "spent", stroke: colour(1), width: 2, value },
      { label: "saved", stroke: colour(2), width: 2, dash: [6, 3], value },
      EDGE, EDGE,
    ],
    bands: [{ series: [4, 3], fill: `${colour(2)}33` }],
  }, [times, ...[0, 1, 2, 3].map((column) => sums.map((each) => each[column]))]);
}

function drawSums() {
  const requests = sum(history.requests);
  const failed = sum(Object.values(history.totals).map((each) => each.failed));
  const saved = sum(history.saving);
  const doubt = history.saving_half.at(-1);
  const sums = [
    ["requests", whole(requests), `${whole(history.routed)} routed`],
    ["spent", dollars(sum(history.price)), history.estimated ? `${whole(history.estimated)} prices estimated` : ""],
    ["saved", history.compared ? dollars(saved) : "not known",
      history.compared ? `${known(doubt) ? `±\u00a0${dollars(doubt)}, ` : ""}${whole(history.compared)} answers` : "no routed answers"],
    ["failed", whole(failed), requests ? share(failed / requests) : ""],
  ];
  $("sums").replaceChildren(...sums.map(([name, value, more]) => {
    const made = element("div", "");
    const said = element("dd", `${value} `);
    said.append(element("small", more));
    made.append(element("dt", name), said);
    return made;
  }));
}

function drawExperts() {
  const totals = history?.totals ?? {};
  const none = history ? { requests: 0, failed: 0, price: 0 } : {}; // or not known yet
  const requests = history ? sum(history.requests) : 0;
  const present = new Map(experts?.data.map((each) => [each.name, each]));
  const names = Object.keys(totals).sort((one, other) => totals[other].requests - totals[one].requests);
  const idle = [...present.keys()].filter((name) => !Object.hasOwn(totals, name));
  fill("experts", [...names, ...idle].map((name) => {
    const each = Object.hasOwn(totals, name) ? totals[name] : none;
    const at = present.get(name);
    const quality = settings && Object.hasOwn(settings.qualities, name) ? settings.qualities[name] : null;
    return [
      [named(name)], [whole(each.requests), "number"], [requests ? share(each.requests / requests) : "", "number"],
      [whole(each.failed), "number", ...(each.failed ? ["bad"] : [])], [dollars(each.price), "number"],
      [seconds(each.latency_s), "number"], [quality ? `${fixed(quality[1], 3)} (${whole(quality[0])} judged)` : "", "number"],
      [at ? breakers(at) : "", ...(at && (at.away || at.breaker !== "closed") ? ["bad"] : [])], [at ? whole(at.queued) : "", "number"],
    ];
  }));
}

// Of an expert with several addresses how many of them are not asked, too.
function breakers(at) {
  return at.addresses > 1 && at.away ? `${at.breaker}, ${whole(at.away)} of ${whole(at.addresses)} addresses not asked` : at.breaker;
}

const units = { // of what an alarm looks at
  unlike: share,
  quality: (value) => `${value <= -0.0005 ? "−" : "+"}${fixed(Math.abs(value), 3)}`,
  price: (value) => `×${fixed(value, 2)}`,
};

export function drawAlarms(found) {
  alarms = found.data;
  fill("alarms", alarms.map((each) => {
    const text = units[each.name] ?? String;
    const seen = each.found == null ? ["too few", ""] : [text(each.found), `${text(each.low)} to ${text(each.high)}`];
    const since = new Date(1000 * each.since).toLocaleString([], { dateStyle: "short", timeStyle: "short" });
    return [
      [each.title], [each.expert || "all"], each.ringing ? [`rings since ${since}`, "bad"] : ["quiet"], [seen[0], "number"],
      [seen[1], "number"], [`${text(each.least)} to ${each.most == null ? "…" : text(each.most)}`, "number"],
      [whole(each.rows), "number"], [each.meaning, "long"],
    ];
  }));
  write("watched", alarms.length
    ? "Looked for every ten minutes.  What to do is in the runbook, docs/operating.md, in the section of an alarm's name."
    : "Not looked for yet: that is done a few seconds after the start, and then every ten minutes.");
}

export function drawHistory(found) {
  history = found;
  drawSums();
  drawShares(found);
  drawMoney(found);
  drawExperts();
}

export function drawStandings(found) {
  experts = found;
  drawExperts();
}

// How the gateway stands.
export function standing() {
  if (!experts) return { text: "connecting", bad: false };
  const open = experts.data.filter((each) => each.breaker !== "closed").map((each) => each.name);
  const ringing = alarms.filter((each) => each.ringing).length;
  const troubles = [
    experts.trouble || experts.record, open.length ? `not asked at present: ${few(open)}` : "",
    ringing ? `alarms of drift: ${ringing}` : "",
  ].filter(Boolean);
  return { text: [...(experts.trouble ? [] : ["in service"]), ...troubles].join("; "), bad: troubles.length > 0 };
}

export function drawFirsts(found) {
  $("firsts").hidden = !found.experts.length;
  fill("first-answers", found.experts.map((each) => [
    [each.first], [whole(each.requests), "number"],
    ...["kept", "deferred", "failed", "silent", "unanswered"].map((ending) => [
      each.endings[ending] ? `${whole(each.endings[ending])} (${share(each.endings[ending] / each.requests)})` : "0", "number"]),
    [dollars(each.extra), "number"],
  ]));
  write("newest", `Of the newest ${whole(found.looked)} requests in this time.  An answer is kept where its log-probabilities are good enough, ` +
    "else another expert is asked, and both are paid.");
}

export function drawShadow(found) {
  $("shadow").hidden = !found.rows;
  fill("pairs", found.pairs.map(([live, other, count]) => [
    [live], [other, ...(live === other ? [] : ["differs"])], [whole(count), "number"], [share(count / found.rows), "number"]]));
  if (!found.rows) return;
  write("agreement", `Decides as the live router does on ${share(found.agree / found.rows)} ` +
    `[${share(found.low)}, ${share(found.high)}] of ${whole(found.rows)} requests; it is not used.`);
  const gain = found.gain;
  write("gain", gain
    ? `It would save ${fixed(gain.estimate, 4)} ± ${fixed(gain.half, 4)} errors a query (doubly robust, 95%), ` +
      `${fixed(gain.weighted, 4)} by weights alone, from ${whole(gain.rows)} judged answers; where the two differ, ` +
      `${whole(gain.seen[0])} different queries drew the live choice and ${whole(gain.seen[1])} the candidate's.`
    : `What it would save is not known: ${found.why_no_gain}.`);
}

export function drawSettings(found) {
  settings = found;
  drawExperts();
  const slider = $("setting");
  slider.max = String(Math.max(found.points.length - 1, 0));
  slider.disabled = found.points.length < 2;
  $("curve").hidden = !found.points.length;
  if (!found.points.length) {
    slider.removeAttribute("aria-valuetext");
    write("said", "Nothing was routed in this time.");
    return write("grounds", "");
  }
  slider.value = String(nearest(found, wish ?? found.present));
  write("grounds", `From ${whole(found.rows)} routed answers, ${whole(found.judged)} of them with feedback` +
    (found.judged ? "" : " (the qualities are the router's own estimates)") +
    `, ${whole(found.explored)} by an expert that only exploration asked.` +
    (found.explored ? "" : " Without exploration, what others would have answered is the router's own estimate."));
  showSetting();
}

const nearest = (found, price) => found.points.reduce(
  (best, point, place) => (Math.abs(Math.log(point.price_of_error / price)) <
    Math.abs(Math.log(found.points[best].price_of_error / price)) ? place : best), 0);

// A bar where there is an interval: a band would make up what lies between.
function intervals(plot) {
  const { ctx } = plot;
  ctx.save();
  ctx.beginPath();
  for (const each of settings.points.filter((point) => known(point.quality_half))) {
    const left = plot.valToPos(1000 * each.price, "x", true);
    ctx.moveTo(left, plot.valToPos(each.quality - each.quality_half, "y", true));
    ctx.lineTo(left, plot.valToPos(each.quality + each.quality_half, "y", true));
  }
  ctx.lineWidth = 2 * devicePixelRatio;
  ctx.strokeStyle = colour(0);
  ctx.stroke();
  ctx.restore();
}

function showSetting() {
  const { points, present } = settings;
  const chosen = points[Number($("setting").value)];
  const now = points[nearest(settings, present)];
  const order = [...points].sort((one, other) => one.price - other.price);
  const edge = (sign) => order.map((each) => (known(each.quality_half) ? each.quality + sign * each.quality_half : null));
  const only = (wanted) => order.map((each) => (wanted(each) ? each.quality : null));
  const value = (_, each) => (known(each) ? fixed(each, 3) : "");
  const spots = (diameter, stroke, fillings) => ({ paths: () => null, stroke, points: { show: true, size: diameter, fill: fillings }, value });
  draw("curve", "Quality against price at other settings of the price of an error; bars are 95% intervals; the slider below reads all out", {
    scales: { x: { time: false } },
    axes: [
      { values: (_, found) => found.map(dollars), label: "dollars per 1,000 queries" },
      { values: (_, found) => found.map((tick) => number(tick, { maximumSignificantDigits: 3 })), label: "quality", size: 60 },
    ],
    series: [
      { label: "price", value: (_, each) => (known(each) ? dollars(each) : "") },
      { label: "quality", stroke: colour(0), width: 2, points: { show: true, size: 5 }, value },
      EDGE, EDGE,
      { label: "by estimate alone", ...spots(7, colour(0), ink("--paper")) },
      { label: "present", ...spots(15, colour(2), colour(2)) },
      { label: "this setting", ...spots(9, colour(1), colour(1)) },
    ],
    hooks: { draw: [intervals] },
  }, [
    order.map((each) => 1000 * each.price), order.map((each) => each.quality),
    edge(-1), edge(1),
    only((each) => each.quality_half == null), only((each) => each === now), only((each) => each === chosen),
  ]);
  const shares = Object.entries(chosen.shares).filter(([, part]) => part > 0).sort(([, one], [, other]) => other - one);
  const others = shares.splice(LINES);
  if (others.length) shares.push([`${others.length} others`, sum(others.map(([, part]) => part))]);
  const guess = (what, names) => (names.length
    ? `  The ${what} is the router's own estimate, without an interval: too few answers of ${names.join(", ")} to such queries ` +
      `${what === "quality" ? "were judged" : "are on record"}.` : "");
  const at = `At ${dollars(chosen.price_of_error)} an error (now ${dollars(present)}): ` +
    `${dollars(1000 * chosen.price)}${half(chosen.price_half, (each) => dollars(1000 * each))} per 1,000 queries, quality ` +
    `${fixed(chosen.quality, 3)}${half(chosen.quality_half, (each) => fixed(each, 3))}; ${shares.map(([name, part]) => `${name} ${share(part)}`).join(", ")}.`;
  write("said", at + guess("price", chosen.price_guessed) + guess("quality", chosen.quality_guessed));
  $("setting").setAttribute("aria-valuetext", at);
}

export function drawDecisions(found) {
  fill("decisions", found.data.map((each) => [
    [moment(each.time), "number"], [short(each.requested)], [named(each.expert)], [each.outcome, ...(each.outcome === "ok" ? [] : ["bad"])],
    [`${dollars(each.price)}${each.estimated ? " (est.)" : ""}`, "number"], [seconds(each.latency_s), "number"], [each.reason, "long"],
  ]));
}

export function moveSetting() {
  wish = settings.points[Number($("setting").value)].price_of_error;
  showSetting();
}

export function fit() {
  for (const [place, { plot }] of Object.entries(charts)) {
    const width = $(place).clientWidth;
    if (width && width !== plot.width) plot.setSize({ width, height: plot.height });
  }
}

export function clear() {
  history = experts = settings = wish = null;
  alarms = [];
  for (const place of Object.keys(charts)) {
    charts[place].plot.destroy();
    delete charts[place];
  }
  empty();
  for (const place of ["sums", "said", "grounds", "agreement", "gain"]) $(place).replaceChildren();
}
