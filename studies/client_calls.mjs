// What clients of Node do with a server of OpenAI's API: node client_calls.mjs PACKAGES BASE MODEL
// PACKAGES: the folder whose node_modules has them (`studies.clients` makes it). As `client_calls.py`: a line of JSON for each
// call, its name and what went wrong ("" for nothing).
import { createRequire } from "node:module";

const [folder, baseURL, model] = process.argv.slice(2);
const packages = createRequire(`${folder}/`);
const OpenAI = packages("openai").default;
const { zodResponseFormat } = packages("openai/helpers/zod");
const { generateObject, generateText, streamText, tool } = packages("ai");
const { createOpenAICompatible } = packages("@ai-sdk/openai-compatible");
const { z } = packages("zod");

const prompt = "7+8=?";
const messages = [{ role: "user", content: prompt }];
const limit = 120;
const answer = z.object({ answer: z.number().int() });
const client = new OpenAI({ baseURL, apiKey: "x", maxRetries: 0, timeout: 600_000 });
const provider = createOpenAICompatible({
  name: "here", baseURL, apiKey: "x", includeUsage: true, supportsStructuredOutputs: true,
});
const chat = { model, messages, max_tokens: limit };
const asked = { model: provider(model), prompt, maxOutputTokens: limit, maxRetries: 0 };
const add = {
  type: "object", required: ["a", "b"], additionalProperties: false,
  properties: { a: { type: "integer" }, b: { type: "integer" } },
};

// Each returns what must not be empty.
const calls = {
  async openai_node_create() {
    return (await client.chat.completions.create(chat)).choices[0].message.content;
  },
  async openai_node_stream() {
    let said = "";
    for await (const chunk of await client.chat.completions.create({ ...chat, stream: true }))
      said += chunk.choices[0]?.delta?.content ?? "";
    return said;
  },
  async openai_node_left_early() {
    const stream = await client.chat.completions.create({ ...chat, stream: true });
    for await (const chunk of stream) return chunk.id;
  },
  async openai_node_parse() {
    const format = zodResponseFormat(answer, "answer");
    return JSON.stringify((await client.chat.completions.parse({ ...chat, response_format: format })).choices[0].message.parsed);
  },
  async openai_node_tools() {
    const tools = [{ type: "function", function: { name: "add", parameters: add } }];
    const done = await client.chat.completions.create({ ...chat, tools, tool_choice: "required" });
    return done.choices[0].message.tool_calls?.[0].function.arguments;
  },
  async openai_node_responses() {
    return (await client.responses.create({ model, input: prompt, max_output_tokens: 200 })).output_text;
  },
  async vercel_ai_generate_text() {
    return (await generateText(asked)).text;
  },
  async vercel_ai_stream_text() {
    let failed, said = "";
    const stream = streamText({ ...asked, onError: ({ error }) => (failed = error) });
    for await (const piece of stream.textStream) said += piece;
    if (failed) throw failed;
    return (await stream.usage).totalTokens && said;
  },
  async vercel_ai_generate_object() {
    return JSON.stringify((await generateObject({ ...asked, schema: answer })).object);
  },
  async vercel_ai_tools() {
    const tools = { add: tool({ description: "adds", inputSchema: z.object({ a: z.number().int(), b: z.number().int() }) }) };
    return (await generateText({ ...asked, tools, toolChoice: "required" })).toolCalls[0]?.toolName;
  },
  async vercel_ai_completion_model() {
    return (await generateText({ ...asked, model: provider.completionModel(model) })).text;
  },
};

for (const [name, call] of Object.entries(calls)) {
  let wrong = "";
  try {
    wrong = (await call()) ? "" : "nothing came";
  } catch (error) {
    wrong = `${error.name}: ${error.message}`.slice(0, 300);
  }
  console.log(JSON.stringify({ name, wrong }));
}
