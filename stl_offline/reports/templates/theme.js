"use strict";
// Runs before anything is drawn: applies the theme that the reader chose last, else the system's.
try {
  const theme = localStorage.getItem("theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch (error) {
  // Storage is not available to this page: use the system's theme.
}
