// Light or dark: the system's choice until the user makes one.

import { browserMemory } from "./memory.js";

const dark = matchMedia("(prefers-color-scheme: dark)");

export function currentTheme() {
  return document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light");
}

/** Take a theme ("light", "dark", or anything else for the system's) and return the one that is shown now. */
export function setTheme(theme) {
  const root = document.documentElement;
  const isChosen = theme === "light" || theme === "dark";
  if (isChosen) root.dataset.theme = theme;
  else delete root.dataset.theme;
  try {
    if (isChosen) browserMemory.setItem("theme", theme);
    else browserMemory.removeItem("theme");
  } catch {
    // Storage is blocked: the choice lasts as long as the page.
  }
  root.dispatchEvent(new Event("themechange"));
  return currentTheme();
}

export function onThemeChange(listener) {
  dark.addEventListener("change", listener);
  document.documentElement.addEventListener("themechange", listener);
}
