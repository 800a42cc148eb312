// node-gcm publishes in each way that it has; prints what it called back with. It cannot subscribe.
'use strict';

const gcm = require('node-gcm');

const stage = JSON.parse(process.argv[2]);
const sender = new gcm.Sender(stage.key, { uri: `${stage.url}/fcm/send` });
const send = (recipient, params) =>
  new Promise((resolve) =>
    sender.send(new gcm.Message(params), recipient, (error, answer) => resolve({ error, answer })),
  );

async function main() {
  const topic = `/topics/${stage.topic}`;
  const told = {};
  told.text = await send(topic, {
    collapseKey: 'demo',
    priority: 'high',
    contentAvailable: true,
    mutableContent: true,
    delayWhileIdle: true,
    timeToLive: 600,
    restrictedPackageName: stage.app,
    data: { n: '1' },
    notification: { title: 'Zwölf', body: 'b' },
    fcm_options: { analytics_label: 'x' },
  });
  told.array = await send([topic], { data: { n: '2' } });
  told.topic = await send({ topic }, { data: { n: '3' } });
  told.to = await send({ to: topic }, { data: { n: '4' } });
  told.condition = await send({ condition: `'none' in topics || '${stage.topic}' in topics` }, { data: { n: '5' } });
  told.elsewhere = await send({ topic }, { restrictedPackageName: 'com.other', data: { n: 'x' } });
  told.dry = await send({ topic }, { dryRun: true, data: { n: 'x' } });
  told.big = await send({ topic }, { data: { n: 'x'.repeat(2048) } });
  told.bad_topic = await send({ topic: '/topics/a b' }, { data: { n: 'x' } });
  told.bad_condition = await send({ condition: "'a' in" }, { data: { n: 'x' } });
  console.log(JSON.stringify(told));
}

main();
