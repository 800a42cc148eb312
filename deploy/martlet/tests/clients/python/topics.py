"""python-gcm publishes to topics; PyFCM publishes, subscribes, unsubscribes and asks about tokens. Prints what they told their caller,
as one line of JSON. PyFCM's Instance ID host is a constant: an adapter of its HTTP session takes what is for it to the broker."""

import json
import sys

from gcm import GCM
from pyfcm import FCMNotification
from requests.adapters import HTTPAdapter

HOST = "https://iid.googleapis.com"

stage = json.loads(sys.argv[1])
topic, token, second, gone = (stage[name] for name in ("topic", "token", "second", "gone"))
told = {}


class Aimed(HTTPAdapter):
    def send(self, request, **options):
        request.url = request.url.replace(HOST, stage["url"])
        return super().send(request, **options)


def pyfcm(key):
    fcm = FCMNotification(api_key=key)
    fcm.FCM_END_POINT = stage["url"] + "/fcm/send"
    for place in (HOST, fcm.INFO_END_POINT):
        fcm.requests_session.mount(place, Aimed())
    return fcm


def raised(call, *args, **options):
    try:
        return call(*args, **options)
    except Exception as error:  # the library has a class for each case
        return [type(error).__name__, str(error)]


fcm = pyfcm(stage["key"])
wrong = pyfcm("wrong")
told["subscribe"] = fcm.subscribe_registration_ids_to_topic([token, second, gone], topic)
told["subscribe_bad"] = raised(fcm.subscribe_registration_ids_to_topic, [token], "a b")
told["subscribe_many"] = raised(fcm.subscribe_registration_ids_to_topic, [token] * 1001, topic)
told["subscribe_refused"] = raised(wrong.subscribe_registration_ids_to_topic, [token], topic)
told["info"] = fcm.get_registration_id_info(token)
told["info_gone"] = fcm.get_registration_id_info(gone)
told["clean"] = fcm.clean_registration_ids([token, gone, "nonsense", second])

gcm = GCM(stage["key"])
gcm.url = stage["url"] + "/gcm/send"
told["gcm_topic"] = gcm.send_topic_message(
    topic=topic,
    data={"n": "1"},
    notification={"title": "Zwölf"},
    collapse_key="demo",
    time_to_live=600,
    delay_while_idle=True,
    restricted_package_name=stage["app"],
)
told["gcm_dry"] = gcm.send_topic_message(topic=topic, data={"n": "x"}, dry_run=True)
told["gcm_bad"] = raised(gcm.send_topic_message, topic="a b", data={"n": "x"})

told["fcm_topic"] = fcm.notify_topic_subscribers(
    topic_name=topic, message_title="t", message_body="b", data_message={"n": "2"}, collapse_key="other", time_to_live=600
)
told["fcm_data"] = fcm.topic_subscribers_data_message(topic_name=topic, data_message={"n": "3"})
condition = "'none' in topics || '%s' in topics" % topic
told["fcm_condition"] = fcm.notify_topic_subscribers(condition=condition, data_message={"n": "4"}, low_priority=True)
told["fcm_bad"] = raised(fcm.notify_topic_subscribers, condition="'a' in", data_message={"n": "x"})
told["unsubscribe"] = fcm.unsubscribe_registration_ids_from_topic([second, gone], topic)
told["info_after"] = fcm.get_registration_id_info(second)
told["fcm_after"] = fcm.topic_subscribers_data_message(topic_name=topic, data_message={"n": "5"})
print(json.dumps(told))
