// @liamcottle/push-receiver checks in, installs, registers, prints its token, then each message as a line of JSON. Run with
// `node -r ../redirect.cjs`.
'use strict';

const { AndroidFCM, Client } = require('@liamcottle/push-receiver');

const [sender] = process.argv.slice(2);

(async () => {
  const cert = '38918a453d07199354f8b19af05ec6562ced5788';
  const app = 'com.example.app';
  const { gcm, fcm } = await AndroidFCM.register('any-key', sender, sender, `1:${sender}:android:1`, app, cert);
  console.log(JSON.stringify({ token: fcm.token }));
  const client = new Client(gcm.androidId, gcm.securityToken, []);
  client.on('ON_DATA_RECEIVED', (message) => console.log(JSON.stringify({ message })));
  client.on('connect', () => console.log(JSON.stringify({ connected: true })));
  await client.connect();
})().catch((error) => {
  console.error(error);
  process.exit(1);
});
