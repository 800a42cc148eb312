//! Registrations that end or are replaced: by their device, by its rates, by their age. On the built executable.

use martlet_proto::mcs::{
    frame::{self, Tag},
    stanza::Stanza,
};
use serde_json::{Value, json};

use crate::{
    app_server::{Answer, send_form, send_json},
    broker::{Broker, ONE, TWO, shared},
    device::{Mcs, PATIENCE, check_in, value},
    hostile::{APP, accepted, broker_with, limits, until},
};

/// Two Instance IDs.
const IIDS: [&str; 2] = ["eAbCdEfGhIj", "fAbCdEfGhIj"];

/// The one result of a send to `token`.
fn result_of(broker: &Broker, key: &str, token: &str) -> Value {
    let answer = send_json(&broker.address("http"), key, &json!({ "to": token }));
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()["results"][0].clone()
}

#[test]
fn rg_14_delete_token_answers_a_token_line_and_ends_that_token_only() {
    let broker = shared();
    let identity = check_in(broker);
    let form = |sender: &str, iid: &str| format!("app={APP}&sender={sender}&scope=GCM&appid={iid}");
    let token = |form: &str| identity.register_form(broker, form).text().strip_prefix("token=").unwrap().to_owned();
    let (one, two, other) = (
        token(&form(ONE.0, IIDS[0])),
        token(&form(TWO.0, IIDS[0])),
        token(&format!("app={APP}.other&sender={}&scope=GCM&appid={}", ONE.0, IIDS[1])),
    );
    let answer = identity.register_form(broker, &format!("{}&delete=true", form(ONE.0, IIDS[0])));
    assert_eq!((answer.status, answer.text()), (200, &*format!("token={}", ONE.0)));
    assert_eq!(result_of(broker, ONE.1, &one), json!({ "error": "NotRegistered" }));
    assert!(result_of(broker, TWO.1, &two)["message_id"].is_string());
    assert!(result_of(broker, ONE.1, &other)["message_id"].is_string());
    // Once more: it is gone, which is what was asked for.
    let answer = identity.register_form(broker, &format!("{}&X-delete=1", form(ONE.0, IIDS[0])));
    assert!(answer.text().starts_with("token="), "{}", answer.text());
    // A token that is gone is made anew.
    assert_ne!(token(&form(ONE.0, IIDS[0])), one);
}

#[test]
fn rg_15_delete_id_ends_every_token_of_the_instance_and_no_other() {
    let broker = shared();
    let identity = check_in(broker);
    let token = |app: &str, sender: &str, scope: &str, iid: &str| {
        let form = format!("app={app}&sender={sender}&scope={scope}&appid={iid}");
        identity.register_form(broker, &form).text().strip_prefix("token=").unwrap().to_owned()
    };
    let gone = [token(APP, ONE.0, "GCM", IIDS[0]), token(APP, TWO.0, "GCM", IIDS[0]), token(APP, ONE.0, "*", IIDS[0])];
    let kept = token("com.example.other", ONE.0, "GCM", IIDS[1]);
    let form = format!("app={APP}&sender=*&scope=*&appid={}&delete=true", IIDS[0]);
    let answer = identity.register_form(broker, &form);
    assert_eq!(answer.status, 200);
    assert!(answer.text().starts_with("token="), "{}", answer.text());
    for (key, token) in [ONE.1, TWO.1, ONE.1].into_iter().zip(&gone) {
        assert_eq!(result_of(broker, key, token), json!({ "error": "NotRegistered" }));
    }
    assert!(result_of(broker, ONE.1, &kept)["message_id"].is_string());
    // Without an instance there is nothing that could be meant.
    let answer = identity.register_form(broker, &format!("app={APP}&sender=*&scope=*&delete=true"));
    assert_eq!(answer.text(), "Error=INVALID_PARAMETERS");
}

#[test]
fn rg_21_a_token_with_a_ttl_expires() {
    let broker = shared();
    let identity = check_in(broker);
    let form = format!("app={APP}&sender={}&scope=GCM&appid={}&ttl=2", ONE.0, IIDS[0]);
    let answer = identity.register_form(broker, &form);
    let token = answer.text().strip_prefix("token=").unwrap();
    let lasting = identity.register(broker, "com.example.lasting", ONE.0);
    until("it expires", || result_of(broker, ONE.1, token) == json!({ "error": "NotRegistered" }));
    assert!(result_of(broker, ONE.1, &lasting)["message_id"].is_string());
    let again = identity.register_form(broker, &form);
    assert!(again.text().starts_with("token=") && again.text() != answer.text(), "{}", again.text());
}

