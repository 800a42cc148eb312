"""PyFCM sends to a device group; prints what the library answered, as one line of JSON. It cannot make groups; python-gcm cannot
address them (its `to` must be a topic)."""

import json
import sys

from pyfcm import FCMNotification

url, key, notification_key = sys.argv[1:]
fcm = FCMNotification(api_key=key)
fcm.FCM_END_POINT = url


def send(target, n):
    return fcm.notify_single_device(registration_id=target, data_message={"n": n})


print(json.dumps({"whole": send(notification_key, "1"), "none": send(notification_key[:-1], "x")}))
