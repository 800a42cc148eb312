// node-gcm sends one message to a token, then one to three with a collapse key, one of them unknown; prints what the library answered.
'use strict';

const gcm = require('node-gcm');

const [url, key, token] = process.argv.slice(2);
const sender = new gcm.Sender(key, { uri: url });
const message = (n) => new gcm.Message({ collapseKey: n === 2 ? 'demo' : undefined, timeToLive: 600, data: { n: String(n) } });

sender.send(message(1), { registrationTokens: [token] }, (error, one) => {
  if (error) throw new Error(`one: ${error}`);
  sender.send(message(2), { registrationTokens: [token, 'nonsense', token] }, (failed, many) => {
    if (failed) throw new Error(`many: ${failed}`);
    sender.sendNoRetry(message(3), { registrationTokens: [token] }, (last, alone) => {
      if (last) throw new Error(`alone: ${last}`);
      const wrong = new gcm.Sender('wrong', { uri: url });
      wrong.sendNoRetry(message(4), { registrationTokens: [token] }, (refused) => {
        console.log(JSON.stringify({ one, many, alone, refused }));
      });
    });
  });
});
