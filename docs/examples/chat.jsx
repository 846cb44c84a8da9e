// A chat that loses nothing: reload the page or lose the connection in the middle of an answer, and it goes on.
//
// Packages: ai, @ai-sdk/react, react. `gateway` is the address of `keepstream gateway`; `getToken` asks your own server,
// which knows the user, for a token for this chat, and your server asks the gateway for it with its API key:
//   POST {gateway}/api/chat/{id}/token        answers {"token": …, "expires_at": …}

import { useChat } from "@ai-sdk/react";
import { DefaultChatTransport } from "ai";
import { useMemo, useState } from "react";

export function Chat({ id, gateway, getToken, stored = [] }) {
  const [draft, setDraft] = useState("");
  const api = `${gateway}/api/chat`;
  const headers = async () => ({ Authorization: `Bearer ${await getToken(id)}` });
  const transport = useMemo(() => new DefaultChatTransport({ api, headers }), [api, getToken]);
  const { messages, sendMessage, status, error, resumeStream } = useChat({
    id,
    messages: stored, // of earlier visits, if you keep them
    transport,
    resume: true, // when the page is opened, and when it is seen again after the connection was lost
  });
  const isAnswering = status === "submitted" || status === "streaming";

  async function stop() {
    await fetch(`${api}/${encodeURIComponent(id)}/stop`, { method: "POST", headers: await headers() });
  }

  function send(event) {
    event.preventDefault();
    sendMessage({ text: draft });
    setDraft("");
  }

  return (
    <form onSubmit={send}>
      {messages.map((message) => (
        <p key={message.id} className={message.role}>
          {message.parts.map((part, number) => part.type === "text" && <span key={number}>{part.text}</span>)}
        </p>
      ))}
      {error && (
        <p role="alert">
          {error.message} <button type="button" onClick={() => resumeStream()}>Go on</button>
        </p>
      )}
      <input aria-label="Message" value={draft} onChange={(event) => setDraft(event.target.value)} />
      {isAnswering ? <button type="button" onClick={stop}>Stop</button> : <button>Send</button>}
    </form>
  );
}
