// fcm-node sends to a device group once; prints a line when it calls back, and goes on as an app server does.
'use strict';

const FCM = require('fcm-node');

const stage = JSON.parse(process.argv[2]);
new FCM(stage.key).send({ to: stage.group, data: { n: '1' } }, (error, answer) =>
  console.log(JSON.stringify({ told: { error, answer } })),
);
