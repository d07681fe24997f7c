// What the service tells its page: which models, files and login there are.

export const UNREACHABLE = "The service cannot be reached. Trying again …";

/** Ask for the settings, which costs the service nothing. */
export const fetchSettings = async () => (await fetch("settings.json", { cache: "no-store" })).json();

/** Return the settings once they come. */
export const loadSettings = (say) => untilItWorks(fetchSettings, say);

/** Try, ever more seldom, until it works; meanwhile `say` is told that the service cannot be reached. */
export async function untilItWorks(attempt, say) {
  for (let seconds = 1; ; seconds = Math.min(seconds * 1.5, 10)) {
    try {
      const found = await attempt();
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
