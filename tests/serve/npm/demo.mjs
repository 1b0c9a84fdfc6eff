// Both clients against a real model: `node demo.mjs URL MODEL`.
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, streamText } from "ai";
import OpenAI from "openai";
import { z } from "zod";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const options = { model, messages, temperature: 0, max_tokens: 24 };
const whole = (await client.chat.completions.create(options)).choices[0].message.content;
let text = "";
for await (const chunk of await client.chat.completions.create({ ...options, stream: true })) {
  text += chunk.choices[0]?.delta.content ?? "";
}
assert.equal(text, whole);
assert.match(whole, /Paris/);

const provider = createOpenAICompatible({ name: "smollm3", baseURL, supportsStructuredOutputs: true });
const own = { model: provider.chatModel(model), maxRetries: 0, temperature: 0, messages, maxOutputTokens: 24 };
let same = "";
for await (const piece of streamText(own).textStream) same += piece;
assert.equal(same, whole);

const weather = {
  type: "function",
  function: {
    name: "weather",
    parameters: { type: "object", properties: { city: { enum: ["Bern", "Oslo"] } }, required: ["city"] },
  },
};
const called = await client.chat.completions.create({ ...options, tools: [weather], tool_choice: "required", max_tokens: 64 });
assert.equal(called.choices[0].finish_reason, "tool_calls");
assert.ok(["Bern", "Oslo"].includes(JSON.parse(called.choices[0].message.tool_calls[0].function.arguments).city));
const schema = z.object({ capital: z.enum(["Paris", "Rome"]) });
assert.equal((await generateObject({ ...own, schema, maxOutputTokens: 64 })).object.capital, "Paris");

const left = await client.chat.completions.create({ ...options, stream: true, max_tokens: 400, ignore_eos: true });
let chunks = 0;
for await (const _ of left) if (++chunks === 5) left.controller.abort();
assert.ok(chunks < 50);
