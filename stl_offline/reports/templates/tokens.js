// Inspecting single tokens. A scene is one article. Its tokens have names ("map", "student"), and every stage with that
// name shows them.

const data = byId("data") ? JSON.parse(byId("data").textContent) : { classes: {}, scenes: [] };
const nameOf = (id) => (id < 0 ? "no label" : data.classes[id][0]);
const filter = { classId: null, least: 0 };
const stages = [];
const scenes = data.scenes.map((scene, number) => {
  const article = document.querySelector(`article[data-scene="${number}"]`);
  return { ...scene, number, article, at: null, stages: [] };
});

function entries(tokens, token) {
  const found = [];
  for (let rank = 0; rank < tokens.k; rank += 1) {
    const id = tokens.ids[token * tokens.k + rank];
    if (id >= 0) found.push([id, tokens.p[token * tokens.k + rank]]);
  }
  return found;
}

function passes(tokens, token) {
  const id = tokens.ids[token * tokens.k];
  const confidence = tokens.p[token * tokens.k] / 10;
  return (filter.classId === null || id === filter.classId) && confidence >= filter.least;
}

const filtering = () => filter.classId !== null || filter.least > 0;

// The area of the image that a token covers under its view: four corners in unit coordinates.
function corners(tokens, token) {
  const [rows, columns] = tokens.grid;
  const row = Math.floor(token / columns);
  const column = token % columns;
  const [a, b, c, d, e, f] = tokens.view || [1, 0, 0, 0, 1, 0];
  return [[0, 0], [1, 0], [1, 1], [0, 1]].map(([x, y]) => {
    const u = (column + x) / columns;
    const v = (row + y) / rows;
    return [a * u + b * v + c, d * u + e * v + f];
  });
}

function frame(context, points, width, height) {
  for (const [color, line] of [["#000", 4], ["#fff", 2]]) {
    context.strokeStyle = color;
    context.lineWidth = line;
    context.beginPath();
    points.forEach(([x, y], index) => context[index ? "lineTo" : "moveTo"](x * width, y * height));
    context.closePath();
    context.stroke();
  }
}

