// Figures as they are read, and tables of texts: set as text, never as markup.

export const $ = (id) => document.getElementById(id);
const filled = {};

export function element(name, text, ...classes) {
  const made = document.createElement(name);
  made.textContent = text;
  made.classList.add(...classes);
  return made;
}

// Rows of [text, classes ...]; the table stays untouched where nothing is new, for whoever reads or marks something in it.
export function fill(place, rows) {
  const same = JSON.stringify(rows);
  if (filled[place] === same) return;
  filled[place] = same;
  const heads = [...$(place).parentElement.tHead.rows[0].cells].map((cell) => cell.textContent);
  $(place).replaceChildren(...rows.map((cells) => {
    const made = element("tr", "");
    made.append(...cells.map(([text, ...classes], column) => {
      const cell = element(column ? "td" : "th", text, ...classes);
      if (!column) cell.scope = "row";
      cell.dataset.head = heads[column];
      cell.dir = "auto";
      cell.setAttribute("role", column ? "cell" : "rowheader");
      return cell;
    }));
    made.setAttribute("role", "row");
    return made;
  }));
}

export function write(place, text) {
  if ($(place).textContent !== text) $(place).textContent = text; // said again, it would be read out again
}

export function empty() {
  for (const place of Object.keys(filled)) fill(place, []);
}

export const known = (value) => typeof value === "number" && Number.isFinite(value);
export const number = (value, options) => (known(value) ? new Intl.NumberFormat("en", options).format(value) : "not known");
export const whole = (value) => number(value, { maximumFractionDigits: 0 });
export const fixed = (value, digits) => number(value, { minimumFractionDigits: digits, maximumFractionDigits: digits });
// Three digits, and of what is less than a billionth none, as in `deferral gateway status`: that is what sums of floats leave over.
const SMALL = { maximumSignificantDigits: 3, maximumFractionDigits: 9, roundingPriority: "lessPrecision" };
const size = (value) => `$${number(value, Math.abs(value) < 999.5 ? SMALL : { maximumFractionDigits: 0 })}`;
export function dollars(value) {
  if (!known(value)) return "not known";
  const text = size(Math.abs(value));
  return value < 0 && text !== "$0" ? `−${text}` : text;
}
export const share = (value) => (known(value) ? `${fixed(100 * value, 1)}%` : "not known");
export const seconds = (value) => (known(value) ? `${fixed(value, 2)} s` : "");
export const half = (value, text) => (known(value) ? ` ± ${text(value)}` : "");
export const named = (expert) => expert || "(nobody)";
const FEW = 5;
export const few = (names) => names.slice(0, FEW).join(", ") + (names.length > FEW ? ` and ${whole(names.length - FEW)} more` : "");
export const short = (text) => (text.length > 60 ? `${text.slice(0, 59)}…` : text);
export const sum = (values) => values.reduce((total, value) => total + value, 0);

export function moment(time) {
  const when = new Date(1000 * time);
  const today = when.toDateString() === new Date().toDateString();
  return today ? when.toLocaleTimeString() : when.toLocaleString([], { dateStyle: "short", timeStyle: "medium" });
}

// Of a chart's axis, `step` seconds apart: the day where it is another one than before.
export function ticks(times, step) {
  const days = times.map((time) => new Date(1000 * time).toLocaleDateString([], { day: "numeric", month: "short" }));
  if (step >= 86400) return days;
  return times.map((time, place) => {
    const hour = new Date(1000 * time).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
    return days[place] === days[place - 1] ? hour : `${hour}\n${days[place]}`;
  });
}
