// The settings, read while the server runs, so that one build serves every place that it is put.

const env = process.env; // the build replaces `process.env.NEXT_PUBLIC_…` where it is written out; this it leaves alone

/** What the browser is told. Addresses end without a slash. */
export interface PublicSettings {
  apiUrl: string;
  authUrl: string;
  domainKey: string;
}

export interface AuthSettings {
  url: string;
  secret: string;
  database: string;
}

/** Throws an error that says what to set. */
export function publicSettings(): PublicSettings {
  return {
    apiUrl: address("NEXT_PUBLIC_API_URL", env.NEXT_PUBLIC_API_URL, "http://127.0.0.1:8000"),
    authUrl: address("NEXT_PUBLIC_AUTH_URL", env.NEXT_PUBLIC_AUTH_URL, authUrl()),
    domainKey: env.NEXT_PUBLIC_CHATKIT_DOMAIN_KEY || "localhost-dev",
  };
}

/** Throws an error that says what to set. */
export function authSettings(): AuthSettings {
  const secret = env.BETTER_AUTH_SECRET ?? "";
  if (secret.length < 32) {
    throw new Error("BETTER_AUTH_SECRET must be set to at least 32 characters: `openssl rand -base64 32` makes some.");
  }
  return { url: authUrl(), secret, database: env.AUTH_DATABASE || "auth.db" };
}

function authUrl(): string {
  return address("BETTER_AUTH_URL", env.BETTER_AUTH_URL, "http://localhost:3000");
}

function address(name: string, value: string | undefined, otherwise: string): string {
  const url = value || otherwise;
  if (!/^https?:\/\//.test(url) || !URL.canParse(url)) {
    throw new Error(`${name} must be an address that begins with http:// or https://; it is ${url}.`);
  }
  return url.replace(/\/+$/, "");
}
