"""pushjack's GCMClient says all that it can; prints what it told its caller, as one line of JSON. It has no topic or group calls of its
own: both go through as ids."""

import json
import sys

from pushjack import GCMClient

stage = json.loads(sys.argv[1])
token, second, old, gone, foreign = (stage[name] for name in ("token", "second", "old", "gone", "foreign"))


def client(key):
    made = GCMClient(key)
    made.url = stage["url"] + "/fcm/send"
    return made


def shown(response):
    return {
        "statuses": [answer.status_code for answer in response.responses],
        "data": response.data,
        "successes": response.successes,
        "failures": response.failures,
        "errors": [[type(error).__name__, error.identifier] for error in response.errors],
        "canonical": [[pair.old_id, pair.new_id] for pair in response.canonical_ids],
    }


gcm = client(stage["key"])
told = {}


def send(name, ids, message, by=gcm, **options):
    told[name] = shown(by.send(ids, message, **options))


send(
    "one",
    token,
    {"n": "1", "word": "ü", "deep": {"list": [1, True]}},
    notification={"title": "Zwölf", "body": "b", "icon": "i"},
    collapse_key="demo",
    delay_while_idle=True,
    time_to_live=600,
    restricted_package_name=stage["app"],
)
send("text", [token], "said", low_priority=True)
send("many", [token, "nonsense", second, gone, foreign], {"n": "2", "notification": {"title": "t"}})
send("moved", [old, second], {"n": "3"})
send("dry", token, {"n": "x"}, dry_run=True)
send("now_or_never", token, {"n": "x"}, time_to_live=0)
send("package", token, {"n": "x"}, restricted_package_name="com.other")
send("big", token, "x" * 4096)
send("key", token, {"from": "x"})
send("ttl", token, {"n": "x"}, time_to_live=2419201)
send("refused", [token, second], {"n": "x"}, by=client("wrong"))
send("topic", "/topics/" + stage["topic"], {"n": "4"})
send("group", stage["group"], {"n": "5"})
# In two requests. With 1,001 ids the second would name both `to` and what the first had: a defect of the library.
send("thousand", [token] + ["nonsense"] * 1001, {"n": "6"})
many = told["thousand"]
told["thousand"] = {"statuses": many["statuses"], "successes": many["successes"], "failures": len(many["failures"])}
print(json.dumps(told))
