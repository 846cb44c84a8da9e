// OpenAI's library for Node at two gateways. Told: {urls, key, what, script}. Prints one JSON value for each answer.
import OpenAI from "openai";

const { urls, key, what, script } = JSON.parse(process.argv[2]);
const clients = urls.map((baseURL) => new OpenAI({ baseURL, apiKey: key, maxRetries: 0 }));
const [client, other] = clients;
const ask = { model: "scripted-1", input: "Hi", keepstream: { request: { script } } };
const print = (value) => console.log(JSON.stringify(value));

/** Keeps the text by item, and drops what a retry has made void. */
class Reader {
  texts = new Map();
  types = [];
  last = null;
  response = null;

  read(event) {
    this.types.push(event.type);
    if (this.last !== null && event.sequence_number <= this.last) throw new Error("a sequence number went back");
    this.last = event.sequence_number;
    if (event.type === "response.in_progress") {
      this.texts.clear();
      for (const item of event.response.output) {
        const counts = item.type === "message" && item.status !== "incomplete";
        if (counts) this.texts.set(item.id, item.content.map((part) => part.text ?? "").join(""));
      }
    } else if (event.type === "response.output_text.delta") {
      this.texts.set(event.item_id, (this.texts.get(event.item_id) ?? "") + event.delta);
    } else if (["response.completed", "response.incomplete", "response.failed"].includes(event.type)) {
      this.response = event.response;
    }
  }

  get told() {
    const { id, status } = this.response;
    return { id, status, text: [...this.texts.values()].join(""), types: this.types };
  }
}

const programs = {
  // Each event by a request of its own, at one gateway after the other; then all at once by the stateful helper.
  async cut() {
    const { id } = await client.responses.create({ ...ask, background: true });
    const reader = new Reader();
    for (let turn = 0; reader.response === null; turn += 1) {
      const cursor = reader.last === null ? {} : { starting_after: reader.last };
      const stream = await clients[turn % 2].responses.retrieve(id, { stream: true, ...cursor });
      for await (const event of stream) {
        reader.read(event);
        break;
      }
    }
    print(reader.told);
    const final = await other.responses.stream({ response_id: id }).finalResponse();
    print({ id: final.id, status: final.status, text: final.output_text });
    print(await client.responses.retrieve(id));
  },

  // The stateful helper from the request on, and once more, beginning in the middle.
  async helper() {
    const stream = client.responses.stream(ask);
    const numbers = [];
    const calls = [];
    stream.on("event", (event) => numbers.push(event.sequence_number));
    const final = await stream.finalResponse();
    for (const item of final.output) if (item.type === "function_call") calls.push([item.name, item.arguments]);
    print({ id: final.id, status: final.status, text: final.output_text, calls });
    const middle = numbers[Math.floor(numbers.length / 2)];
    const again = other.responses.stream({ response_id: final.id, starting_after: middle });
    const seen = [];
    again.on("event", (event) => seen.push(event.sequence_number));
    print({ text: (await again.finalResponse()).output_text, all_seen: numbers.filter((n) => n > middle).join() === seen.join() });
  },

  async cancel() {
    const stream = client.responses.stream({ ...ask, background: true });
    const created = stream.emitted("response.created");
    let deltas = 0;
    const third = new Promise((done) => stream.on("response.output_text.delta", () => (deltas += 1) === 3 && done()));
    await third;
    print({ status: (await other.responses.cancel((await created).response.id)).status });
    const final = await stream.finalResponse();
    print({ id: final.id, status: final.status, text: final.output_text });
  },

  async chat() {
    const request = { model: "scripted-1", messages: [{ role: "user", content: "Hi" }], script };
    const stream = client.chat.completions.stream({ ...request, stream_options: { include_usage: true } });
    let text = "";
    stream.on("content", (piece) => (text += piece));
    try {
      const final = await stream.finalChatCompletion();
      print({ id: final.id, text, whole: final.choices[0].message.content, usage: final.usage });
      print((await other.chat.completions.retrieve(final.id)).choices[0].message.content);
    } catch (error) {
      print({ text, error: { name: error.constructor.name, code: error.code, message: error.message } });
    }
  },
};

await programs[what]();
