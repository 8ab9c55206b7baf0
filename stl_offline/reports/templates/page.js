"use strict";
// Common to all pages: the theme button, and the tip beside the element under the pointer.

const byId = (id) => document.getElementById(id);
const make = (name, text, attributes = {}) => {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
};
const percent = (perMille) => (perMille > 0 && perMille < 1 ? "<0.1 %" : `${(perMille / 10).toFixed(1)} %`);

// ---- theme -------------------------------------------------------------------------------------------------------

const themes = ["system", "light", "dark"];
const themeButton = byId("theme");
const root = document.documentElement;
const nameTheme = () => {
  themeButton.textContent = `Theme: ${root.dataset.theme || "system"}`;
};
themeButton.hidden = false;
nameTheme();
themeButton.addEventListener("click", () => {
  const next = themes[(themes.indexOf(root.dataset.theme || "system") + 1) % themes.length];
  if (next === "system") delete root.dataset.theme;
  else root.dataset.theme = next;
  try {
    localStorage.setItem("theme", next);
  } catch (error) {
    // Storage is not available: the choice holds for this page only.
  }
  nameTheme();
  stages.forEach(paint);
});

// ---- tip ---------------------------------------------------------------------------------------------------------

const tip = byId("tip");
function placeTip(box) {
  tip.hidden = false;
  shownAt = scrollY;
  const { width, height } = tip.getBoundingClientRect();
  const right = box.right + 10;
  const left = right + width <= innerWidth - 4 ? right : box.left - 10 - width;
  tip.style.left = `${Math.max(4, Math.min(left, innerWidth - width - 4))}px`;
  tip.style.top = `${Math.max(4, Math.min(box.top + 10, innerHeight - height - 4))}px`;
}
function hideTip() {
  tip.hidden = true;
}
let shownAt = 0;
document.querySelectorAll("[data-tip]").forEach((element) => {
  const show = (event) => {
    // Points of several lines may coincide: all of them are listed.
    const here = document.elementsFromPoint(event.clientX, event.clientY).filter((each) => each.dataset?.tip);
    tip.replaceChildren(...(here.length ? here.reverse() : [element]).map((each) => make("div", each.dataset.tip)));
    placeTip(element.getBoundingClientRect());
  };
  element.addEventListener("pointerenter", show);
  element.addEventListener("pointerdown", show);
  // A finger leaves as soon as it lifts.
  element.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") hideTip(); });
});
