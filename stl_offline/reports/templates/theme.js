"use strict";
// Before anything is drawn: the theme that the reader chose last, else the system's.
try {
  const theme = localStorage.getItem("theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch (error) {
  // Storage is closed to this page; the system's theme it is.
}
