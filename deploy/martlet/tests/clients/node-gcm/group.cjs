// node-gcm sends to a device group, then to a key that is none; prints what the library answered. It cannot make groups.
'use strict';

const gcm = require('node-gcm');

const [url, key, notificationKey] = process.argv.slice(2);
const sender = new gcm.Sender(key, { uri: url });
const message = (n) => new gcm.Message({ timeToLive: 600, data: { n: String(n) } });

sender.send(message(2), { notificationKey }, (error, whole) => {
  if (error) throw new Error(`whole: ${error}`);
  sender.send(message(3), { notificationKey: notificationKey.slice(0, -1) }, (failed, none) => {
    if (failed) throw new Error(`none: ${failed}`);
    console.log(JSON.stringify({ whole, none }));
  });
});
