import { headers } from "next/headers";
import { redirect } from "next/navigation";
import { getAuth } from "@/lib/auth";
import { publicSettings } from "@/lib/settings";
import { Chat } from "./chat";

export default async function ChatPage({ searchParams }: { searchParams: Promise<{ thread?: string | string[] }> }) {
  const request = await headers();
  const session = await getAuth().api.getSession({ headers: request });
  if (!session) redirect("/sign-in");
  const { thread } = await searchParams;
  return (
    <Chat
      settings={publicSettings()}
      user={{ id: session.user.id, name: session.user.name }}
      thread={typeof thread === "string" ? thread : null}
    />
  );
}
