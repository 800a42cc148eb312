"""HTTP/2 clients that mean harm, or only do nothing; each prints what came of it, as lines of JSON."""

import json
import socket
import ssl
import sys
import time

import h2.config
import h2.connection
import h2.settings
from hyperframe.frame import ContinuationFrame, DataFrame, HeadersFrame, PingFrame, SettingsFrame

what, address, ca_file, key, token = sys.argv[1:6]
host, port = address.rsplit(":", 1)
PATIENCE = 30
SETTINGS_ACK = bytes.fromhex("000000 04 01 00000000")
PING_ACK = bytes.fromhex("000008 06 01 00000000")
BODY = json.dumps({"to": token, "data": {"n": "drained"}}).encode()


def say(**what):
    print(json.dumps(what), flush=True)


class Client:
    """Sends with the library, or raw; reads raw, because the library takes nothing after a GOAWAY."""

    def __init__(self, preface=True):
        context = ssl.create_default_context(cafile=ca_file)
        context.set_alpn_protocols(["h2"])
        self.socket = context.wrap_socket(socket.create_connection((host, int(port))), server_hostname=host)
        assert self.socket.selected_alpn_protocol() == "h2"
        self.socket.settimeout(PATIENCE)
        # It is to break rules that the library keeps.
        config = h2.config.H2Configuration(validate_outbound_headers=False, normalize_outbound_headers=False)
        self.h2 = h2.connection.H2Connection(config)
        self.unread = b""
        self.goaway = None
        self.resets = {}
        # Streams that were answered; whether with 200.
        self.answered = {}
        if preface:
            self.h2.initiate_connection()
            self.flush()

    def head(self, length):
        return [
            (":method", "POST"),
            (":scheme", "https"),
            (":authority", host),
            (":path", "/gcm/send"),
            ("authorization", f"key={key}"),
            ("content-type", "application/json"),
            ("content-length", str(length)),
        ]

    def flush(self):
        self.write(self.h2.data_to_send())

    def write(self, data):
        """Whether it could be written before the server closed, or stopped to read."""
        try:
            self.socket.sendall(data)
            return True
        except (OSError, ssl.SSLError):
            return False

    def read(self, timeout=PATIENCE):
        """Takes what there is; `False` at the end."""
        self.socket.settimeout(timeout)
        try:
            data = self.socket.recv(65536)
        except TimeoutError:
            return True
        except (OSError, ssl.SSLError):
            return False
        finally:
            self.socket.settimeout(PATIENCE)
        if not data:
            return False
        self.unread += data
        while len(self.unread) >= 9:
            length = int.from_bytes(self.unread[:3], "big")
            if len(self.unread) < 9 + length:
                break
            kind, flags, stream = self.unread[3], self.unread[4], int.from_bytes(self.unread[5:9], "big")
            payload, self.unread = self.unread[9 : 9 + length], self.unread[9 + length :]
            if kind == 1:
                # An indexed `:status 200` comes first.
                self.answered[stream] = payload[0] == 0x88
            elif kind == 3:
                self.resets[stream] = int.from_bytes(payload, "big")
            elif kind == 4 and not flags & 1:
                self.write(SETTINGS_ACK)
            elif kind == 6 and not flags & 1:
                self.write(PING_ACK + payload)
            elif kind == 7:
                self.goaway = int.from_bytes(payload[4:8], "big")
        return True

    def until_closed(self):
        """Whether the server ends the connection."""
        end = time.monotonic() + PATIENCE
        while self.read(1):
            if time.monotonic() > end:
                return False
        return True


def reset(pause):
    client = Client()
    client.read()
    sent, alive = 0, True
    while alive and sent < 20_000:
        # A stream id is not used twice, and the library has no bound of its own here.
        stream = 2 * sent + 1
        head = HeadersFrame(stream, client.h2.encoder.encode(client.head(len(BODY))))
        head.flags.add("END_HEADERS")
        alive = client.write(head.serialize())
        if pause:
            # Long enough for the request to be looked at.
            time.sleep(0.002)
        alive = alive and client.write(bytes.fromhex("00000403 00") + stream.to_bytes(4, "big") + (8).to_bytes(4, "big"))
        sent += 1
    say(sent=sent, ended=not alive or client.until_closed())


