// llama.cpp as an engine of bench_inference.py; the protocol is that of bench_peers.py.
//
//     node bench_llama.mjs INSTALL_FOLDER MODEL.gguf THREADS
//
// node-llama-cpp's own bindings, below its text interface: they take token ids and batches as llama.cpp does.
// Their interface is internal, so the version is pinned by bench_inference.py.

import {readFileSync} from "node:fs";
import path from "node:path";
import readline from "node:readline";
import {pathToFileURL} from "node:url";

const [install, file, threads] = process.argv.slice(2);
const packages = path.join(install, "node_modules");
const {getLlama} = await import(pathToFileURL(path.join(packages, "node-llama-cpp", "dist", "index.js")));
const version = JSON.parse(readFileSync(path.join(packages, "node-llama-cpp", "package.json"))).version;

const CHUNK = 512; // llama.cpp's default for the tokens computed at once
const reply = process.stdout.write.bind(process.stdout);
process.stdout.write = process.stderr.write.bind(process.stderr); // what libraries print is no answer

const llama = await getLlama({gpu: false, build: "never", skipDownload: true, progressLogs: false, logLevel: "error"});
const {AddonModel, AddonContext, AddonSampler} = llama._bindings;

function answer(content) {
    const peak = Number(/VmHWM:\s+(\d+)/.exec(readFileSync("/proc/self/status", "utf8"))[1]) * 1024;
    reply(JSON.stringify({...content, peak_bytes: peak}) + "\n");
}

// A context with room for `length` tokens in each of `rows` sequences, for as long as `use` runs; exact: all in float32.
async function withContext(rows, length, exact, use) {
    const room = Math.ceil(length / 256) * 256, float32 = llama._bindings.getGgmlType("F32");
    const context = new AddonContext(model, {
        contextSize: rows * room, sequences: rows, batchSize: CHUNK, threads: Number(threads),
        ...exact
            ? {flashAttention: false, kvCacheKeyType: float32, kvCacheValueType: float32}
            : {flashAttention: "auto"}
    });
    if (!await context.init()) throw new Error("no context");
    try {
        return await use(context);
    } finally {
        await context.dispose();
    }
}

// Appends one token list to each sequence at position `at`; the next token of each.
async function evaluate(context, rows, at) {
    let picks;
    const rowsAtOnce = Math.max(1, Math.floor(CHUNK / rows[0].length));
    const next = [];
    for (let row = 0; row < rows.length; row += rowsAtOnce) {
        const group = rows.slice(row, row + rowsAtOnce);
        for (let start = 0; start < group[0].length; start += CHUNK) {
            const parts = group.map(tokens => tokens.slice(start, start + CHUNK));
            const last = start + CHUNK >= group[0].length;
            context.initBatch(parts.reduce((count, part) => count + part.length, 0));
            picks = parts.map((part, i) => context.addToBatch(
                row + i, at + start, Uint32Array.from(part), Uint32Array.from(last ? [part.length - 1] : [])
            )[0]);
            await context.decodeBatch();
        }
        for (const pick of picks) next.push(await context.sampleToken(pick, sampler));
    }
    return next;
}

async function measure({do: what, prompts, texts, new: count = 0, exact = false}) {
    if (what === "tokenize") return {tokens: texts.map(text => [...model.tokenize(text, true)])};
    return withContext(prompts.length, prompts[0].length + count, exact, async (context) => {
        let started = performance.now();
        let next = await evaluate(context, prompts, 0);
        if (what === "prefill") return {seconds: (performance.now() - started) / 1000};
        const tokens = next.map(token => [token]);
        if (what !== "generate") started = performance.now(); // whose seconds are those of prefill, too
        for (let step = 0; step < count; step++) {
            next = await evaluate(context, next.map(token => [token]), prompts[0].length + step);
            next.forEach((token, row) => tokens[row].push(token));
        }
        return {seconds: (performance.now() - started) / 1000, tokens};
    });
}

const started = performance.now();
const model = new AddonModel(file, {gpuLayers: 0, useMmap: true});
if (!await model.init()) throw new Error(`llama.cpp cannot load ${file}`);
const seconds = (performance.now() - started) / 1000;
const sampler = new AddonSampler(model);
sampler.applyConfig({temperature: 0});
answer({seconds, versions: {"node-llama-cpp": version, "llama.cpp": llama.llamaCppRelease?.release, node: process.version},
    kernels: /libggml-cpu[^\n]*/.exec(readFileSync("/proc/self/maps", "utf8"))?.[0]});
for await (const line of readline.createInterface({input: process.stdin})) answer(await measure(JSON.parse(line)));
process.exit(0);
