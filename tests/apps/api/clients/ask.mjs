// Asks a server with npm's clients: `node ask.mjs BASE_URL MODEL IMAGE`, in the folder of their packages.
// Prints a line of JSON per client: its name and what it got, or the error.
import fs from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import { pathToFileURL } from "node:url";

const packages = createRequire(path.join(process.cwd(), "package.json"));
const load = (name) => import(pathToFileURL(packages.resolve(name)));
const { generateObject, generateText, streamText } = await load("ai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
const { createOpenAI } = await load("@ai-sdk/openai");
const OpenAI = (await load("openai")).default;
const { z } = await load("zod");

const [baseURL, model, image] = process.argv.slice(2);
const bytes = fs.readFileSync(image);
const url = "data:image/png;base64," + bytes.toString("base64");
const words = { type: "text", text: "What is this?" };
const asked = [{ role: "user", content: [{ type: "image_url", image_url: { url } }, words] }];
const greedy = { temperature: 0, max_tokens: 12 };
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const chat = createOpenAICompatible({ name: "vlm", baseURL, apiKey: "none", includeUsage: true, supportsStructuredOutputs: true })(model);
const responses = createOpenAI({ baseURL, apiKey: "none" }).responses(model);
const messages = [{ role: "user", content: [{ type: "image", image: bytes }, words] }];
const common = { messages, temperature: 0, maxOutputTokens: 12, maxRetries: 0 };
const schema = z.object({ colour: z.enum(["red", "green"]) });

async function text(stream) {
  let all = "";
  for await (const piece of stream) all += piece;
  return all;
}

const clients = {
  "npm openai chat": async () => (await client.chat.completions.create({ model, messages: asked, ...greedy })).choices[0].message.content,
  "npm openai stream": async () => {
    let all = "";
    for await (const chunk of await client.chat.completions.create({ model, messages: asked, ...greedy, stream: true })) all += chunk.choices[0]?.delta?.content ?? "";
    return all;
  },
  "npm openai responses": async () => (await client.responses.create({ model, input: "What is this?", temperature: 0, max_output_tokens: 12 })).output_text,
  "ai sdk text": async () => (await generateText({ model: chat, ...common })).text,
  "ai sdk stream": async () => text(streamText({ model: chat, ...common }).textStream),
  "ai sdk file": async () => {
    const file = [{ role: "user", content: [{ type: "file", data: bytes, mediaType: "image/png" }, words] }];
    return (await generateText({ model: chat, ...common, messages: file })).text;
  },
  "ai sdk object": async () => (await generateObject({ model: chat, ...common, maxOutputTokens: 200, schema })).object.colour,
  "ai sdk responses": async () => (await generateText({ model: responses, ...common })).text,
  "ai sdk responses stream": async () => text(streamText({ model: responses, ...common }).textStream),
  "ai sdk responses object": async () => (await generateObject({ model: responses, ...common, maxOutputTokens: 200, schema })).object.colour,
};
for (const [name, ask] of Object.entries(clients)) {
  try {
    console.log(JSON.stringify({ name, got: await ask() }));
  } catch (error) {
    console.log(JSON.stringify({ name, error: `${error.constructor.name}: ${String(error.message).slice(0, 300)}` }));
  }
}
