"""python-gcm and PyFCM send; prints what the libraries answered, as one line of JSON."""

import json
import sys

from gcm import GCM
from pyfcm import FCMNotification

url, key, token = sys.argv[1:]
answers = {}

gcm = GCM(key)
gcm.url = url
answers["json"] = gcm.json_request(registration_ids=[token], data={"n": "1"}, time_to_live=600)
answers["json_mixed"] = gcm.json_request(registration_ids=[token, "nonsense"], data={"n": "2"})
answers["plain"] = gcm.plaintext_request(registration_id=token, data={"n": "3"})
try:
    gcm.plaintext_request(registration_id="nonsense", data={"n": "x"})
except Exception as error:  # the library has a class for each word
    answers["plain_error"] = type(error).__name__
try:
    wrong = GCM("wrong")
    wrong.url = url
    wrong.json_request(registration_ids=[token], data={"n": "x"})
except Exception as error:
    answers["refused"] = type(error).__name__

fcm = FCMNotification(api_key=key)
fcm.FCM_END_POINT = url.replace("/gcm/", "/fcm/")
answers["fcm_single"] = fcm.notify_single_device(registration_id=token, data_message={"n": "4"})
answers["fcm_multiple"] = fcm.notify_multiple_devices(registration_ids=[token, token], data_message={"n": "5"})
answers["fcm_dry"] = fcm.notify_single_device(registration_id=token, data_message={"n": "x"}, dry_run=True)

print(json.dumps(answers))
