"""django-push-notifications says all that it can to GCM and FCM; prints what it told its caller and what it did to its table of
devices, as one line of JSON. It has no topic or group calls of its own: both go through as options."""

import json
import sys
from urllib.error import HTTPError

import django
from django.conf import settings

stage = json.loads(sys.argv[1])
token, second, old, gone, foreign = (stage[name] for name in ("token", "second", "old", "gone", "foreign"))
settings.configure(
    INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth", "push_notifications"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    PUSH_NOTIFICATIONS_SETTINGS={
        "GCM_API_KEY": stage["key"],
        "GCM_POST_URL": stage["url"] + "/gcm/send",
        "FCM_API_KEY": stage["key"],
        "FCM_POST_URL": stage["url"] + "/fcm/send",
    },
)
django.setup()

from django.core.management import call_command  # noqa: E402
from push_notifications.gcm import GCMError, send_message  # noqa: E402
from push_notifications.models import GCMDevice  # noqa: E402
from push_notifications.settings import PUSH_NOTIFICATIONS_SETTINGS  # noqa: E402

call_command("migrate", verbosity=0)


def device(registration_id, kind):
    return GCMDevice.objects.create(registration_id=registration_id, cloud_message_type=kind)


def outcome(send):
    try:
        return send()
    except GCMError as error:
        return {"raised": error.args[0]}
    except HTTPError as error:
        return {"status": error.code}


told = {}
gcm = device(token, "GCM")
fcm = device(token, "FCM")
options = {"collapse_key": "demo", "time_to_live": 600, "priority": "high", "delay_while_idle": True}
options.update(content_available=True, restricted_package_name=stage["app"])
extra = {"n": "1", "word": "ü", "deep": {"list": [1, True]}}
# Under a key of its own: both wait together.
told["gcm"] = gcm.send_message("said", extra=dict(extra), **dict(options, collapse_key="other"))
# What is known as a notification's is taken out of the data and of the options.
told["fcm"] = fcm.send_message("said", extra=dict(extra, title="Zwölf"), badge="3", body_loc_args=["x"], **options)
told["fcm_plain"] = fcm.send_message("said", extra={"n": "2", "title": "t"}, use_fcm_notifications=False)
told["dry"] = gcm.send_message(None, extra={"n": "x"}, dry_run=True)
told["package"] = outcome(lambda: gcm.send_message(None, extra={"n": "x"}, restricted_package_name="com.other"))
told["big"] = outcome(lambda: gcm.send_message("x" * 4096))
told["key"] = outcome(lambda: gcm.send_message(None, extra={"from": "x"}))
told["ttl"] = outcome(lambda: gcm.send_message(None, extra={"n": "x"}, time_to_live=-1))

# In bulk: a device that is gone becomes inactive, one that moved gets its new token.
GCMDevice.objects.all().delete()
for registration_id in (token, "nonsense", old, gone):
    device(registration_id, "FCM")
device(second, "GCM")
told["bulk"] = GCMDevice.objects.all().send_message(None, extra={"n": "3"})
told["table"] = [
    [row.registration_id, row.cloud_message_type, row.active] for row in GCMDevice.objects.order_by("id")
]
told["bulk_again"] = GCMDevice.objects.all().send_message(None, extra={"n": "4"})
device(foreign, "GCM")
told["foreign"] = outcome(lambda: GCMDevice.objects.filter(cloud_message_type="GCM").send_message(None, extra={"n": "5"}))

told["topic"] = send_message(None, {"n": "6"}, "FCM", to="/topics/" + stage["topic"])
told["condition"] = send_message([], {"n": "7"}, "GCM", condition="'none' in topics || '%s' in topics" % stage["topic"])
told["group_to"] = send_message([], {"n": "8"}, "GCM", to=stage["group"])
told["group_key"] = send_message([], {"n": "9"}, "FCM", notification_key=stage["group"])

PUSH_NOTIFICATIONS_SETTINGS["GCM_API_KEY"] = "wrong"
told["refused"] = outcome(lambda: send_message(token, {"n": "x"}, "GCM"))
print(json.dumps(told))
