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

/** What screen readers and the keyboard need of a group. */
function prepare(group, i) {
  const all = items(group);
  group.dataset.group = i;
  group.setAttribute("role", all.length ? "listbox" : "img");
  group.setAttribute("aria-label", group.getAttribute("aria-label") || "The text, token by token");
  all.forEach((item, k) => {
    item.setAttribute("role", "option");
    item.setAttribute("aria-selected", "false");
    item.setAttribute("tabindex", k ? -1 : 0);
    item.setAttribute("aria-label", item.namespaceURI.includes("svg") ? `round ${item.dataset.r}` : item.textContent.trim() || "blank");
  });
  for (const word of group.querySelectorAll(":scope > :not([role])")) word.setAttribute("role", "presentation");
}

/** The children of a group as Python wrote them, without what may change although nothing is to be drawn: the round's number. */
function written(group) {
  return [...group.children].map((child) => {
    const r = child.dataset.r;
    child.removeAttribute("title"); // the line of details says more
    child.removeAttribute("data-r");
    const markup = child.outerHTML;
    if (r !== undefined) child.dataset.r = r;
    return { child, r, markup };
  });
}

/** What Python wrote, taken apart. */
function read(html) {
  const template = document.createElement("template");
  template.innerHTML = html;
  const fresh = [...template.content.querySelectorAll(GROUPS)];
  return { page: template.content, fresh, children: fresh.map(written) };
}

/** Give a group these children, and keep those that it has already. */
function update(group, children) {
  const known = new Map([...group.children].map((child) => [child.markup, child]));
  const next = children.map(({ child, r, markup }) => {
    const own = known.get(markup) ?? child;
    known.delete(markup);
    own.markup = markup;
    if (own.dataset.r !== r) own.dataset.r = r;
    return own;
  });
  const kept = new Set(next);
  for (const child of [...group.children]) if (!kept.has(child)) child.remove(); // several may look alike
  let at = group.firstElementChild;
  for (const child of next) {
    if (child === at) at = at.nextElementSibling;
    else group.insertBefore(child, at);
  }
}

/** Shades of blue in place of fates. */
function shade(view, rows, colour) {
  const values = new Map(rows.map((row) => [String(row.round), row[colour]]));
  for (const cell of view.querySelectorAll("g[data-k]")) {
    const box = cell.querySelector("rect");
    box.dataset.fate ??= box.getAttribute("fill");
    const value = values.get(cell.dataset.r)?.[cell.dataset.k];
    box.setAttribute("fill", colour === "fate" ? box.dataset.fate : value == null ? "none" : `rgba(0,114,178,${0.08 + 0.92 * value})`);
  }
}

/** For screen readers: names of what ipywidgets leaves without, its sliders and the box of the prompt; and a slider's value, not its index. */
function nameControls(controls) {
  for (const box of controls.querySelectorAll("textarea")) box.setAttribute("aria-label", box.placeholder);
  for (const handle of controls.querySelectorAll("[role=slider]")) {
    const of = (part) => handle.closest(".widget-inline-hbox")?.querySelector(part)?.textContent;
    for (const [name, words] of [["aria-label", of(".widget-label")], ["aria-valuetext", of(".widget-readout")]]) {
      if (words && handle.getAttribute(name) !== words) handle.setAttribute(name, words); // else its observer would call again
    }
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
  let drawn = "";
  let slider = null;
  let of = ""; // its name
  let pictures = []; // [html, details] at each of its places
  let gone = false; // the page has removed this view
  const ready = new Map(); // html → read already: what may be shown next

  const light = (item, scroll = true) => {
    for (const lit of view.querySelectorAll(".on, .at")) {
      lit.classList.remove("on", "at");
      if (lit.role === "option") lit.setAttribute("aria-selected", "false");
    }
    const words = item ? describe(item, rows) : IDLE;
    if (line.textContent !== words) line.textContent = words;
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
    if (token && scroll && !box.contains(item)) box.scrollTop = token.offsetTop - box.clientHeight / 2;
  };

  const rove = (item) => {
    for (const other of items(item.closest(GROUPS))) other.setAttribute("tabindex", other === item ? 0 : -1);
  };

  const find = () => {
    const place = held.n === undefined ? "" : `[data-n="${held.n}"]`;
    return view.querySelector(`[data-group="${held.group}"] [data-r="${held.r}"]${place}`) ??
      (place && view.querySelector(`[data-group="${held.group}"] ${place}`));
  };

  const draw = (html, details) => {
    if (html === drawn) return;
    [drawn, rows] = [html, details];
    const focused = view.contains(document.activeElement) && document.activeElement.matches("[data-r]");
    const { page, fresh, children } = ready.get(html) ?? read(html);
    ready.delete(html);
    let groups = [...view.querySelectorAll(GROUPS)];
    if (groups.length === fresh.length) {
      for (const part of [".numbers", ".legend"]) view.querySelector(part).innerHTML = page.querySelector(part).innerHTML;
      groups.forEach((group, i) => {
        for (const { name, value } of fresh[i].attributes) {
          if (name !== "role" && group.getAttribute(name) !== value) group.setAttribute(name, value); // the same again costs a layout
        }
      });
    } else {
      view.replaceChildren(page);
      view.querySelector(".details").replaceWith(line);
      view.querySelector("svg.drafts").before(chooser);
      groups = fresh;
    }
    groups.forEach((group, i) => {
      update(group, children[i]);
      prepare(group, i);
    });
    if (colour !== "fate") shade(view, rows, colour);
    const box = view.querySelector(".text");
    if (box.querySelector(".cursor")) box.scrollTop = box.scrollHeight; // the text grows
    const item = held && find();
    light(item, false);
    if (item && focused) {
      rove(item);
      item.focus({ preventScroll: true });
    }
  };

  /** What Python drew, or the picture at the slider's place, if Python drew one of the same settings at any place. */
  const show = () => {
    const [html, at] = [model.get("html"), slider?.get("index")];
    const own = model.get("slider") === of && pictures.some((picture) => picture?.[0] === html) && pictures[at];
    if (html) draw(...(own || [html, model.get("details")]));
    if (own) (window.requestIdleCallback ?? setTimeout)(() => [at - 1, at + 1].forEach((next) => {
      const [beside] = pictures[next] ?? [];
      if (beside && !ready.has(beside)) ready.set(beside, read(beside));
    }));
  };

  const follow = async () => {
    const [id, bytes] = [model.get("slider"), model.get("pictures")];
    pictures = [];
    ready.clear();
    slider?.off("change:index", show);
    if (!id || !bytes.byteLength) return;
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const [found, known] = await Promise.all([model.widget_manager.get_model(id.replace("IPY_MODEL_", "")), new Response(stream).json()]);
    if (gone || bytes !== model.get("pictures")) return; // newer ones came meanwhile
    [of, slider, pictures] = [id, found, known];
    slider.on("change:index", show);
    show();
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
  model.on("change:html", show);
  model.on("change:stale", stale);
  model.on("change:pictures", follow);
  show();
  stale();
  follow();
  new ResizeObserver((_, placed) => { // once the view has its place in the panel
    const controls = el.closest(".dspark-panel")?.querySelector(".dspark-controls");
    if (!controls) return;
    placed.disconnect();
    nameControls(controls);
    new MutationObserver(() => nameControls(controls)).observe(controls, { childList: true, subtree: true, attributeFilter: ["aria-valuetext"] });
  }).observe(el);
  return () => {
    gone = true;
    slider?.off("change:index", show);
  };
}

export default { render };