def continuation():
    client = Client()
    head = HeadersFrame(1, client.h2.encoder.encode(client.head(0)))
    written, alive = 0, client.write(head.serialize())
    more = ContinuationFrame(1, b"\x00\x05x-big\x7f\x80\x7f" + b"y" * 16_000).serialize()
    while alive and written < 64 << 20:
        alive = client.write(more)
        written += len(more)
    say(bytes=written, ended=not alive or client.until_closed())


def flood(frame):
    """Never reads; ends when the server reads no more, or closes."""
    client = Client()
    client.socket.settimeout(2)
    frames, many = 0, frame.serialize() * 1_000
    begun = time.monotonic()
    while client.write(many) and time.monotonic() - begun < 10:
        frames += 1_000
    say(frames=frames)


def streams():
    client = Client()
    client.read()
    for number in range(300):
        head = HeadersFrame(2 * number + 1, client.h2.encoder.encode(client.head(len(BODY))))
        head.flags.add("END_HEADERS")
        client.write(head.serialize())
    while len(client.resets) < 200 and client.read():
        pass
    for number in range(100):
        data = DataFrame(2 * number + 1, BODY)
        data.flags.add("END_STREAM")
        client.write(data.serialize())
    while len(client.answered) < 100 and client.read():
        pass
    # 7: REFUSED_STREAM.
    refused = [stream for stream, code in client.resets.items() if code == 7 and stream > 200]
    say(refused=len(refused), answered=sum(client.answered.values()))


def preface():
    client = Client(preface=False)
    client.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b"\xff" * 10_000)
    say(ended=client.until_closed())


def idle():
    client, mute = Client(), Client(preface=False)
    begun = time.monotonic()
    ended = client.until_closed()
    say(ended=ended, goaway=client.goaway, mute_ended=mute.until_closed(), after=time.monotonic() - begun)


def unread():
    """Its windows stay shut: the answer never fits."""
    client = Client(preface=False)
    client.h2.local_settings = h2.settings.Settings(
        client=True, initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0}
    )
    client.h2.initiate_connection()
    client.flush()
    body = json.dumps({"registration_ids": ["nonsense"] * 1000}).encode()
    client.h2.send_headers(1, client.head(len(body)))
    client.h2.send_data(1, body, end_stream=True)
    client.flush()
    say(ended=client.until_closed(), answered=client.answered.get(1))


def window():
    client = Client()
    client.read()
    client.h2.send_headers(1, client.head(4 << 20))
    client.flush()
    frame, alive = DataFrame(1, b"x" * 16_384).serialize(), True
    for _ in range(4096):
        alive = alive and client.write(frame)
    say(ended=not alive or client.until_closed())


def drain():
    client = Client()
    client.read()
    client.h2.send_headers(1, client.head(len(BODY)))
    client.h2.send_data(1, BODY[:5])
    client.flush()
    # Answered on the way, so that the server has the other.
    client.h2.send_headers(3, client.head(len(BODY)))
    client.h2.send_data(3, BODY, end_stream=True)
    client.flush()
    while 3 not in client.answered and client.read():
        pass
    say(open=client.answered[3])
    while client.goaway is None and client.read():
        pass
    say(goaway=client.goaway)
    # Raw: the library sends nothing after a GOAWAY.
    rest = DataFrame(1, BODY[5:])
    rest.flags.add("END_STREAM")
    client.write(rest.serialize())
    ended = client.until_closed()
    say(answered=client.answered.get(1), ended=ended)


{
    "reset": lambda: reset(False),
    "reset-later": lambda: reset(True),
    "continuation": continuation,
    "settings": lambda: flood(SettingsFrame(0)),
    "ping": lambda: flood(PingFrame(0, b"12345678")),
    "streams": streams,
    "preface": preface,
    "idle": idle,
    "unread": unread,
    "window": window,
    "drain": drain,
}[what]()
