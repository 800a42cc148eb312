//! `/gcm/send` and `/fcm/send`: the error table, the order of checks, results that keep the request's order.

use serde_json::json;

use super::{
    client::{Client, Reply},
    cluster::{Cluster, KEY, device, tag_of, token_key, unregistered},
};

const AUTH: (&str, &str) = ("Authorization", "key=key-of-900100");
const JSON: (&str, &str) = ("Content-Type", "application/json; charset=UTF-8");
const FORM: (&str, &str) = ("Content-Type", "application/x-www-form-urlencoded;charset=UTF-8");

async fn post(client: &mut Client, body: &serde_json::Value) -> Reply {
    client.request("POST /gcm/send", &[AUTH, JSON], body.to_string().as_bytes()).await
}

async fn form(client: &mut Client, body: &str) -> Reply {
    client.request("POST /gcm/send", &[AUTH, FORM], body.as_bytes()).await
}

#[tokio::test]
async fn h001_h002_h011_h020_h029_core_a_token_gets_its_message_id_on_both_paths_of_one_connection() {
    let cluster = Cluster::start(1).await;
    let token = cluster.registered(1).to_string();
    let mut client = cluster.client().await;
    let mut ids = std::collections::BTreeSet::new();
    for path in ["POST /gcm/send", "POST /fcm/send", "POST /fcm/send/"] {
        let body = json!({"to": token, "data": {"k": "v"}}).to_string();
        let reply = client.request(path, &[AUTH, JSON], body.as_bytes()).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        assert!(reply.header("content-type").unwrap().starts_with("application/json"));
        let answer = reply.json();
        assert!(answer["multicast_id"].as_u64().is_some_and(|id| id > 0 && id < 1 << 53), "{answer}");
        assert_eq!(
            (&answer["success"], &answer["failure"], &answer["canonical_ids"]),
            (&json!(1), &json!(0), &json!(0))
        );
        let result = &answer["results"][0];
        assert!(result.get("registration_id").is_none() && result.get("error").is_none());
        let id = result["message_id"].as_str().unwrap().to_owned();
        assert!(id.starts_with("0:") && !id.contains('='), "{id}");
        assert!(ids.insert(id));
    }
    let world = cluster.world.lock().unwrap();
    assert_eq!(world.known.len(), 3);
    drop(world);
    cluster.stop().await;
}

#[tokio::test]
async fn h003_h004_core_other_methods_and_paths_are_refused_and_the_connection_goes_on() {
    let cluster = Cluster::start(1).await;
    let mut client = cluster.client().await;
    for path in ["/gcm/send", "/fcm/send", "/checkin", "/c2dm/register3"] {
        let reply = client.request(&format!("GET {path}"), &[], b"").await;
        assert_eq!((reply.status, reply.header("allow")), (405, Some("POST")), "{path}");
    }
    for path in ["/", "/gcm/send/abc", "/nothing"] {
        assert_eq!(client.request(&format!("POST {path}"), &[AUTH, JSON], b"{}").await.status, 404, "{path}");
    }
    cluster.stop().await;
}

#[tokio::test]
async fn h005_h006_h007_h008_h009_core_a_bad_key_is_told_before_the_body_is_looked_at() {
    let cluster = Cluster::start(1).await;
    for header in
        [None, Some("key-of-900100"), Some("Bearer x"), Some("key="), Some("key=unknown"), Some("AidLogin 1:2")]
    {
        let mut client = cluster.client().await;
        let headers: Vec<(&str, &str)> =
            header.map(|value| ("Authorization", value)).into_iter().chain([JSON]).collect();
        let reply = client.request("POST /gcm/send", &headers, b"{not json").await;
        assert_eq!(reply.status, 401, "{header:?}");
        assert!(reply.text().contains("Unauthorized"));
    }
    // Of this body only the first bytes are ever sent.
    let mut client = cluster.client().await;
    let reply = client.raw(b"POST /gcm/send HTTP/1.1\r\nHost: gcm\r\nContent-Length: 100000\r\n\r\n{").await;
    assert_eq!(reply.status, 401);
    for header in [format!("key={KEY}"), format!("KEY= {KEY} "), format!("key = {KEY}")] {
        let mut client = cluster.client().await;
        let reply = client.request("POST /gcm/send", &[("Authorization", &header), JSON], b"{}").await;
        assert_eq!(reply.status, 200, "{header}");
    }
    cluster.stop().await;
}

#[tokio::test]
async fn h010_core_a_chunked_body_is_accepted() {
    let cluster = Cluster::start(1).await;
    let token = cluster.registered(1);
    let body = json!({"to": token.as_str()}).to_string();
    let (first, second) = body.split_at(7);
    let request = format!(
        "POST /gcm/send HTTP/1.1\r\nHost: gcm\r\nAuthorization: key={KEY}\r\nContent-Type: application/json\r\n\
         Transfer-Encoding: chunked\r\n\r\n{:x}\r\n{first}\r\n{:x}\r\n{second}\r\n0\r\n\r\n",
        first.len(),
        second.len(),
    );
    let reply = cluster.client().await.raw(request.as_bytes()).await;
    assert_eq!(reply.json()["success"], 1);
    cluster.stop().await;
}

