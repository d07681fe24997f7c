/** OpenAI's panel. It cannot be hosted elsewhere: its domain key is verified online. */
export const PANEL_SCRIPT = "https://cdn.platform.openai.com/deployments/chatkit/chatkit.js";
