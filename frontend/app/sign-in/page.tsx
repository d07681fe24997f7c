import { connection } from "next/server";
import { publicSettings } from "@/lib/settings";
import { SignInForm } from "./form";

export default async function SignInPage() {
  await connection(); // the settings are those of the running server, not those of the build
  return <SignInForm authUrl={publicSettings().authUrl} />;
}
