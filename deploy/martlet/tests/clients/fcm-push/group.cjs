// fcm-push sends to a device group once; prints a line when its promise comes to something, and goes on as an app server does.
'use strict';

const FCM = require('fcm-push');

const stage = JSON.parse(process.argv[2]);
new FCM(stage.key).send({ to: stage.group, data: { n: '1' } }).then(
  (answer) => console.log(JSON.stringify({ told: { answer } })),
  (error) => console.log(JSON.stringify({ told: { error } })),
);
