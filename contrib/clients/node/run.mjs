// Run a command as a job, print its output, stop it on Ctrl-C.
//
//   npm install && node run.mjs sh -c 'echo hello; sleep 60'
//
// Server and certificates come from WORKER_SERVER, WORKER_CERT_PATH, WORKER_KEY_PATH and
// WORKER_CA_PATH. Output travels in binary messages: a line of JSON, then the bytes.
import { readFileSync } from "node:fs";
import { JSONRPCClient, JSONRPCServer, JSONRPCServerAndClient } from "json-rpc-2.0";
import WebSocket from "ws";

const { WORKER_SERVER, WORKER_CERT_PATH, WORKER_KEY_PATH, WORKER_CA_PATH } = process.env;

const socket = new WebSocket(`wss://${WORKER_SERVER}/`, "jobworker.v1", {
  cert: readFileSync(WORKER_CERT_PATH),
  key: readFileSync(WORKER_KEY_PATH),
  ca: readFileSync(WORKER_CA_PATH),
  perMessageDeflate: false,
});

const rpc = new JSONRPCServerAndClient(
  new JSONRPCServer(),
  new JSONRPCClient((message) => socket.send(JSON.stringify(message))),
);

// Credits: the server may be so many bytes ahead of us, and what was written is granted anew.
const WINDOW = 1 << 20;

function output(message) {
  const end = message.indexOf("\n");
  const { params } = JSON.parse(message.subarray(0, end).toString());
  const bytes = message.subarray(end + 1);
  const stream = params.stream === "stderr" ? process.stderr : process.stdout;
  stream.write(bytes, () =>
    rpc.notify("job.credit", { subscription: params.subscription, bytes: bytes.length }),
  );
}

const ended = new Promise((resolve) => rpc.addMethod("job.output_end", resolve));

socket.on("message", (data, isBinary) =>
  isBinary ? output(data) : rpc.receiveAndSend(JSON.parse(data.toString())),
);
socket.on("error", (error) => {
  console.error(`cannot go on: ${error.message}`);
  process.exit(69);
});
socket.on("unexpected-response", (_, response) => {
  response.on("data", (body) => console.error(body.toString()));
  response.on("end", () => process.exit(69));
});

socket.on("open", async () => {
  try {
    const { job } = await rpc.request("job.run", {
      job: { command: process.argv.slice(2) },
      follow: { encoding: "binary", credit_bytes: WINDOW },
    });
    console.error(`job ${job.id}`);
    process.on("SIGINT", () => rpc.request("job.stop", { id: job.id }));
    const { job: last } = await ended;
    console.error(`job ${last.id}: ${last.state}`);
    socket.close();
    process.exitCode = last.exit_code ?? (last.signal ? 128 + last.signal : 125);
  } catch (error) {
    console.error(error.message);
    process.exit(70);
  }
});
