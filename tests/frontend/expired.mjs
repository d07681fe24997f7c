// Prints a token for the user USER_ID that the app's own Better Auth has signed, and that ran out an hour ago.
import { betterAuth } from "better-auth";
import { jwt } from "better-auth/plugins";
import { Kysely, SqliteDialect } from "kysely";
import Database from "libsql";

const dialect = new SqliteDialect({ database: new Database(process.env.AUTH_DATABASE) });
const auth = betterAuth({
  baseURL: process.env.BETTER_AUTH_URL,
  secret: process.env.BETTER_AUTH_SECRET,
  database: { db: new Kysely({ dialect }), type: "sqlite" },
  plugins: [jwt()],
});
const hourAgo = Math.floor(Date.now() / 1000) - 3600;
const payload = { sub: process.env.USER_ID, iat: hourAgo - 900, exp: hourAgo };
const { token } = await auth.api.signJWT({ body: { payload } });
console.log(token);
