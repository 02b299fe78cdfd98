// The lines under a slider: speed-up and τ at every place it can take, with a dot on each where it is now. Plain decoding is 1 on both.

const LOOKS = [["rgb(0,114,178)", ""], ["rgb(213,94,0)", "5 3"]];
const [FLOOR, HIGH] = [62, 50];

function render({ model, el }) {
  const view = document.createElement("div");
  view.style.cssText = "font:12px/1.4 var(--jp-ui-font-family,system-ui,sans-serif);color:var(--jp-content-font-color1,inherit)";
  el.append(view);

  let slider = null;
  let of; // its name
  let gone = false; // the page has removed this view
  const draw = () => {
    if (of !== model.get("slider")) return; // the lines are of a slider that is still to be found
    const lines = Object.entries(model.get("lines"));
    view.hidden = !slider || !lines.length;
    if (view.hidden) return;
    const places = slider.get("_options_labels");
    const at = slider.get("index");
    const known = lines.flatMap(([, ys]) => ys).filter((y) => y !== null);
    const [low, high] = [Math.min(1, ...known), Math.max(1.01, ...known)];
    const x = (i) => (100 * i) / Math.max(places.length - 1, 1);
    const y = (value) => FLOOR - (HIGH * (value - low)) / (high - low);
    const parts = lines.map(([name, ys], k) => {
      const points = ys.map((value, i) => (value === null ? "" : `${x(i)},${y(value)}`)).join(" ");
      const [colour, dash] = LOOKS[k % LOOKS.length];
      const now = ys[at] === null ? "" : `<circle cx="${x(at)}%" cy="${y(ys[at])}" r="5" fill="${colour}" stroke="white"/>`;
      return `<svg width="100%" height="${FLOOR}" viewBox="0 0 100 ${FLOOR}" preserveAspectRatio="none" overflow="visible">
        <polyline points="${points}" fill="none" stroke="${colour}" stroke-width="2" stroke-dasharray="${dash}" vector-effect="non-scaling-stroke"/>
        </svg>${now}`;
    });
    const [first, ys] = lines[0];
    const best = ys.reduce((top, value, i) => (value > (ys[top] ?? -1) ? i : top), 0);
    const words = lines.map(([name, values]) => `${name} ${values[at]?.toFixed(2) ?? "impossible"}`).join(", ");
    const label = `On the trace, at ${places[at]}: ${words}. Best ${first} ${ys[best].toFixed(2)} at ${places[best]}`;
    const keys = lines.map(([name], k) => `<span style="border-bottom:2px ${LOOKS[k % LOOKS.length][1] ? "dashed" : "solid"} ${LOOKS[k % LOOKS.length][0]}">${name}</span> ${
      lines[k][1][at]?.toFixed(2) ?? "–"}`).join(" · ");
    const last = places.length - 1;
    const marks = [0, best, last].filter((i) => i === best || Math.abs(i - best) > last / 3).map((i) =>
      `<text x="${x(i)}%" y="${FLOOR + 16}" text-anchor="middle">${i === best ? "best " : ""}${places[i]}</text>`).join("");
    view.innerHTML = `<div>on the trace: ${keys}</div>
      <svg role="img" aria-label="${label}" height="${FLOOR + 20}" fill="currentColor"
        style="display:block;overflow:visible;margin-left:118px;width:calc(100% - 161px)">
        <line x1="0" x2="100%" y1="${y(1)}" y2="${y(1)}" stroke="rgba(128,128,128,.5)"/>
        <text x="-8" y="${y(1) + 4}" text-anchor="end">plain 1</text>
        <text x="-8" y="${y(high) + 4}" text-anchor="end">${high.toFixed(1)}</text>${parts.join("")}${marks}</svg>`;
  };
  const follow = async () => {
    const id = model.get("slider");
    const found = id && (await model.widget_manager.get_model(id.replace("IPY_MODEL_", "")));
    if (gone || id !== model.get("slider")) return; // another one came meanwhile
    slider?.off("change:index", draw);
    [of, slider] = [id, found];
    slider?.on("change:index", draw);
    draw();
  };
  model.on("change:slider", follow);
  model.on("change:lines", draw);
  follow();
  return () => {
    gone = true;
    slider?.off("change:index", draw);
  };
}

export default { render };
