// FcmClient of @aracna/fcm logs in, prints its login and the answers to its pings, and logs in again whenever its socket closes.
// Run with `node -r ../redirect.cjs`.
'use strict';

const { FcmClient } = require('@aracna/fcm');

const [id, securityToken, port] = process.argv.slice(2);
const say = (event) => console.log(JSON.stringify(event));

async function connect() {
  const client = new FcmClient({
    acg: { id: BigInt(id), securityToken: BigInt(securityToken) },
    heartbeat: { frequency: 500 },
  });
  client.on('login', (response) => say({ login: response.id }));
  client.on('heartbeat', (ack) => say({ heartbeat: ack.last_stream_id_received }));
  const failed = await client.connect({ host: '127.0.0.1', port: Number(port) });
  if (failed instanceof Error) {
    setTimeout(connect, 200);
    return;
  }
  client.getSocket().on('close', () => {
    say({ closed: true });
    setTimeout(connect, 200);
  });
}

connect();
