// Runs before the first paint, so that a page whose scheme was chosen does not flash in the other one.
try {
  const chosen = localStorage.getItem("theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
} catch {
  // Storage is blocked: the system's scheme it is.
}
