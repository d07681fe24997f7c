import type { Metadata } from "next";
import type { ReactNode } from "react";
import { PANEL_SCRIPT } from "@/lib/panel-script";
import "./globals.css";

export const metadata: Metadata = { title: "Chat" };

export default function RootLayout({ children }: { children: ReactNode }) {
  return (
    <html lang="en">
      <head>
        {/* In the page itself, so that it loads before React starts; `async`, so that nothing waits for it. */}
        <script src={PANEL_SCRIPT} async />
      </head>
      <body>{children}</body>
    </html>
  );
}
