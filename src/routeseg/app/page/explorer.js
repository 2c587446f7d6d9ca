// The explorer's page: what the network makes of one image, while one drags the budget or closes paths.
// `element` is the page, `server` the Python functions of Explorer. At most one question is on its way: whatever changes
// meanwhile is in the next one, so no answer is ever about an old state.
const $ = (name) => element.querySelector(".rs-" + name);
const SVG = "http://www.w3.org/2000/svg";
const UNITS = { share: (v) => (100 * v).toFixed(0) + " % of the full network", gmacs: (v) => v.toPrecision(3) + " GMACs", ms: (v) => v.toPrecision(3) + " ms" };
const PITCH = { x: 46, y: 40, left: 88, top: 24 };
const STEP = [-1, 0, 1]; // scales that an edge climbs down: up, keep, down
const CHANGED = [213, 94, 0];

const state = {
  about: null, picture: null, image: null, unit: "share", asks: false, route: null, places: null, own: null, kept: null, against: "",
  source: null, view: null, labels: null, other: null, busy: false, stale: false, marked: null, answers: 0,
};
element.routeseg = state; // for tests, and for the curious

// --- Asking ---------------------------------------------------------------------------------------------------------

async function ask() {
  if (!state.picture) return;
  if (state.busy) { state.stale = true; return; }
  state.busy = true;
  do {
    state.stale = false;
    const question = {
      picture: state.picture.picture, precision: $("precision").value,
      route: state.route && [...state.route].map(edgeOf), budget: state.asks && !state.route ? budget() : null,
      places: state.places, against: against(),
    };
    try { await show(await server.look(question)); } catch (error) { complain("The server does not answer: " + (error.message || error)); }
  } while (state.stale);
  state.busy = false;
}

function against() {
  if (state.against === "own") return state.route ? state.own : null;
  if (state.against === "kept") return state.kept;
  return state.against || null;
}

async function open(question) {
  complain("");
  element.classList.add("rs-waiting");
  let answer;
  try { answer = await server.open(question); } catch (error) { answer = { error: "The server does not take it: " + (error.message || error) }; }
  element.classList.remove("rs-waiting");
  if (answer.error) { complain(answer.error); return; }
  const image = new Image();
  image.src = answer.image;
  await image.decode();
  Object.assign(state, { picture: answer, image: pixelsOf(image), view: null, labels: null, route: null, places: null, own: null });
  if (state.against === "own") $("against").value = state.against = "";
  $("labels").disabled = $("keep").disabled = false;
  setRange();
  await ask();
}

function complain(text) {
  const line = $("error");
  line.hidden = !text;
  line.textContent = text;
}

// --- Budget -----------------------------------------------------------------------------------------------------------

function budget() {
  const range = state.picture.range;
  if (!range) return null;
  const [low, high] = range[state.unit];
  return { value: low + ($("range").value / 1000) * (high - low), unit: state.unit };
}

function setRange() {
  const slider = $("range"), known = state.picture && state.picture.range;
  slider.disabled = !known;
  const asked = known ? budget() : null;
  const text = !asked || !state.asks ? "what helps" : UNITS[state.unit](asked.value);
  $("asked").textContent = state.route ? "a route of your own" : state.places ? "places of your own" : text;
  slider.setAttribute("aria-valuetext", text);
}

// --- Answers ----------------------------------------------------------------------------------------------------------

async function show(view) {
  if (view.error) { complain(view.error); return; }
  complain("");
  state.labels = await unpack(view.labels);
  state.other = view.against ? await unpack(view.against.labels) : null;
  state.view = view;
  state.answers += 1;
  if (!state.route && !state.places) state.own = view.open.map((edge) => edge.slice(0, 3));
  element.querySelector('[data-page="picture"]').classList.add("rs-shown");
  $("reset").hidden = !state.route && !state.places;
  setRange();
  paint();
  numbers(view);
  drawRoute(view);
  legend(view);
}

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const data = await new Response(stream).arrayBuffer();
  return new (state.about.classes.length > 256 ? Uint16Array : Uint8Array)(data);
}

