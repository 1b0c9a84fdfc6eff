// The AI SDK with its provider for compatible servers: `node ai.mjs URL MODEL`, against the same answers.
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [baseURL, name] = process.argv.slice(2);
const provider = createOpenAICompatible({
  name: "smollm3", baseURL, apiKey: "secret", includeUsage: true, supportsStructuredOutputs: true,
});
const model = provider.chatModel(name);
const own = { model, maxRetries: 0 };

// Whole and streamed, with what was thought before.
const whole = await generateText({ ...own, prompt: "Think, then say yes." });
assert.equal(whole.text, "Yes, of course: é 👋🏽.");
assert.equal(whole.reasoningText, "Hm.");
assert.equal(whole.finishReason, "stop");
const stream = streamText({ ...own, prompt: "Think, then say yes." });
let text = "";
for await (const piece of stream.textStream) text += piece;
assert.equal(text, whole.text);
assert.equal(await stream.reasoningText, "Hm.");
assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);
assert.ok(whole.usage.outputTokens > 0);

// Tools: the loop goes on with what they return.
const weather = tool({ inputSchema: z.object({ city: z.string() }), execute: ({ city }) => `12 degrees in ${city}` });
const loop = { ...own, prompt: "The weather in Århus?", tools: { weather }, stopWhen: stepCountIs(2) };
const after = await generateText(loop);
assert.deepEqual(after.steps[0].toolCalls[0].input, { city: "Århus" });
assert.equal(after.text, "It is cold.");
const streamed = streamText(loop);
await streamed.consumeStream();
assert.equal(await streamed.text, "It is cold.");
for (const toolChoice of ["required", { type: "tool", toolName: "weather" }]) {
  const { toolCalls, finishReason } = await generateText({ ...loop, stopWhen: stepCountIs(1), toolChoice });
  assert.deepEqual([toolCalls[0].input, finishReason], [{ city: "Århus" }, "tool-calls"]);
}

// A schema.
const { object } = await generateObject({ ...own, prompt: "A place, as JSON.", schema: z.object({ city: z.string() }) });
assert.deepEqual(object, { city: "Århus" });

// Errors, and streams that are left.
await assert.rejects(generateText({ ...own, prompt: "Hi", temperature: -1 }), error =>
  error.statusCode === 400 && /temperature/.test(error.message));
const failures = [];
await streamText({ ...own, prompt: "Fail halfway.", onError: ({ error }) => failures.push(error) }).consumeStream();
assert.equal(failures.length, 1);
assert.match(JSON.stringify(failures[0]) + failures[0].message, /could not go on/);
const controller = new AbortController();
const left = streamText({ ...own, prompt: "Count for long.", abortSignal: controller.signal, onError: () => {} });
let pieces = 0;
for await (const _ of left.textStream) if (++pieces === 5) controller.abort();
assert.ok(pieces < 50);