#[tokio::test]
async fn h013_h014_core_without_a_json_content_type_the_body_is_a_form() {
    let cluster = Cluster::start(1).await;
    let mut client = cluster.client().await;
    let reply = client.request("POST /gcm/send", &[AUTH], br#"{"to":"x"}"#).await;
    assert_eq!((reply.status, reply.text()), (200, "Error=MissingRegistration\n"));
    assert!(reply.header("content-type").unwrap().starts_with("text/plain"));
    cluster.stop().await;
}

#[tokio::test]
async fn h040_h041_h042_h044_h045_h054_h057_core_what_is_malformed_gets_400() {
    let cluster = Cluster::start(1).await;
    let mut client = cluster.client().await;
    let many = json!({"registration_ids": vec!["x"; 1001]}).to_string();
    for body in [
        "{not json",
        "[]",
        r#"{"registration_ids":"x"}"#,
        &many,
        r#"{"to":"x","registration_ids":["y"]}"#,
        r#"{"to":"x","time_to_live":"600"}"#,
        r#"{"to":"x","priority":"urgent"}"#,
        r#"{"to":"/topics/a b"}"#,
        r#"{"condition":"a in topics"}"#,
    ] {
        let reply = client.request("POST /gcm/send", &[AUTH, JSON], body.as_bytes()).await;
        assert_eq!(reply.status, 400, "{body:.60}");
        assert!(reply.header("content-type").unwrap().starts_with("text/plain") && !reply.body.is_empty());
    }
    cluster.stop().await;
}

#[tokio::test]
async fn h046_h047_h048_h049_h050_h051_h058_h062_core_refusals_stand_in_the_results() {
    let cluster = Cluster::start(1).await;
    let token = cluster.registered(1).to_string();
    let mut client = cluster.client().await;
    let big = "x".repeat(4096);
    for (body, errors) in [
        (json!({}), vec!["MissingRegistration"]),
        (json!({"registration_ids": []}), vec!["MissingRegistration"]),
        (
            json!({"registration_ids": ["", "nonsense", "/topics/a"]}),
            vec!["MissingRegistration", "InvalidRegistration", "InvalidRegistration"],
        ),
        (json!({"to": "/topicz/x"}), vec!["InvalidRegistration"]),
        (json!({"to": format!("{token}x")}), vec!["InvalidRegistration"]),
        (json!({"to": token, "time_to_live": -1}), vec!["InvalidTtl"]),
        (json!({"registration_ids": [token, token], "data": {"from": "x"}}), vec!["InvalidDataKey", "InvalidDataKey"]),
        (json!({"registration_ids": [token, "x"], "data": {"k": big}}), vec!["MessageTooBig", "MessageTooBig"]),
    ] {
        let reply = post(&mut client, &body).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        let answer = reply.json();
        let found: Vec<&str> =
            answer["results"].as_array().unwrap().iter().map(|r| r["error"].as_str().unwrap()).collect();
        assert_eq!(found, errors);
        assert_eq!((&answer["success"], &answer["failure"]), (&json!(0), &json!(errors.len())));
    }
    assert!(cluster.world.lock().unwrap().asked.is_empty(), "nothing of this costs a node anything");
    let twice = post(&mut client, &json!({"registration_ids": [token, token]})).await.json();
    assert_ne!(twice["results"][0]["message_id"], twice["results"][1]["message_id"]);
    cluster.stop().await;
}

#[tokio::test]
async fn h070_h072_h073_h114_core_a_mixed_multicast_has_success_error_and_canonical_side_by_side() {
    let cluster = Cluster::start(3).await;
    let (good, old, new) = (cluster.registered(1), unregistered(2, 1), cluster.registered(2));
    cluster.register(&old, Some(&new));
    let (gone, foreign) = (unregistered(3, 1), cluster.registered(4));
    let id = bytes::Bytes::copy_from_slice(&foreign.registration_id().0);
    cluster.world.lock().unwrap().registered.get_mut(&id).unwrap().0 = "77".into();
    let targets = [&good, &gone, &old, &foreign].map(ToString::to_string);
    let mut client = cluster.client().await;
    let answer = post(&mut client, &json!({"registration_ids": targets})).await.json();
    assert_eq!((&answer["success"], &answer["failure"], &answer["canonical_ids"]), (&json!(2), &json!(2), &json!(1)));
    let results = &answer["results"];
    assert!(results[0]["message_id"].is_string() && results[0].get("registration_id").is_none());
    assert_eq!(results[1], json!({"error": "NotRegistered"}));
    assert_eq!(results[2]["registration_id"], new.as_str());
    assert_eq!(results[3], json!({"error": "MismatchSenderId"}));
    let package = post(&mut client, &json!({"to": good.as_str(), "restricted_package_name": "com.other"})).await.json();
    assert_eq!(package["results"][0]["error"], "InvalidPackageName");
    cluster.stop().await;
}

#[tokio::test]
async fn h021_h043_core_a_thousand_tokens_over_several_nodes_keep_their_order_in_few_calls() {
    let cluster = Cluster::start(3).await;
    let tokens: Vec<_> =
        (1..=1000).map(|n| if n % 7 == 0 { unregistered(n, 1) } else { cluster.registered(n) }).collect();
    let targets: Vec<&str> = tokens.iter().map(|token| token.as_str()).collect();
    let mut client = cluster.client().await;
    let answer = post(&mut client, &json!({"registration_ids": targets, "data": {"k": "v"}})).await.json();
    let results = answer["results"].as_array().unwrap();
    assert_eq!(results.len(), 1000);
    let world = cluster.world.lock().unwrap();
    for (index, (result, token)) in results.iter().zip(&tokens).enumerate() {
        if (index + 1) % 7 == 0 {
            assert_eq!(result["error"], "NotRegistered");
            continue;
        }
        let id: martlet_proto::message::MessageId = result["message_id"].as_str().unwrap().parse().unwrap();
        let (_, asked) = world.asked.iter().find(|(_, operation)| operation.id[..] == id.to_bytes()).unwrap();
        let Some(martlet_proto::cluster::queue::operation::Kind::Enqueue(enqueue)) = &asked.kind else { panic!() };
        assert_eq!(enqueue.device_tag, token.device_tag().0);
    }
    drop(world);
    cluster.stop().await;
}

#[tokio::test]
async fn h074_core_a_dry_run_checks_and_stores_nothing() {
    let cluster = Cluster::start(1).await;
    let (good, gone) = (cluster.registered(1), unregistered(2, 1));
    let mut client = cluster.client().await;
    let targets = [good.as_str(), gone.as_str()];
    let answer = post(&mut client, &json!({"registration_ids": targets, "dry_run": true})).await.json();
    assert_eq!(answer["results"], json!([{"message_id": "fake_message_id"}, {"error": "NotRegistered"}]));
    assert!(cluster.world.lock().unwrap().known.is_empty());
    let reply = form(&mut client, &format!("registration_id={good}&dry_run=1")).await;
    assert_eq!(reply.text(), "id=fake_message_id\n");
    cluster.stop().await;
}

#[tokio::test]
async fn h080_h081_h082_h083_h084_h087_h089_core_plain_text_has_its_lines() {
    let cluster = Cluster::start(1).await;
    let (good, old, gone) = (cluster.registered(1), unregistered(2, 1), unregistered(3, 1));
    let new = cluster.registered(4);
    cluster.register(&old, Some(&good));
    drop(new);
    let mut client = cluster.client().await;
    let reply = form(&mut client, &format!("registration_id={good}&data.a.b=1")).await;
    assert!(reply.text().starts_with("id=0:") && reply.text().ends_with('\n') && reply.text().lines().count() == 1);
    assert!(form(&mut client, &format!("to={good}")).await.text().starts_with("id=0:"));
    assert_eq!(form(&mut client, &format!("registration_id={gone}")).await.text(), "Error=NotRegistered\n");
    assert_eq!(form(&mut client, "data.a=1").await.text(), "Error=MissingRegistration\n");
    let reply = form(&mut client, &format!("registration_id={good}&time_to_live=abc")).await;
    assert_eq!((reply.status, reply.text()), (200, "Error=InvalidTtl\n"));
    let reply = form(&mut client, &format!("registration_id={old}")).await;
    assert_eq!(reply.text().lines().count(), 2);
    assert!(reply.text().lines().nth(1).unwrap().starts_with("registration_id="));
    cluster.stop().await;
}

#[tokio::test]
async fn a_body_above_the_cap_gets_413_in_core_and_is_not_kept() {
    let cluster = Cluster::start(1).await;
    let body = vec![b' '; 4 * 1024 * 1024 + 1];
    let reply = cluster.client().await.request("POST /gcm/send", &[AUTH, JSON], &body).await;
    assert_eq!(reply.status, 413);
    assert!(!reply.body.is_empty());
    cluster.stop().await;
}

#[tokio::test]
async fn a_token_of_an_unknown_key_is_unavailable_and_never_invalid_core() {
    let cluster = Cluster::start(1).await;
    let (known, unknown) = (cluster.registered(1), unregistered(2, 9));
    assert_eq!(unknown.key_id(), token_key(9).id);
    let mut client = cluster.client().await;
    let targets = [known.as_str(), unknown.as_str()];
    let answer = post(&mut client, &json!({"registration_ids": targets})).await.json();
    assert!(answer["results"][0]["message_id"].is_string());
    assert_eq!(answer["results"][1]["error"], "Unavailable");
    cluster.stop().await;
}

#[test]
fn fixtures_of_devices_agree_with_the_keys_of_the_cluster() {
    assert_ne!(tag_of(1), tag_of(2));
    assert_ne!(device(1).1, device(2).1);
}
