// The linked view of one run. Python writes its markup (text.py, strips.py) and one row of details per round (rounds.py). Pointing at or
// focusing a token, a draft, a window or a cell of the race lights its round (data-r) everywhere and fills one line of details.

const GROUPS = ".text, svg.linked";
const IDLE = "Point at a token, a draft, a window or a cell of the race (or Tab to one, then arrow keys): its round lights up everywhere.";
const COLOURS = ["fate", "confidence", "p_target"];

const items = (group) => [...group.querySelectorAll("[data-r]:not(.band)")];
const quoted = (text) => `“${text.replaceAll("\n", "↵").replaceAll("\t", "⇥")}”`;
const numbers = (row, k) =>
  ["p_target", "p_draft", "confidence"].map((name) => (row[name][k] == null ? "" : ` · ${name} ${row[name][k].toFixed(2)}`)).join("");

/** What is known about one element, in a line. */
function describe(item, rows) {
  const { r, n, k, c } = item.dataset;
  const row = rows.find((other) => other.round === Number(r));
  if (!row) return `round ${r}`;
  const place = Number(n);
  if (n === undefined || (k === undefined && place - row.start < 0)) {
    const copied = row.copied ? " (copied)" : "";
    return `round ${r} · asked for ${row.window}, drafted ${row.drafts.length}${copied}, verified ${row.verified}, accepted ${row.accepted}` +
      ` · committed ${row.tokens.map(quoted).join(" ")} in ${row.ms.toFixed(1)} ms`;
  }
  const others = (own) => {
    const found = rows.filter((other) => other !== row && other.drafts[place - other.start] !== undefined)
      .map((other) => [quoted(other.drafts[place - other.start]), other.round]).filter(([text]) => !own.includes(text));
    return found.length ? ` · also drafted here: ${found.slice(0, 3).map(([text, round]) => `${text} in round ${round}`).join(", ")}` : "";
  };
  const at = place - row.start;
  if (k !== undefined) {
    const text = quoted(row.drafts[at]);
    const instead = row.states[at] === "rejected" && row.tokens[at] !== undefined ? ` · the text has ${quoted(row.tokens[at])}` : "";
    return `${text} · draft, ${row.states[at]}${row.copied ? " (copied)" : ""} · round ${r}, position ${at + 1}${numbers(row, at)}${instead}${others([text])}`;
  }
  const last = Math.min(at + Number(c ?? 1), row.tokens.length);
  return row.tokens.slice(at, last).map((token, j) => {
    const [i, text] = [at + j, quoted(token)];
    const corrected = row.fates[i] === "correction";
    const instead = corrected ? ` · instead of ${quoted(row.drafts[i])}` : "";
    const known = row.fates[i] === "bonus" ? "" : numbers(row, i);
    return `${text} · ${row.fates[i]} · round ${r}, position ${i + 1}${instead}${known}${others(corrected ? [text, quoted(row.drafts[i])] : [text])}`;
  }).join(" | ");
}

function prepare(view) {
  for (const [i, group] of view.querySelectorAll(GROUPS).entries()) {
    const all = items(group);
    group.dataset.group = i;
    group.setAttribute("role", all.length ? "listbox" : "img");
    group.setAttribute("aria-label", group.getAttribute("aria-label") || "The text, token by token");
    all.forEach((item, k) => {
      item.setAttribute("role", "option");
      item.setAttribute("aria-selected", "false");
      item.setAttribute("tabindex", k ? -1 : 0);
      item.removeAttribute("title"); // the line of details says more
      item.setAttribute("aria-label", item.namespaceURI.includes("svg") ? `round ${item.dataset.r}` : item.textContent.trim() || "blank");
    });
    for (const word of group.querySelectorAll(":scope > :not([role])")) word.setAttribute("role", "presentation");
  }
}

/** Shades of blue in place of fates. */
function shade(view, rows, colour) {
  for (const cell of view.querySelectorAll("g[data-k]")) {
    const box = cell.querySelector("rect");
    box.dataset.fate ??= box.getAttribute("fill");
    const value = rows.find((row) => row.round === Number(cell.dataset.r))?.[colour]?.[cell.dataset.k];
    box.setAttribute("fill", colour === "fate" ? box.dataset.fate : value == null ? "none" : `rgba(0,114,178,${0.08 + 0.92 * value})`);
  }
}

