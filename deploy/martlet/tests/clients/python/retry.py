"""PyFCM sends once and is told to come back; prints what it was answered in the end, as one line of JSON."""

import json
import sys

from pyfcm import FCMNotification

url, key, token = sys.argv[1:]
fcm = FCMNotification(api_key=key)
fcm.FCM_END_POINT = url
print(json.dumps({"sends": True}), flush=True)
answer = fcm.notify_single_device(registration_id=token, data_message={"n": "1"})
print(json.dumps({"success": answer["success"]}), flush=True)
