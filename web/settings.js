// What the service tells its page: which models, files and login there are.

export const UNREACHABLE = "The service cannot be reached. Trying again …";

/** Ask for the settings, which costs the service nothing, until they come; meanwhile `say` is told that they do not. */
export async function loadSettings(say) {
  for (let seconds = 1; ; seconds = Math.min(seconds * 1.5, 10)) {
    try {
      const found = await (await fetch("settings.json", { cache: "no-store" })).json();
      say("");
      return found;
    } catch {
      say(UNREACHABLE);
    }
    await new Promise((resolve) => {
      setTimeout(resolve, seconds * 1000);
      addEventListener("online", resolve, { once: true });
    });
  }
}
