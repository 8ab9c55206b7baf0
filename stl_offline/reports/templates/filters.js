// Filters by class, confidence and key. On pages without the form, the legends' classes still filter tokens.

const form = byId("filters");
function applyFilters() {
  const words = byId("by-key").value.trim().toLowerCase();
  let shown = 0;
  for (const scene of scenes) {
    const { map } = scene.tokens;
    const count = map.grid[0] * map.grid[1];
    let fits = scene.key.toLowerCase().includes(words);
    if (fits && filtering()) {
      fits = filter.least === 0 && scene.own === filter.classId;
      for (let token = 0; token < count && !fits; token += 1) fits = passes(map, token);
    }
    scene.article.hidden = !fits;
    shown += fits ? 1 : 0;
  }
  byId("count").textContent = shown === scenes.length ? `${shown} shown` : `${shown} of ${scenes.length} shown`;
  byId("least").textContent = `${filter.least} %`;
  document.querySelectorAll("[data-class]").forEach((button) => {
    button.setAttribute("aria-pressed", String(Number(button.dataset.class) === filter.classId));
  });
  stages.forEach(paint);
}
function chooseClass(id) {
  filter.classId = id;
  if (form) byId("by-class").value = id === null ? "" : String(id);
  if (form) applyFilters();
  else stages.forEach(paint);
}
document.querySelectorAll("[data-class]").forEach((button) => {
  button.addEventListener("click", () => {
    const id = Number(button.dataset.class);
    chooseClass(filter.classId === id ? null : id);
    if (!form) {
      document.querySelectorAll("[data-class]").forEach((other) => {
        other.setAttribute("aria-pressed", String(Number(other.dataset.class) === filter.classId));
      });
    }
  });
});
if (form) {
  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  byId("by-class").addEventListener("change", (event) => {
    chooseClass(event.target.value === "" ? null : Number(event.target.value));
  });
  byId("by-confidence").addEventListener("input", (event) => {
    filter.least = Number(event.target.value);
    applyFilters();
  });
  byId("by-key").addEventListener("input", applyFilters);
  byId("clear").addEventListener("click", () => {
    byId("by-key").value = "";
    byId("by-confidence").value = 0;
    filter.least = 0;
    chooseClass(null);
  });
}
