/** Next.js calls this once, before the server answers. */
export async function register(): Promise<void> {
  if (process.env.NEXT_RUNTIME === "nodejs") {
    const { migrate } = await import("./lib/auth");
    const { publicSettings } = await import("./lib/settings");
    try {
      publicSettings(); // what cannot be read is said now, and not by the first page that needs it
      await migrate();
    } catch (error) {
      console.error(error instanceof Error ? error.message : error);
      process.exit(1); // else the server would stay, and answer every request with an error
    }
  }
}
