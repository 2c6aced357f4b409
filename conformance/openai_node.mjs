// OpenAI's Node client: chat, streams, errors, embeddings, files and batches.
import assert from "node:assert/strict";
import OpenAI, { toFile } from "openai";

const model = process.env.LATHE_MODEL;
const client = new OpenAI({
  baseURL: `${process.env.LATHE_URL}/v1`,
  apiKey: "none",
  maxRetries: 0,
});
const messages = [{ role: "user", content: "What is the capital of France?" }];
const options = { model, messages, max_tokens: 24, temperature: 0 };

const whole = await client.chat.completions.create(options);
const text = whole.choices[0].message.content;
assert.match(text, /Paris/);
assert.ok(whole.usage.completion_tokens <= 24);

let streamed = "";
let usage = null;
const stream = await client.chat.completions.create({
  ...options,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(streamed, text);
assert.equal(usage.completion_tokens, whole.usage.completion_tokens);

const left = await client.chat.completions.create({ ...options, stream: true });
for await (const _ of left) break; // its controller aborts the request

const completion = await client.completions.create({
  model,
  prompt: "The capital of France is",
  max_tokens: 4,
  temperature: 0,
  logprobs: 1,
});
assert.match(completion.choices[0].text, /Paris/);
assert.ok(completion.choices[0].logprobs.token_logprobs.every((value) => value <= 0));

const vectors = await client.embeddings.create({
  model: "all-minilm-l6-v2",
  input: ["a", "b"],
});
assert.deepEqual(vectors.data.map((row) => row.embedding.length), [384, 384]);

const listed = [];
for await (const one of client.models.list()) listed.push(one.id);
assert.ok(listed.includes(model));

await assert.rejects(
  client.chat.completions.create({ ...options, model: "unknown" }),
  (error) =>
    error instanceof OpenAI.NotFoundError && error.code === "model_not_found" && error.param === "model",
);
await assert.rejects(
  client.chat.completions.create({ ...options, melt: true }),
  (error) =>
    error instanceof OpenAI.BadRequestError && error.code === "unsupported_parameter" && error.param === "melt",
);

const line = {
  custom_id: "one",
  method: "POST",
  url: "/v1/chat/completions",
  body: options,
};
const file = await client.files.create({
  file: await toFile(Buffer.from(JSON.stringify(line) + "\n"), "in.jsonl"),
  purpose: "batch",
});
let batch = await client.batches.create({
  input_file_id: file.id,
  endpoint: "/v1/chat/completions",
  completion_window: "24h",
});
for (let i = 0; i < 240 && !["completed", "failed"].includes(batch.status); i++) {
  await new Promise((resolve) => setTimeout(resolve, 500));
  batch = await client.batches.retrieve(batch.id);
}
assert.equal(batch.status, "completed");
const answers = (await (await client.files.content(batch.output_file_id)).text()).trim().split("\n");
const answer = JSON.parse(answers[0]);
assert.equal(answer.custom_id, "one");
assert.equal(answer.response.body.choices[0].message.content, text);