#[test]
fn h081_h114_rg_22_a_send_to_the_token_of_an_old_instance_delivers_and_names_the_new_one() {
    let broker = shared();
    let identity = check_in(broker);
    let [old, new] = IIDS.map(|iid| {
        let form = format!("app={APP}&sender={}&scope=GCM&appid={iid}", ONE.0);
        identity.register_form(broker, &form).text().strip_prefix("token=").unwrap().to_owned()
    });
    assert_ne!(old, new);
    let body = json!({ "registration_ids": [old, new], "data": { "k": "json" } });
    let json = send_json(&broker.address("http"), ONE.1, &body).json();
    assert_eq!((&json["success"], &json["canonical_ids"]), (&json!(2), &json!(1)), "{json}");
    assert_eq!(json["results"][0]["registration_id"], json!(new));
    assert!(json["results"][0]["message_id"].is_string() && json["results"][1].get("registration_id").is_none());
    let plain = send_form(&broker.address("http"), ONE.1, &format!("registration_id={old}&data.k=plain"));
    let lines: Vec<_> = plain.text().lines().collect();
    assert!(lines.len() == 2 && lines[0].starts_with("id="), "{lines:?}");
    assert_eq!(lines[1], format!("registration_id={new}"));
    let mut mcs = identity.connect(broker);
    let values: Vec<_> = (0..3).map(|_| value(&mcs.message(), "k").map(ToOwned::to_owned)).collect();
    assert_eq!(values.iter().flatten().collect::<Vec<_>>(), ["json", "json", "plain"]);
}

#[test]
fn rg_20_the_rates_of_an_address_give_503_with_seconds_to_wait_and_are_counted() {
    let broker = broker_with(
        "[admit]\ncheckins_per_sec = 1\ncheckins_burst = 4\nregistrations_per_sec = 1\nregistrations_burst = 4\n",
    );
    let identity = check_in(&broker);
    let form = format!("app={APP}&sender={}", ONE.0);
    let beyond = |ask: &dyn Fn() -> Answer| (0..50).map(|_| ask()).find(|answer| answer.status != 200).unwrap();
    let refused = beyond(&|| identity.register_form(&broker, &form));
    assert_eq!((refused.status, refused.text()), (503, "Error=QUOTA_EXCEEDED"));
    let seconds = |answer: &Answer| answer.header("retry-after").unwrap().parse::<u32>().unwrap();
    assert!(seconds(&refused) > 0);
    let request = [0x22, 0, 0x70, 3];
    let refused = beyond(&|| crate::device::check_in_with(&broker, &request, &[]));
    assert_eq!(refused.status, 503);
    assert!(seconds(&refused) > 0);
    assert!(limits(&broker, "Registrations") >= 1.0 && limits(&broker, "Checkins") >= 1.0);
    // It fills again, and sends are not concerned.
    let mut token = String::new();
    until("it fills again", || {
        let answer = identity.register_form(&broker, &form);
        token = answer.text().strip_prefix("token=").unwrap_or_default().to_owned();
        answer.status == 200
    });
    accepted(&send_json(&broker.address("http"), ONE.1, &json!({ "to": token })));
}

#[test]
fn tokens_and_identities_of_another_cluster_are_invalid() {
    let (here, there) = (shared(), Broker::start());
    let foreign = check_in(&there);
    let token = foreign.register(&there, APP, ONE.0);
    assert!(result_of(&there, ONE.1, &token)["message_id"].is_string());
    assert_eq!(result_of(here, ONE.1, &token), json!({ "error": "InvalidRegistration" }));
    let plain = send_form(&here.address("http"), ONE.1, &format!("registration_id={token}"));
    assert_eq!(plain.text(), "Error=InvalidRegistration\n");
    let answer = foreign.register_form(here, &format!("app={APP}&sender={}", ONE.0));
    assert_eq!((answer.status, answer.text()), (401, "Error=AUTHENTICATION_FAILED"));
    let mut mcs = Mcs::open(here);
    mcs.write(&frame::encode_first(41, Tag::LoginRequest, &foreign.login_request()));
    let said = mcs.closed(PATIENCE);
    assert!(matches!(&said[..], [Stanza::LoginResponse(response), ..] if response.error.is_some()), "{said:?}");
}
