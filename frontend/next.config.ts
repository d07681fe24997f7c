import type { NextConfig } from "next";

process.env.NEXT_TELEMETRY_DISABLED ||= "1"; // builds and servers tell nobody that they ran

const config: NextConfig = {
  // The Containerfile asks for one folder with all that the server needs; `npm start` needs none.
  output: process.env.STANDALONE === "1" ? "standalone" : undefined,
  serverExternalPackages: ["libsql"], // it has a binary, which no bundler can take in
  poweredByHeader: false,
};

export default config;