function pixelsOf(image) {
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

function paint() {
  if (!state.view) return;
  const changes = $("changes"), effort = effortShown();
  changes.disabled = !state.other;
  $("effort").disabled = !state.view.effort;
  $("other").hidden = !state.other;
  $("scale").hidden = !effort;
  $("this").querySelector("canvas").setAttribute("aria-label", effort ? "How far each place went" : "Segmentation");
  paintOn($("this"), state.labels, changes.checked && state.other, effort);
  const name = state.picture.name, title = state.route ? "your route" : state.places ? "places as you want them" : state.asks ? "the network, for this budget" : "the network's own choice";
  $("this").querySelector("figcaption").textContent = name + ": " + title + (effort ? "; how far each place went" : "");
  if (!state.other) return;
  paintOn($("other"), state.other, null, null);
  const other = state.view.against;
  const score = other.score === null ? "" : ", mIoU " + (100 * other.score).toFixed(1) + " %";
  $("other").querySelector("figcaption").textContent = theirs() + ": " +
    other.gmacs.toPrecision(3) + " GMACs, " + other.ms.toFixed(0) + " ms" + score;
}

const effortShown = () => $("effort").checked && state.view.effort;
const theirs = () => state.places ? "what the network chose" : $("against").selectedOptions[0].textContent;

// Row and column of the place of a pixel; places are squares of the image as it was looked at.
function placeAt(effort, x, y) {
  const side = state.about.place, { width, height } = state.image, [tall, wide] = effort.seen;
  return [Math.floor(((y + 0.5) * tall) / (height * side)), Math.floor(((x + 0.5) * wide) / (width * side))];
}

// What the place of a pixel cost, as a share of the full network.
function costAt(effort, x, y) {
  const [row, column] = placeAt(effort, x, y);
  return effort.shares[row][column];
}

// The place of a pixel leaves at the exit behind the one at which it left, or before; behind the last it is the first.
function goOn(x, y, back) {
  const effort = state.view.effort, [row, column] = placeAt(effort, x, y), count = effort.choices.length;
  const exits = effort.exits.map((line) => [...line]), now = effort.choices.indexOf(exits[row][column]);
  exits[row][column] = effort.choices[(now + (back ? count - 1 : 1)) % count];
  state.places = { exits, size: effort.size };
  setRange();
  ask();
}

function pixelAt(canvas, event) {
  const box = canvas.getBoundingClientRect();
  return [Math.floor(((event.clientX - box.left) / box.width) * canvas.width), Math.floor(((event.clientY - box.top) / box.height) * canvas.height)];
}

function paintOn(figure, labels, other, effort) {
  const canvas = figure.querySelector("canvas"), { width, height, data } = state.image;
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const picture = new ImageData(new Uint8ClampedArray(data), width, height), to = picture.data;
  const alpha = $("alpha").value / 100, { palette, heat } = state.about;
  for (let pixel = 0, at = 0; pixel < labels.length; pixel++, at += 4) {
    const label = labels[pixel];
    if (other || (state.marked !== null && label !== state.marked)) {
      const grey = 0.3 * (0.3 * to[at] + 0.59 * to[at + 1] + 0.11 * to[at + 2]) + 130;
      to[at] = to[at + 1] = to[at + 2] = grey;
      if (other && other[pixel] !== label) [to[at], to[at + 1], to[at + 2]] = CHANGED;
      continue;
    }
    if (effort) {
      const grey = 0.3 * to[at] + 0.59 * to[at + 1] + 0.11 * to[at + 2], cost = costAt(effort, pixel % width, Math.floor(pixel / width));
      const colour = heat[Math.min(heat.length - 1, Math.floor(cost * heat.length))];
      for (let c = 0; c < 3; c++) to[at + c] = grey + alpha * (colour[c] - grey);
      continue;
    }
    if (label === 0 && state.about.clear) continue; // the image shows through its background
    const colour = palette[label];
    for (let c = 0; c < 3; c++) to[at + c] += alpha * (colour[c] - to[at + c]);
  }
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

function numbers(view) {
  const rows = [["milliseconds", view.ms.toFixed(view.ms < 10 ? 1 : 0)], ["frames per second", (1000 / view.ms).toFixed(1)],
    ["GMACs", view.gmacs.toPrecision(3)], ["of the full network", (100 * view.share).toFixed(0) + " %"], ["paths open", view.open.length]];
  if (view.score !== null) rows.push(["mIoU of this image", (100 * view.score).toFixed(1) + " %"]);
  $("numbers").replaceChildren(...rows.map(([name, value]) => {
    const row = document.createElement("div"), term = document.createElement("dt"), text = document.createElement("dd");
    term.textContent = name;
    text.textContent = value;
    row.append(term, text);
    return row;
  }));
  const other = view.against;
  let effect = "";
  if (other) {
    const cost = 100 * (view.gmacs / other.gmacs - 1), than = theirs();
    effect = (100 * view.changed).toFixed(view.changed < 0.1 ? 2 : 1) + " % of the pixels differ; " +
      (Math.abs(cost) < 0.05 ? "it costs the same as " : Math.abs(cost).toFixed(1) + (cost < 0 ? " % cheaper than " : " % dearer than ")) + than;
    if (view.score !== null) effect += "; mIoU " + (view.score < other.score ? "−" : "+") + Math.abs(100 * (view.score - other.score)).toFixed(1);
    effect += ".";
  }
  $("effect").textContent = effect;
}

function legend(view) {
  const list = $("legend");
  list.replaceChildren(...Object.entries(view.shares).map(([name, share]) => {
    const number = state.about.classes.indexOf(name), item = document.createElement("li"), button = document.createElement("button");
    const patch = document.createElement("i"), colour = state.about.palette[number];
    patch.style.background = number === 0 && state.about.clear ? "none" : "rgb(" + colour.join(",") + ")";
    button.type = "button";
    button.append(patch, name + " " + (share < 0.01 ? "<1" : (100 * share).toFixed(0)) + " %");
    button.setAttribute("aria-pressed", String(state.marked === number));
    button.classList.toggle("rs-held", state.marked === number);
    button.onclick = () => { state.marked = state.marked === number ? null : number; paint(); legend(view); };
    item.append(button);
    return item;
  }));
}

function nameAt(figure, event) {
  const canvas = figure.querySelector("canvas"), tip = figure.querySelector(".rs-tip"), box = canvas.getBoundingClientRect();
  const labels = figure === $("other") ? state.other : state.labels;
  if (!labels || !box.width) return;
  const [x, y] = pixelAt(canvas, event);
  tip.hidden = x < 0 || y < 0 || x >= canvas.width || y >= canvas.height;
  if (tip.hidden) return;
  const effort = figure === $("this") && effortShown();
  tip.textContent = state.about.classes[labels[y * canvas.width + x]] + (effort ? ", " + (100 * costAt(effort, x, y)).toFixed(0) + " %" : "");
  tip.style.left = Math.min(event.clientX - box.left + 12, box.width - tip.offsetWidth - 4) + "px";
  tip.style.top = Math.max(event.clientY - box.top - 26, 2) + "px";
}

// --- The route --------------------------------------------------------------------------------------------------------

const edgeOf = (key) => key.split(",").map(Number);

function make(kind, attributes, parent, text) {
  const part = document.createElementNS(SVG, kind);
  for (const [name, value] of Object.entries(attributes)) part.setAttribute(name, value);
  if (text !== undefined) part.textContent = text;
  parent.append(part);
  return part;
}

const place = (layer, scale) => [PITCH.left + layer * PITCH.x, PITCH.top + scale * PITCH.y];

function layOut(about) {
  const [wide, tall] = place(about.depth + 1, about.scales - 1);
  const svg = make("svg", { viewBox: `0 0 ${wide + 34} ${tall + 44}`, role: "group", "aria-label": "Route through the network" }, $("route"));
  for (let s = 0; s < about.scales; s++) make("text", { x: 4, y: place(0, s)[1] + 4 }, svg, "1/" + 4 * 2 ** s);
  for (let layer = 0; layer <= about.depth; layer += about.depth > 20 ? 4 : 1)
    make("text", { x: place(layer, 0)[0], y: tall + 34, "text-anchor": "middle" }, svg, layer);
  make("line", { x1: 46, y1: PITCH.top, x2: PITCH.left, y2: PITCH.top, stroke: "currentColor", "stroke-opacity": 0.5 }, svg);
  make("rect", { x: 34, y: PITCH.top - 15, width: 13, height: 30, rx: 3, class: "box" }, svg);
  make("rect", { x: wide - 8, y: PITCH.top - 15, width: 18, height: tall - PITCH.top + 30, rx: 4, class: "box" }, svg);
  const [sx, sy] = [44, PITCH.top], [dx, dy] = [wide + 5, (PITCH.top + tall) / 2];
  make("text", { x: sx, y: sy, transform: `rotate(-90 ${sx} ${sy})`, "text-anchor": "middle", style: "font-size:9px" }, svg, "stem");
  make("text", { x: dx, y: dy, transform: `rotate(-90 ${dx} ${dy})`, "text-anchor": "middle" }, svg, "decoder");
  state.parts = new Map();
  state.skips = about.nodes.map(([layer, scale]) => {
    const [x1, y1] = place(layer, scale), [x2, y2] = place(layer + 1, scale);
    return [layer + "," + scale, make("line", { x1, y1, x2: x2 - (layer === about.depth ? 8 : 0), y2, class: "skip" }, svg)];
  });
  for (const edge of about.edges) {
    const [layer, scale, direction] = edge, [x1, y1] = place(layer, scale), [x2, y2] = place(layer + 1, scale + STEP[direction]);
    const group = make("g", { class: "edge", "data-edge": edge.join(","), role: "switch", tabindex: -1 }, svg);
    const cut = layer === about.depth ? 8 : 0;
    make("line", { x1, y1, x2: x2 - cut, y2, class: "ink" }, group);
    make("line", { x1, y1, x2: x2 - cut, y2, class: "hit" }, group);
    group.setAttribute("aria-label", `path ${["up", "keep", "down"][direction]} from layer ${layer}, resolution 1/${4 * 2 ** scale}`);
    state.parts.set(edge.join(","), group);
  }
  for (const [layer, scale] of about.nodes) {
    const [cx, cy] = place(layer, scale);
    const group = make("g", { class: "node idle", "data-node": `${layer},${scale}`, role: "button", tabindex: -1 }, svg);
    make("circle", { cx, cy, r: 6 }, group);
    group.setAttribute("aria-label", `node of layer ${layer}, resolution 1/${4 * 2 ** scale}`);
    state.parts.set("node " + layer + "," + scale, group);
  }
  state.stages = [];
  for (let s = 0; s < about.stages; s++) {
    const [x, y] = place(s - 0.5, Math.max(s - 0.5, 0));
    state.stages.push(make("rect", { x: x - 5, y: y - 5, width: 10, height: 10, class: "backbone", "pointer-events": "none" }, svg));
  }
  const first = svg.querySelector(".edge");
  if (first) first.setAttribute("tabindex", 0);
}

function drawRoute(view) {
  const open = new Map(view.open.map(([l, s, d, a]) => [[l, s, d].join(","), a])), ramp = [...state.about.ramp];
  if (document.body.classList.contains("dark")) ramp.reverse(); // a strong path stands out from what is behind it
  const runs = new Set(view.runs.map(String)), passes = new Set(view.passes.map(String));
  for (const [node, line] of state.skips) line.style.display = passes.has(node) ? "" : "none";
  for (const [key, group] of state.parts) {
    if (key.startsWith("node ")) {
      const node = key.slice(5);
      group.setAttribute("class", "node " + (runs.has(node) ? "runs" : passes.has(node) ? "passes" : "idle"));
      group.querySelector("circle").setAttribute("r", runs.has(node) ? 7 : passes.has(node) ? 5.5 : 3);
      continue;
    }
    const ink = group.querySelector(".ink"), strength = open.get(key);
    const [layer, scale, direction] = edgeOf(key); // a free skip is drawn in the place of a closed path along keep
    ink.style.display = strength === undefined && direction === 1 && passes.has(layer + "," + scale) ? "none" : "";
    ink.style.stroke = strength === undefined ? "" : ramp[Math.min(ramp.length - 1, Math.floor(strength * ramp.length))];
    ink.style.strokeWidth = strength === undefined ? "" : 1.6 + 3.4 * Math.min(1, strength);
    group.setAttribute("aria-checked", String(strength !== undefined));
  }
  state.stages.forEach((square, s) => square.classList.toggle("off", s > 0 && !open.has([s - 1, s - 1, 2].join(","))));
}

function edit(target) {
  if (!state.view) return;
  const route = new Set(state.route || state.view.open.map((edge) => edge.slice(0, 3).join(",")));
  if (target.dataset.edge) {
    if (!route.delete(target.dataset.edge)) route.add(target.dataset.edge);
  } else {
    const own = [...state.parts.keys()].filter((key) => key.startsWith(target.dataset.node + ","));
    if (own.some((key) => route.has(key))) own.forEach((key) => route.delete(key));
    else own.forEach((key) => route.add(key));
  }
  Object.assign(state, { route, places: null });
  if (!state.against) { state.against = "own"; $("against").value = "own"; }
  ask();
}

function walkRoute(event) {
  const here = event.target.closest(".edge, .node");
  if (!here) return;
  if (event.key === "Enter" || event.key === " ") { event.preventDefault(); edit(here); return; }
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  const all = [...state.parts.values()], next = all[(all.indexOf(here) + step + all.length) % all.length];
  here.setAttribute("tabindex", -1);
  next.setAttribute("tabindex", 0);
  next.focus();
}

// --- The data set -----------------------------------------------------------------------------------------------------

function survey(facts) {
  $("tabs").hidden = false;
  $("survey-title").textContent = facts.title + ": " + facts.pictures.length + " images";
  $("words").replaceChildren(...facts.words.map((words) => Object.assign(document.createElement("p"), { textContent: words })));
  const sized = facts.pictures.filter(([, , size]) => size !== null), W = 640, H = 372, box = { left: 46, right: 616, top: 30, bottom: 324 };
  const svg = make("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "Cost of each image against the size of its objects" }, $("scatter"));
  if (sized.length) {
    const sizes = ticks(sized.map(([, , size]) => size)), costs = ticks(sized.map(([, cost]) => cost));
    const x = (size) => box.left + ((size - sizes.low) / (sizes.high - sizes.low)) * (box.right - box.left);
    const y = (cost) => box.bottom - ((cost - costs.low) / (costs.high - costs.low)) * (box.bottom - box.top);
    const at = (size, cost) => [x(size), y(cost)], percent = (value) => +(100 * value).toFixed(2) + " %";
    for (const cost of costs.at) {
      make("line", { x1: box.left, x2: box.right, y1: y(cost), y2: y(cost) }, svg);
      make("text", { x: box.left - 6, y: y(cost) + 4, "text-anchor": "end" }, svg, percent(cost));
    }
    for (const size of sizes.at) make("text", { x: x(size), y: box.bottom + 18, "text-anchor": "middle" }, svg, percent(size));
    make("text", { x: (box.left + box.right) / 2, y: H - 8, "text-anchor": "middle" }, svg, "mean side of the objects, of the image's");
    make("text", { x: 4, y: 14 }, svg, "cost, of the full network's");
    for (const [name, cost, size] of sized) {
      const [cx, cy] = at(size, cost), dot = make("circle", { cx, cy, r: 5, "data-name": name }, svg);
      make("title", {}, dot, `${name}: ${(100 * cost).toFixed(0)} % of the full network`);
      dot.onclick = () => fromSurvey(name);
    }
  }
  const byCost = [...facts.pictures].sort((a, b) => a[1] - b[1]);
  const fill = (list, rows) => list.replaceChildren(...rows.map(([name, cost]) => {
    const item = document.createElement("li"), button = document.createElement("button");
    button.type = "button";
    button.textContent = `${name}: ${(100 * cost).toFixed(0)} %`;
    button.onclick = () => fromSurvey(name);
    item.append(button);
    return item;
  }));
  const shown = Math.min(8, Math.floor(byCost.length / 2)); // none is in both
  fill($("cheapest"), byCost.slice(0, Math.max(1, shown)));
  fill($("dearest"), shown ? byCost.slice(-shown).reverse() : []);
}

// Round numbers around these values, about five.
function ticks(values) {
  const least = Math.min(...values), most = Math.max(...values), rough = (most - least || Math.abs(most) || 1) / 4;
  const power = 10 ** Math.floor(Math.log10(rough)), step = [1, 2, 5, 10].find((n) => n * power >= rough) * power;
  const low = Math.floor(least / step) * step, high = Math.max(Math.ceil(most / step) * step, low + step);
  return { low, high, at: Array.from({ length: Math.round((high - low) / step) + 1 }, (_, n) => low + n * step) };
}

function fromSurvey(name) { tab("picture"); open(state.source = { survey: name }); }

function tab(name) {
  for (const page of element.querySelectorAll(".rs-page")) page.hidden = page.dataset.page !== name;
  for (const button of $("tabs").children) button.setAttribute("aria-selected", String(button.dataset.tab === name));
}

// --- Images in --------------------------------------------------------------------------------------------------------

function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

async function take(file) {
  if (!file) return;
  if (file.size > state.about.max_bytes) { complain(`${file.name} is larger than ${state.about.max_bytes / 1e6} MB: give a smaller image.`); return; }
  await open((state.source = { file: await base64(file), name: file.name || "pasted image" }));
}

async function camera() {
  const shutter = $("shutter"), video = $("video");
  if (!shutter.hidden) { stopCamera(); return; }
  if (!navigator.mediaDevices) { complain("This browser gives a camera to pages of this machine and to https alone."); return; }
  try { video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { width: 640 } }); } catch (error) { complain("No camera: " + error.message); return; }
  shutter.hidden = false;
}

function stopCamera() {
  const video = $("video");
  if (video.srcObject) video.srcObject.getTracks().forEach((track) => track.stop());
  video.srcObject = null;
  $("shutter").hidden = true;
}

function shoot() {
  const video = $("video"), canvas = document.createElement("canvas");
  Object.assign(canvas, { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  stopCamera();
  canvas.toBlob((blob) => take(new File([blob], "camera")), "image/jpeg", 0.95);
}

// --- Start ------------------------------------------------------------------------------------------------------------

function option(select, value, text) { select.append(Object.assign(document.createElement("option"), { value, textContent: text })); }

function wire(about) {
  $("network").textContent = about.name;
  for (const name of about.precisions) option($("precision"), name, name);
  option($("against"), "", "nothing");
  option($("against"), "own", "the network's own choice");
  for (const { key, name } of about.known) option($("against"), key, name);
  if (!about.budgets) {
    const why = $("why");
    why.hidden = false;
    why.textContent = about.gated ? "The gates of this network decide for each image; it takes no budget." : "This network is static: it takes no budget.";
    for (const unit of element.querySelectorAll('[name="rs-unit"]')) unit.disabled = true;
  }
  $("examples").hidden = !about.examples.length;
  $("examples").replaceChildren(...about.examples.map(({ key, name, thumbnail }) => {
    const button = Object.assign(document.createElement("button"), { type: "button" }), image = new Image();
    image.src = thumbnail;
    image.alt = "";
    button.append(image, Object.assign(document.createElement("span"), { textContent: name }));
    button.onclick = () => open((state.source = { example: key }));
    button.dataset.example = key;
    return button;
  }));
  layOut(about);
  if (about.survey) survey(about.survey);

  $("open").onclick = () => $("file").click();
  $("file").onchange = (event) => { take(event.target.files[0]); event.target.value = ""; };
  $("labels").onclick = () => $("label-file").click();
  $("label-file").onchange = async (event) => {
    const file = event.target.files[0];
    event.target.value = "";
    if (file && state.source) open({ ...state.source, labels: await base64(file) });
  };
  $("camera").onclick = camera;
  $("take").onclick = shoot;
  const drop = $("drop");
  for (const name of ["dragenter", "dragover"]) drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.add("rs-over"); });
  for (const name of ["dragleave", "drop"]) drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.remove("rs-over"); });
  drop.addEventListener("drop", (event) => take(event.dataTransfer.files[0]));
  document.addEventListener("paste", (event) => { const file = [...event.clipboardData.files][0]; if (file) take(file); });

  $("range").oninput = () => { state.asks = true; state.route = state.places = null; setRange(); ask(); };
  for (const unit of element.querySelectorAll('[name="rs-unit"]')) unit.onchange = () => { state.unit = unit.value; state.places = null; setRange(); if (state.asks) ask(); };
  $("precision").onchange = ask;
  $("alpha").oninput = $("changes").onchange = $("effort").onchange = paint;
  $("places").hidden = about.place === null;
  $("scale").querySelector("i").style.background = `linear-gradient(to right, ${about.heat.map((colour) => `rgb(${colour})`)})`;
  $("against").onchange = (event) => { state.against = event.target.value; ask(); };
  $("keep").onclick = () => {
    state.kept = state.view.open.map((edge) => edge.slice(0, 3));
    const select = $("against");
    if (![...select.options].some(({ value }) => value === "kept")) option(select, "kept", "");
    [...select.options].find(({ value }) => value === "kept").textContent = "the route of " + state.picture.name;
    select.value = state.against = "kept";
    ask();
  };
  $("reset").onclick = () => { state.route = state.places = null; if (state.against === "own") $("against").value = state.against = ""; ask(); };
  $("route").onclick = (event) => { const part = event.target.closest(".edge, .node"); if (part) edit(part); };
  $("route").onkeydown = walkRoute;
  for (const figure of [$("this"), $("other")]) {
    const canvas = figure.querySelector("canvas");
    canvas.onpointermove = canvas.onpointerdown = (event) => nameAt(figure, event);
    canvas.onpointerleave = () => { figure.querySelector(".rs-tip").hidden = true; };
  }
  $("this").querySelector("canvas").onclick = (event) => {
    if (state.view && effortShown()) goOn(...pixelAt(event.target, event), event.shiftKey);
  };
  for (const button of $("tabs").children) button.onclick = () => tab(button.dataset.tab);
}

server.about().then((about) => { state.about = about; wire(about); element.dataset.ready = "yes"; });
