"""httpx asks the same over HTTP/2 and over HTTP/1.1; prints what was answered, as one line of JSON."""

import asyncio
import json
import ssl
import sys

import httpx

base, ca_file, key, token = sys.argv[1:5]
JSON, FORM = "application/json", "application/x-www-form-urlencoded"
trust = ssl.create_default_context(cafile=ca_file)


def send(content, kind=JSON, key=key, path="/gcm/send", method="POST", further=()):
    headers = [("Authorization", f"key={key}")] if key else []
    headers += [("Content-Type", kind)] if kind else []
    return method, path, headers + list(further), content


def of(**fields):
    return json.dumps(fields).encode()


def in_parts(content):
    """Without a length."""
    yield content[:7]
    yield content[7:]


def asked():
    """Named requests; a body in parts is made anew for each try."""
    return {
        "one": send(of(to=token, data={"n": "1"})),
        "many": send(of(registration_ids=[token, "nonsense", ""], data={"n": "2"})),
        "thousand": send(of(registration_ids=["nonsense"] * 1000)),
        "fcm": send(of(to=token, data={"n": "3"}, time_to_live=60), path="/fcm/send/"),
        "parts": send(in_parts(of(to=token, data={"n": "4"}))),
        "plain": send(f"registration_id={token}&data.n=5".encode(), FORM),
        "plain_error": send(b"registration_id=nonsense", FORM),
        "no_type": send(of(to=token), None),
        "dry": send(of(to=token, dry_run=True)),
        "bad_ttl": send(of(to=token, time_to_live=-1)),
        "bad_json": send(b"{"),
        "no_key": send(of(to=token), key=None),
        "wrong_key": send(b"{", key="wrong"),
        "get": send(None, method="GET"),
        "elsewhere": send(of(to=token), path="/nowhere"),
        "large": send(b"x" * (5 << 20)),
        "many_headers": send(of(to=token), further=[(f"x-{n}", "y") for n in range(150)]),
        "huge_header": send(of(to=token), further=[("x-huge", "y" * 60_000)]),
        "checkin": send(b"\xff", None, None, path="/checkin"),
        "register": send(b"app=x", FORM, None, path="/c2dm/register3"),
    }


def answered(http2):
    answers = {}
    # One connection each: what a server does to it after a bad request is its own business.
    for name, (method, path, headers, content) in asked().items():
        with httpx.Client(http1=not http2, http2=http2, verify=trust, timeout=60) as client:
            try:
                answer = client.request(method, base + path, headers=headers, content=content)
            except httpx.HTTPError as error:
                answers[name] = {"failed": repr(error)}
                continue
        answers[name] = {
            "version": answer.http_version,
            "status": answer.status_code,
            "type": answer.headers.get("content-type"),
            "allow": answer.headers.get("allow"),
            "length": answer.headers.get("content-length"),
            "connection": answer.headers.get("connection"),
            "body": answer.text,
        }
    return answers


async def at_once(count):
    """Over one connection."""
    limits = httpx.Limits(max_connections=1)
    async with httpx.AsyncClient(http1=False, http2=True, verify=trust, timeout=60, limits=limits) as client:
        method, path, headers, _ = send(b"")
        sends = (
            client.request(method, base + path, headers=headers, content=of(to=token, data={"n": f"at once {n}"}))
            for n in range(count)
        )
        return [answer.json()["success"] for answer in await asyncio.gather(*sends)]


answers = {"h2": answered(True), "h1": answered(False), "at_once": asyncio.run(at_once(int(sys.argv[5])))}
print(json.dumps(answers))
