// fcm-push says all that it can, one call after the other; prints what its promises came to. It has no topic or group calls.
'use strict';

const FCM = require('fcm-push');

const stage = JSON.parse(process.argv[2]);
const { token, second, old, gone, foreign, topic } = stage;
const fcm = new FCM(stage.key);

// The library passes on the text that came; what is JSON is shown as such.
const shown = (text) => {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
};
const send = (message, by = fcm) =>
  by.send(message).then(
    (answer) => ({ answer: shown(answer) }),
    (error) => ({ error: shown(error) }),
  );

async function main() {
  const told = {};
  told.one = await send({
    to: token,
    collapse_key: 'demo',
    time_to_live: 600,
    priority: 'high',
    delay_while_idle: true,
    content_available: true,
    mutable_content: true,
    restricted_package_name: stage.app,
    data: { n: '1', word: 'ü', deep: { list: [1, true] } },
    notification: { title: 'Zwölf', body: 'b', badge: '3', body_loc_args: ['x'] },
  });
  told.many = await send({ registration_ids: [token, 'nonsense', second, gone, foreign], data: { n: '2' } });
  told.none = await send({ registration_ids: [gone, 'nonsense'], data: { n: 'x' } });
  told.moved = await send({ to: old, data: { n: '3' } });
  told.dry = await send({ to: token, dry_run: true, data: { n: 'x' } });
  told.nobody = await send({ data: { n: 'x' } });
  for (const [name, message] of Object.entries({
    nonsense: { to: 'nonsense' },
    gone: { to: gone },
    foreign: { to: foreign },
    package: { to: token, restricted_package_name: 'com.other' },
    big: { to: token, data: { n: 'x'.repeat(4096) } },
    key: { to: token, data: { from: 'x' } },
    ttl: { to: token, time_to_live: -1 },
  })) {
    told[name] = await send(message);
  }
  told.refused = await send({ to: token, data: { n: 'x' } }, new FCM('wrong'));
  told.topic = await send({ to: `/topics/${topic}`, time_to_live: 6000, data: { n: '4' } });
  told.condition = await send({ condition: `'none' in topics || '${topic}' in topics`, data: { n: '5' } });
  told.topic_big = await send({ to: `/topics/${topic}`, data: { n: 'x'.repeat(2048) } });
  told.callback = await new Promise((resolve) =>
    fcm.send({ to: token, data: { n: '6' } }, (error, answer) => resolve({ error, answer: shown(answer) })),
  );
  fcm.keepAlive = true;
  told.parallel = await Promise.all(Array.from({ length: 8 }, () => send({ to: token, data: { n: '7' } })));
  console.log(JSON.stringify(told));
}

main();
