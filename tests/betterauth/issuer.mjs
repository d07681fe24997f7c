// A real Better Auth server for the tests: e-mail and password, the JWT plugin in its default setting, all in memory.
// It prints its address once it listens. ROTATE_SECONDS makes it sign with a new key so often.
import http from "node:http";
import { betterAuth } from "better-auth";
import { memoryAdapter } from "better-auth/adapters/memory";
import { toNodeHandler } from "better-auth/node";
import { jwt } from "better-auth/plugins";

const rotate = Number(process.env.ROTATE_SECONDS);
let answer;

const server = http.createServer((request, response) => answer(request, response));
server.listen(0, "127.0.0.1", () => {
  const address = `http://127.0.0.1:${server.address().port}`;
  answer = toNodeHandler(
    betterAuth({
      baseURL: address,
      database: memoryAdapter({ user: [], session: [], account: [], verification: [], jwks: [] }),
      secret: "a secret of the tests, of more than 32 characters",
      emailAndPassword: { enabled: true },
      rateLimit: { enabled: false },
      telemetry: { enabled: false },
      plugins: [jwt(rotate ? { jwks: { rotationInterval: rotate } } : {})],
    }),
  );
  console.log(address);
});
