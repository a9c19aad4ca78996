// Run a command as a job, print its output, stop it on Ctrl-C.
//
//   npm install && node run.mjs sh -c 'echo hello; sleep 60'
//
// Server and certificates come from WORKER_SERVER, WORKER_CERT_PATH, WORKER_KEY_PATH and
// WORKER_CA_PATH. Output comes in binary messages: a line of JSON, then the bytes. If the connection
// is lost, the service is restarted, or this machine slept, it connects again and resumes the output
// where it stopped.
import { readFileSync } from "node:fs";
import { createSecureContext } from "node:tls";
import { JSONRPCClient, JSONRPCServer, JSONRPCServerAndClient } from "json-rpc-2.0";
import WebSocket from "ws";

const { WORKER_SERVER, WORKER_CERT_PATH, WORKER_KEY_PATH, WORKER_CA_PATH } = process.env;

// Credits: the server may send so many bytes in advance. Bytes that were printed are granted again.
const WINDOW = 1 << 20;
const DELIVERY = { encoding: "binary", credit_bytes: WINDOW };
const PATIENCE_MS = 120_000;
// A service that stands still is given up after so many pings: see docs/protocol.md, Silence.
const PING_MS = 15_000;
const MOST_PINGS = 2;
// Closing codes after which another connection would fail as well: see docs/protocol.md, Closing.
const IN_VAIN = new Set([1002, 1007, 1008, 1009, 1011]);

let asked = false; // whether the server may have got the request to start the job
let job; // the job's number, once the server has sent it
let offset = 0; // the end of the printed output, counted in both streams together
let stopping = false;
let lostAt = null;
let stop = () => {};
process.on("SIGINT", () => {
  stopping = true;
  stop();
});

function fail(code, text) {
  console.error(text);
  process.exit(code);
}

for (const stream of [process.stdout, process.stderr]) {
  stream.on("error", (error) => {
    if (error.code === "EPIPE") process.exit(141); // 128 + SIGPIPE; the job goes on
    fail(83, `cannot print: ${error.message}`);
  });
}

const unset = Object.entries({ WORKER_SERVER, WORKER_CERT_PATH, WORKER_KEY_PATH, WORKER_CA_PATH })
  .filter(([, value]) => !value)
  .map(([name]) => name);
if (unset.length > 0) fail(78, `cannot connect: not set in the environment: ${unset.join(", ")}`);

function credentials() {
  try {
    const files = {
      cert: readFileSync(WORKER_CERT_PATH),
      key: readFileSync(WORKER_KEY_PATH),
      ca: readFileSync(WORKER_CA_PATH),
    };
    createSecureContext(files);
    return files;
  } catch (error) {
    fail(72, `cannot use the certificates: ${error.message}`);
  }
}

function connect() {
  const socket = new WebSocket(`wss://${WORKER_SERVER}/`, "jobworker.v1", {
    ...credentials(),
    perMessageDeflate: false,
    handshakeTimeout: 10_000,
  });
  const rpc = new JSONRPCServerAndClient(
    new JSONRPCServer(),
    new JSONRPCClient((message) => socket.send(JSON.stringify(message))),
  );
  let failure = "the connection was lost";

  // Pings are counted, not time: this machine may have slept.
  let pings = 0;
  const silence = setInterval(() => {
    if (socket.readyState !== WebSocket.OPEN) return;
    if (pings === MOST_PINGS) {
      failure = "the service does not answer";
      socket.terminate();
    } else {
      pings += 1;
      socket.ping();
    }
  }, PING_MS);
  for (const sign of ["message", "ping", "pong"]) socket.on(sign, () => (pings = 0));
  const ended = () => clearInterval(silence);

  // A call gets no answer if its connection ends. It is repeated on the next connection.
  const call = (method, params) =>
    rpc.request(method, params).catch((error) => {
      if (socket.readyState === WebSocket.OPEN) fail(70, error.message);
    });

  function output(message) {
    const end = message.indexOf("\n");
    const { params } = JSON.parse(message.subarray(0, end).toString());
    const bytes = message.subarray(end + 1);
    const stream = params.stream === "stderr" ? process.stderr : process.stdout;
    offset = params.offset + bytes.length;
    stream.write(bytes, () => {
      if (socket.readyState !== WebSocket.OPEN) return;
      rpc.notify("job.credit", { subscription: params.subscription, bytes: bytes.length });
    });
  }

  rpc.addMethod("job.output_end", ({ job: last, error }) => {
    if (error?.name === "shutting_down") return; // the next service has the rest
    if (error) fail(70, error.message);
    console.error(`job ${last.id}: ${last.state}`);
    process.exitCode = last.exit_code ?? (last.signal ? 128 + last.signal : 125);
    socket.removeAllListeners("close");
    ended();
    socket.close();
  });

  socket.on("message", (data, isBinary) =>
    isBinary ? output(data) : rpc.receiveAndSend(JSON.parse(data.toString())),
  );
  socket.on("unexpected-response", (_, response) => {
    response.on("data", (body) => console.error(body.toString()));
    response.on("end", () => process.exit(69));
  });
  socket.on("error", (error) => {
    failure = error.message;
  });
  socket.on("close", (code, reason) => {
    ended();
    if (code !== 1006) failure = `the server closed the connection (${code} ${reason})`;
    lostAt ??= Date.now();
    if (asked && job === undefined) failure += "; the job may have been started";
    if (job === undefined || IN_VAIN.has(code) || Date.now() - lostAt > PATIENCE_MS) {
      fail(69, `cannot go on: ${failure}`);
    }
    setTimeout(connect, 500);
  });
  socket.on("open", async () => {
    lostAt = null;
    stop = () => job !== undefined && call("job.stop", { id: job });
    if (job === undefined) {
      const params = { job: { command: process.argv.slice(2) }, follow: DELIVERY };
      asked = true;
      const result = await call("job.run", params);
      if (result === undefined) return;
      job = result.job.id;
      console.error(`job ${job}`);
    } else {
      call("job.log", { id: job, offset, delivery: DELIVERY });
    }
    if (stopping) stop();
  });
}

connect();