/** Names for screen readers of what ipywidgets leaves without: its sliders and the box of the prompt. */
function nameControls(controls) {
  for (const box of controls.querySelectorAll("textarea")) box.setAttribute("aria-label", box.placeholder);
  for (const handle of controls.querySelectorAll("[role=slider]")) {
    const label = handle.closest(".widget-inline-hbox")?.querySelector(".widget-label");
    if (label) handle.setAttribute("aria-label", label.textContent);
  }
}

function render({ model, el }) {
  const view = document.createElement("div");
  const line = document.createElement("div");
  view.className = "dspark-rounds";
  line.className = "details";
  line.setAttribute("role", "status");
  el.append(view);
  let held = null; // the element that was pointed at last: its group, round, position
  let colour = "fate";
  let rows = [];

  const light = (item) => {
    for (const lit of view.querySelectorAll(".on, .at")) {
      lit.classList.remove("on", "at");
      if (lit.role === "option") lit.setAttribute("aria-selected", "false");
    }
    line.textContent = item ? describe(item, rows) : IDLE;
    if (!item) return;
    const { r, n } = item.dataset;
    held = { group: item.closest(GROUPS)?.dataset.group, r, n };
    for (const same of view.querySelectorAll(`[data-r="${r}"]`)) {
      same.classList.add("on");
      if (n !== undefined && same.dataset.n === n) same.classList.add("at");
    }
    if (item.role === "option") item.setAttribute("aria-selected", "true");
    const box = view.querySelector(".text");
    const token = box.querySelector(".at") ?? box.querySelector(".on");
    if (token && !box.contains(item)) box.scrollTop = token.offsetTop - box.clientHeight / 2;
  };

  const rove = (item) => {
    for (const other of items(item.closest(GROUPS))) other.setAttribute("tabindex", other === item ? 0 : -1);
  };

  const find = () => {
    const place = held.n === undefined ? "" : `[data-n="${held.n}"]`;
    return view.querySelector(`[data-group="${held.group}"] [data-r="${held.r}"]${place}`) ??
      (place && view.querySelector(`[data-group="${held.group}"] ${place}`));
  };

  const draw = () => {
    const focused = view.contains(document.activeElement) && document.activeElement.matches("[data-r]");
    const scrolled = view.querySelector(".text")?.scrollTop ?? 0;
    rows = model.get("details");
    view.innerHTML = model.get("html");
    view.querySelector(".details")?.replaceWith(line);
    prepare(view);
    shade(view, rows, colour);
    const drafts = view.querySelector("svg.drafts");
    if (drafts) drafts.before(chooser);
    const box = view.querySelector(".text");
    if (box) box.scrollTop = model.get("live") ? box.scrollHeight : scrolled;
    const item = held && find();
    light(item);
    if (item && focused) {
      rove(item);
      item.focus({ preventScroll: true });
    }
  };

  const chooser = document.createElement("div");
  chooser.className = "chooser";
  chooser.innerHTML = `<select aria-label="colour of the drafts">${COLOURS.map((name) => `<option value="${name}">by ${name}</option>`).join("")}</select>`;
  chooser.addEventListener("change", (event) => {
    colour = event.target.value;
    shade(view, rows, colour);
  });

  view.addEventListener("pointerover", (event) => {
    const item = event.target.closest("[data-r]");
    if (item) light(item);
  });
  view.addEventListener("focusin", (event) => {
    const item = event.target.closest("[data-r]");
    if (!item) return;
    rove(item);
    light(item);
  });
  view.addEventListener("keydown", (event) => {
    const item = event.target.closest("[data-r]");
    if (!item) return;
    const all = items(item.closest(GROUPS));
    const at = all.indexOf(item);
    const next = {
      ArrowRight: () => all[at + 1],
      ArrowLeft: () => all[at - 1],
      ArrowDown: () => all.find((other, i) => i > at && other.dataset.r !== item.dataset.r),
      ArrowUp: () => all.findLast((other, i) => i < at && other.dataset.r !== item.dataset.r),
      Home: () => all[0],
      End: () => all.at(-1),
    }[event.key];
    if (!next) return;
    event.preventDefault();
    event.stopPropagation();
    next()?.focus();
  });
  const stale = () => view.classList.toggle("stale", model.get("stale"));
  model.on("change:html", draw);
  model.on("change:stale", stale);
  draw();
  stale();
  new ResizeObserver((_, placed) => { // once the view has its place in the panel
    const controls = el.closest(".dspark-panel")?.querySelector(".dspark-controls");
    if (!controls) return;
    placed.disconnect();
    nameControls(controls);
    new MutationObserver(() => nameControls(controls)).observe(controls, { childList: true, subtree: true });
  }).observe(el);
}

export default { render };
