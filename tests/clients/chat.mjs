// A page with a chat, without the page: the AI SDK's own chat, transport and message, as `useChat` has them.
//
// In: {package, apis, headers, chat, body, cuts, messages, actions}.  `apis` are the addresses of gateways, asked in turn.
// `cuts`: after so many chunks the first, second, … answer breaks off, as it does in a browser.  Out: one line, with the
// chat as it is in the end, and everything that it was on its way there.

const told = JSON.parse(process.argv[2]);
const { AbstractChat, DefaultChatTransport, lastAssistantMessageIsCompleteWithToolCalls } = await import(told.package);

let requests = 0;
const statuses = [];
const cuts = [...(told.cuts ?? [])];

/** Asks the next gateway, and breaks its answer off where it is to be. */
async function fetchInTurn(address, options) {
  const path = String(address).slice("http://gateway".length);
  const api = told.apis[requests++ % told.apis.length];
  const broken = new AbortController();
  const signal = options.signal ? AbortSignal.any([options.signal, broken.signal]) : broken.signal;
  const response = await fetch(api + path, { ...options, signal });
  statuses.push(response.status);
  const most = cuts.shift();
  if (most === undefined || most === null || !response.body) return response;
  return new Response(response.body.pipeThrough(firstChunks(most, broken)), response);
}

/** Lets so many server-sent events through, and fails as a browser does when it has lost the connection. */
function firstChunks(most, broken) {
  let rest = "";
  let left = most;
  const decoder = new TextDecoder();
  return new TransformStream({
    transform(piece, controller) {
      rest += decoder.decode(piece, { stream: true });
      for (let end; (end = rest.indexOf("\n\n")) >= 0; rest = rest.slice(end + 2)) {
        if (left-- === 0) {
          controller.error(new TypeError("network error"));
          broken.abort();
          return;
        }
        controller.enqueue(new TextEncoder().encode(rest.slice(0, end + 2)));
      }
    },
  });
}

const textOf = (message) =>
  message.parts.filter((part) => part.type === "text").map((part) => part.text).join("");

/** The state of a chat, as a page's framework keeps it; notes each text that is shown. */
class State {
  status = "ready";
  error = undefined;
  shown = [];

  constructor(messages) {
    this.messages = messages;
  }
  pushMessage(message) {
    this.messages = [...this.messages, message];
    this.note(message);
  }
  popMessage() {
    this.messages = this.messages.slice(0, -1);
  }
  replaceMessage(index, message) {
    this.messages = this.messages.with(index, structuredClone(message));
    this.note(message);
  }
  snapshot(value) {
    return structuredClone(value);
  }
  note(message) {
    if (message.role === "assistant" && this.shown.at(-1) !== textOf(message)) this.shown.push(textOf(message));
  }
}

class Chat extends AbstractChat {
  constructor({ messages, ...rest }) {
    super({ ...rest, state: new State(messages) });
  }
  get shown() {
    return this.state.shown;
  }
}

const ends = [];
const calls = [];
const chat = new Chat({
  id: told.chat,
  messages: told.messages ?? [],
  transport: new DefaultChatTransport({
    api: "http://gateway/api/chat",
    headers: told.headers,
    body: told.body,
    fetch: fetchInTurn,
  }),
  onFinish: ({ isAbort, isDisconnect, isError, finishReason }) =>
    ends.push({ isAbort, isDisconnect, isError, finishReason }),
  onToolCall: ({ toolCall }) => calls.push(toolCall),
  sendAutomaticallyWhen: told.continues ? lastAssistantMessageIsCompleteWithToolCalls : undefined,
});

async function until(condition, what) {
  for (const deadline = Date.now() + 60_000; !condition(); ) {
    if (Date.now() > deadline) throw new Error(`waited in vain for ${what}: ${JSON.stringify(chat.messages)}`);
    await new Promise((done) => setTimeout(done, 10));
  }
}

const settled = () => chat.status === "ready" || chat.status === "error";

const actions = {
  send: (message) => chat.sendMessage(message),
  regenerate: () => chat.regenerate(),
  resume: () => chat.resumeStream(),
  // Until it has come to an end: as often as the connection is lost, or an attempt.
  async insist() {
    while (chat.status === "error") await chat.resumeStream();
  },
  async sendAndStop(message, headers) {
    const sent = chat.sendMessage(message);
    await until(() => chat.lastMessage?.role === "assistant" && textOf(chat.lastMessage) !== "", "a text");
    const path = `/api/chat/${encodeURIComponent(told.chat)}/stop`;
    const answer = await fetchInTurn(`http://gateway${path}`, { method: "POST", headers: told.headers });
    await answer.body?.cancel();
    await sent;
  },
  async answer(tool, output) {
    const part = chat.lastMessage.parts.findLast((each) => each.type === `tool-${tool}`);
    const before = requests;
    await chat.addToolOutput({ tool, toolCallId: part.toolCallId, output });
    await until(() => settled() && requests > before, "the answer to the tool's output");
  },
};

for (const [name, ...given] of told.actions) await actions[name](...given);

console.log(
  JSON.stringify({
    status: chat.status,
    error: chat.error?.message ?? null,
    messages: chat.messages,
    shown: chat.shown,
    statuses,
    ends,
    calls,
  }),
);
process.exit(0); // a connection that is kept alive would keep us
