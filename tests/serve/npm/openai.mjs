// OpenAI's client: `node openai.mjs URL MODEL`. The answers are those that test_npm.py has the engine say.
import assert from "node:assert/strict";
import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "secret", maxRetries: 0 });
const asked = (content, more = {}) => ({ model, messages: [{ role: "user", content }], ...more });
const create = (content, more) => client.chat.completions.create(asked(content, more));
const weather = {
  type: "function",
  function: {
    name: "weather",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
};

// Whole, and with thinking under both of its names.
const whole = await create("Think, then say yes.");
assert.equal(whole.choices[0].message.content, "Yes, of course: é 👋🏽.");
assert.equal(whole.choices[0].message.reasoning_content, "Hm.");
assert.equal(whole.choices[0].message.reasoning, "Hm.");
assert.equal(whole.choices[0].finish_reason, "stop");
assert.ok(whole.usage.completion_tokens_details.reasoning_tokens > 0);

// Streamed, it says the same.
let text = "", thought = "", usage;
for await (const chunk of await create("Think, then say yes.", { stream: true, stream_options: { include_usage: true } })) {
  text += chunk.choices[0]?.delta.content ?? "";
  thought += chunk.choices[0]?.delta.reasoning_content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, whole.choices[0].message.content);
assert.equal(thought, "Hm.");
assert.deepEqual(usage, whole.usage);

// Calls that the model decides on, that it must make, and of a function that is named.
const forced = { type: "function", function: { name: "weather" } };
for (const tool_choice of ["auto", "required", forced]) {
  const found = await create("The weather in Århus?", { tools: [weather], tool_choice });
  assert.equal(found.choices[0].finish_reason, "tool_calls");
  const [call] = found.choices[0].message.tool_calls;
  assert.deepEqual([call.function.name, JSON.parse(call.function.arguments)], ["weather", { city: "Århus" }]);
  // The client's own helper puts the pieces of a stream together.
  const stream = client.chat.completions.stream(asked("The weather in Århus?", { tools: [weather], tool_choice }));
  const message = (await stream.finalChatCompletion()).choices[0].message;
  assert.deepEqual(message.tool_calls[0].function.arguments, call.function.arguments);
  const back = [
    { role: "user", content: "The weather in Århus?" },
    message,
    { role: "tool", tool_call_id: message.tool_calls[0].id, content: "12 degrees" },
  ];
  const after = await client.chat.completions.create({ model, messages: back, tools: [weather] });
  assert.equal(after.choices[0].message.content, "It is cold.");
}

// A schema.
const schema = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const response_format = { type: "json_schema", json_schema: { name: "place", strict: true, schema } };
const formed = await client.chat.completions.parse(asked("A place, as JSON.", { response_format }));
assert.deepEqual(formed.choices[0].message.parsed, { city: "Århus" });

// The newer API, whole and streamed.
const answer = await client.responses.create({ model, input: "Think, then say yes." });
assert.equal(answer.output_text, "Yes, of course: é 👋🏽.");
const kinds = [];
for await (const event of await client.responses.create({ model, input: "Think, then say yes.", stream: true })) {
  kinds.push(event.type);
}
assert.equal(kinds[0], "response.created");
assert.equal(kinds.at(-1), "response.completed");

// Completions, and log-probabilities of a prompt.
const echoed = await client.completions.create({ model, prompt: "Hello", echo: true, logprobs: 1, max_tokens: 1 });
assert.ok(echoed.choices[0].text.startsWith("Hello"));
assert.equal(echoed.choices[0].logprobs.token_logprobs[0], null);

// Errors are the client's own classes.
await assert.rejects(create("Hi", { temperature: -1 }), error =>
  error instanceof OpenAI.BadRequestError && error.param === "temperature");
await assert.rejects(client.models.retrieve("other"), OpenAI.NotFoundError);
await assert.rejects(new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 }).models.list(), OpenAI.AuthenticationError);
const failing = await create("Fail halfway.", { stream: true });
await assert.rejects(async () => { for await (const _ of failing); }, /could not go on/);

// A stream that the client leaves, and an answer that it does not wait for.
const left = await create("Count for long.", { stream: true });
let chunks = 0;
for await (const _ of left) if (++chunks === 5) left.controller.abort();
assert.ok(chunks < 50);
const signal = AbortSignal.timeout(300);
await assert.rejects(client.chat.completions.create(asked("Count for long."), { signal }), OpenAI.APIUserAbortError);
