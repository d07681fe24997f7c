// Better Auth: e-mail and password, users and sessions in a SQLite file, and tokens that the chat service can verify.

import { betterAuth } from "better-auth";
import { getMigrations } from "better-auth/db/migration";
import { jwt } from "better-auth/plugins";
import { Kysely, SqliteDialect } from "kysely";
import Database from "libsql";
import { authSettings } from "./settings";

function createAuth() {
  const { url, secret, database } = authSettings();
  const file = new Database(database);
  file.pragma("journal_mode = WAL");
  return betterAuth({
    baseURL: url,
    secret,
    database: { db: new Kysely({ dialect: new SqliteDialect({ database: file }) }), type: "sqlite" },
    emailAndPassword: { enabled: true },
    plugins: [
      jwt({
        // A token says who the user is, in `sub`, and what is named here; without this, all that is known of them.
        jwt: { definePayload: ({ user }) => ({ name: user.name }) },
        disableSettingJwtHeader: true, // tokens are asked for at /api/auth/token
      }),
    ],
  });
}

type Auth = ReturnType<typeof createAuth>;

const shared = globalThis as { auth?: Auth }; // `next dev` loads this module again after each change

/** Return the one instance. It is made when it is first needed: a build has neither secret nor database. */
export function getAuth(): Auth {
  return (shared.auth ??= createAuth());
}

/** Make the tables that are missing. */
export async function migrate(): Promise<void> {
  const { runMigrations } = await getMigrations(getAuth().options);
  await runMigrations();
}
