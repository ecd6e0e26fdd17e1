// Before the first paint: the theme that this browser chose, else the system's.
"use strict";
try {
  const chosen = localStorage.getItem("fedtune-theme");
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
} catch { /* no storage: the system's */ }