function paint(stage) {
  const { canvas, scene, tokens, letters } = stage;
  const { width, height } = canvas.getBoundingClientRect();
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  if (!width) return;
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  if (tokens) {
    const [rows, columns] = tokens.grid;
    const cell = [width / columns, height / rows];
    const size = Math.min(14, 0.62 * Math.min(...cell));
    context.font = `600 ${size}px system-ui, sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    const veil = getComputedStyle(root).getPropertyValue("--veil");
    for (let token = 0; token < rows * columns; token += 1) {
      const x = (token % columns) * cell[0];
      const y = Math.floor(token / columns) * cell[1];
      const best = tokens.ids[token * tokens.k];
      if (filtering() && !passes(tokens, token)) {
        context.fillStyle = veil;
        context.fillRect(x, y, cell[0], cell[1]);
      } else if (letters && size >= 6 && best >= 0 && (letters === "best" || tokens.drawn[token] === best)) {
        const [, , mark, ink] = data.classes[best];
        context.fillStyle = ink;
        context.fillText(mark, x + cell[0] / 2, y + cell[1] / 2);
      }
    }
  }
  if (!scene.at) return;
  const { name, token } = scene.at;
  const shown = scene.tokens[name];
  if (stage.name === name) {
    const [rows, columns] = shown.grid;
    const row = Math.floor(token / columns);
    const column = token % columns;
    const points = [[0, 0], [1, 0], [1, 1], [0, 1]].map(([x, y]) => [(column + x) / columns, (row + y) / rows]);
    frame(context, points, width, height);
  } else if (!tokens) {
    frame(context, corners(shown, token), width, height);
  }
}

function describe(scene, name, token) {
  const tokens = scene.tokens[name];
  const columns = tokens.grid[1];
  const known = entries(tokens, token);
  const rest = Math.max(0, 1000 - known.reduce((sum, [, p]) => sum + p, 0));
  const where = `Row ${Math.floor(token / columns) + 1}, column ${(token % columns) + 1}`;
  let drawn = "";
  if (tokens.drawn) {
    const id = tokens.drawn[token];
    drawn = id < 0 ? "draw: unlabelled" : `draw: ${nameOf(id)}`;
  }
  return { where, known, rest, drawn };
}

function show(stage, token, announce) {
  const { scene, name } = stage;
  if (scene.at && scene.at.token === token && scene.at.name === name && !tip.hidden) return;
  scene.at = { name, token };
  const { where, known, rest, drawn } = describe(scene, name, token);
  const list = make("ol");
  for (const [id, p] of known) {
    const [className, color, mark, ink] = data.classes[id];
    const item = make("li");
    const swatch = make("span", mark, { class: "swatch" });
    swatch.style.background = color;
    swatch.style.color = ink;
    item.append(swatch, make("span", className), make("span", percent(p)));
    list.append(item);
  }
  const lines = [make("strong", where), list];
  // Each probability is rounded to three digits.
  if (rest >= 0.5 + 0.5 * known.length) lines.push(make("div", `other classes ${percent(rest)}`));
  if (drawn) lines.push(make("div", drawn, { class: "faint" }));
  tip.replaceChildren(...lines);
  scene.stages.forEach(paint);
  const box = stage.canvas.getBoundingClientRect();
  const [rows, columns] = stage.tokens.grid;
  const left = box.left + (((token % columns) + 0) * box.width) / columns;
  const top = box.top + (Math.floor(token / columns) * box.height) / rows;
  placeTip({ left, top, right: left + box.width / columns });
  if (announce) {
    const words = known.map(([id, p]) => `${nameOf(id)} ${percent(p)}`).join(", ");
    byId("said").textContent = `${where}: ${words || "no label"}${drawn ? `; ${drawn}` : ""}`;
  }
}

function leave(scene) {
  scene.at = null;
  hideTip();
  scene.stages.forEach(paint);
}

function tokenUnder(stage, event) {
  const box = stage.canvas.getBoundingClientRect();
  const [rows, columns] = stage.tokens.grid;
  const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
  const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
  const clamp = (value, most) => Math.max(0, Math.min(value, most - 1));
  return clamp(row, rows) * columns + clamp(column, columns);
}

function move(stage, key) {
  const [rows, columns] = stage.tokens.grid;
  const token = stage.cursor || 0;
  const row = Math.floor(token / columns);
  const column = token % columns;
  const to = {
    ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1], ArrowUp: [row - 1, column],
    ArrowDown: [row + 1, column], Home: [row, 0], End: [row, columns - 1],
  }[key];
  if (!to || to[0] < 0 || to[1] < 0 || to[0] >= rows || to[1] >= columns) return to !== undefined;
  stage.cursor = to[0] * columns + to[1];
  return true;
}

function connect(stage) {
  const { probe, scene } = stage;
  if (!probe) return;
  probe.addEventListener("pointermove", (event) => show(stage, tokenUnder(stage, event), false));
  probe.addEventListener("pointerdown", (event) => {
    stage.cursor = tokenUnder(stage, event);
    show(stage, stage.cursor, true);
  });
  probe.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse") leave(scene);
  });
  probe.addEventListener("focus", () => {
    if (probe.matches(":focus-visible")) show(stage, stage.cursor || 0, true);
  });
  probe.addEventListener("blur", () => leave(scene));
  probe.addEventListener("keydown", (event) => {
    if (event.key === "Escape") leave(scene);
    else if (move(stage, event.key)) {
      event.preventDefault();
      show(stage, stage.cursor || 0, true);
    }
  });
}

for (const scene of scenes) {
  for (const element of scene.article.querySelectorAll(".stage")) {
    const canvas = element.querySelector("canvas");
    if (!canvas) continue;
    const name = element.dataset.tokens || null;
    const stage = {
      canvas, scene, name, tokens: name ? scene.tokens[name] : null, letters: element.dataset.letters || "",
      probe: element.querySelector(".probe"), cursor: 0,
    };
    scene.stages.push(stage);
    stages.push(stage);
    connect(stage);
    new ResizeObserver(() => paint(stage)).observe(canvas);
  }
}
document.addEventListener("pointerdown", (event) => {
  // On touch screens the tip stays until the next touch elsewhere.
  if (event.target.closest(".probe, [data-tip]")) return;
  scenes.filter((scene) => scene.at).forEach(leave);
  hideTip();
});
addEventListener("scroll", () => {
  // The tip has a fixed position, so it is hidden once the page has scrolled away beneath it.
  if (Math.abs(scrollY - shownAt) > 30) hideTip();
}, { passive: true });

// ---- tables of all tokens, filled when they are opened -------------------------------------------------------------

function fillTable(scene, name, place) {
  const table = make("table");
  const head = make("tr");
  for (const text of ["row", "column", "classes", "draw"]) head.append(make("th", text, { scope: "col" }));
  const body = make("tbody");
  const tokens = scene.tokens[name];
  const [rows, columns] = tokens.grid;
  for (let token = 0; token < rows * columns; token += 1) {
    const line = make("tr");
    const { known } = describe(scene, name, token);
    const words = known.map(([id, p]) => `${nameOf(id)} ${percent(p)}`).join(", ") || "no label";
    const drawn = tokens.drawn ? nameOf(tokens.drawn[token]) : "–";
    for (const text of [Math.floor(token / columns) + 1, (token % columns) + 1, words, drawn]) line.append(make("td", text));
    body.append(line);
  }
  const top = make("thead");
  top.append(head);
  table.append(top, body);
  place.replaceChildren(table);
}
document.querySelectorAll("details[data-table]").forEach((details) => {
  details.addEventListener("toggle", () => {
    const place = details.querySelector(".wide");
    const scene = scenes[details.closest("article").dataset.scene];
    if (details.open && !place.firstElementChild) fillTable(scene, details.dataset.table, place);
  });
});
