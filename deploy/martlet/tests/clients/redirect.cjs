// Aims a client whose hosts are constants at a broker on this machine: every connection to a Google host goes to 127.0.0.1,
// port 443 to MARTLET_HTTPS, port 5228 to MARTLET_MCS. The client itself is unchanged. Load it with `node -r`.
'use strict';

const net = require('net');
const tls = require('tls');

const PORTS = { 443: Number(process.env.MARTLET_HTTPS), 5228: Number(process.env.MARTLET_MCS) };

const connect = net.Socket.prototype.connect;
net.Socket.prototype.connect = function (...args) {
  // Called with options, or with an array of options and callback that Node has normalised.
  const normalised = Array.isArray(args[0]);
  const options = normalised ? args[0][0] : args[0];
  if (options && typeof options === 'object' && /(^|\.)(google\.com|googleapis\.com)$/.test(options.host || '')) {
    const port = PORTS[options.port];
    if (!port) throw new Error(`no broker listener stands for ${options.host}:${options.port}`);
    const aimed = { ...options, host: '127.0.0.1', port, servername: undefined, lookup: undefined };
    if (normalised) {
      const copy = [aimed, args[0][1]];
      // Node marks normalised arguments by a symbol.
      for (const symbol of Object.getOwnPropertySymbols(args[0])) copy[symbol] = args[0][symbol];
      args[0] = copy;
    } else {
      args[0] = aimed;
    }
  }
  return connect.apply(this, args);
};

// The broker's certificate is checked, for the address it is reached by.
const checkServerIdentity = tls.checkServerIdentity;
tls.checkServerIdentity = (host, cert) =>
  checkServerIdentity(/(^|\.)(google\.com|googleapis\.com)$/.test(host) ? '127.0.0.1' : host, cert);
