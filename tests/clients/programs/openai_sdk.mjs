import OpenAI from "openai";

const client = new OpenAI({ baseURL: "http://127.0.0.1:8000/v1", apiKey: "none" });
const input = ["In the beginning", "To be, or not to be"];
const answer = await client.embeddings.create({ model: "scripture", input });
export const vectors = answer.data.map((row) => row.embedding);
console.log(vectors.length, "vectors of", vectors[0].length);
