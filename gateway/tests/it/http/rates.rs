//! How much one project may send through a gateway, and what it is told beyond.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use martlet_gateway::{
    clock::{Clock, SystemClock},
    metrics::{Limit, LimitLabel},
};
use martlet_proto::cluster::meta::{Project, ServerKey};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{
    client::{Client, Reply},
    cluster::{Cluster, KEY},
};

const OTHER_KEY: &str = "key-of-900200";
const FORM: (&str, &str) = ("Content-Type", "application/x-www-form-urlencoded;charset=UTF-8");
const JSON: (&str, &str) = ("Content-Type", "application/json");

/// Time that stands still, so that nothing is refilled behind a slow test's back.
#[derive(Debug)]
struct StillClock(Mutex<Instant>);

impl StillClock {
    fn advance(&self, by: Duration) {
        *self.0.lock().unwrap() += by;
    }
}

impl Clock for StillClock {
    fn now(&self) -> Instant {
        *self.0.lock().unwrap()
    }

    fn wall_ms(&self) -> u64 {
        1_700_000_000_000
    }
}

/// A gateway that takes two targets a second of a project, ten at once; and another project.
async fn limited() -> (Cluster, Arc<StillClock>) {
    let clock = Arc::new(StillClock(Mutex::new(SystemClock.now())));
    let cluster = Cluster::start_by(clock.clone(), 1, |config| {
        config.http.project_messages_per_second_max = 2;
        config.http.project_messages_burst = 10;
    });
    let cluster = cluster.await;
    cluster.meta.send_modify(|state| {
        state.revision += 1;
        let sha256 = Sha256::digest(OTHER_KEY).to_vec().into();
        let server_keys = vec![ServerKey { key_id: 1, sha256, ..ServerKey::default() }];
        state.projects.push(Project { sender_id: "900200".into(), server_keys, ..Project::default() });
    });
    (cluster, clock)
}

async fn call(client: &mut Client, line: &str, key: &str, kind: (&str, &str), body: &str) -> Reply {
    client.request(line, &[("Authorization", &format!("key={key}")), kind], body.as_bytes()).await
}

async fn send(client: &mut Client, body: &Value) -> Reply {
    call(client, "POST /gcm/send", KEY, JSON, &body.to_string()).await
}

fn is_told_to_wait(reply: &Reply, secs: &str) {
    assert_eq!((reply.status, reply.header("retry-after")), (503, Some(secs)), "{}", reply.text());
}

fn limits(cluster: &Cluster) -> u64 {
    cluster.gateway.metrics.limits.get_or_create(&LimitLabel { limit: Limit::Project }).get()
}

fn asked(cluster: &Cluster) -> usize {
    cluster.world.lock().unwrap().asked.len()
}

#[tokio::test]
async fn a_project_that_sends_too_much_gets_503_in_both_forms_until_there_is_room_and_others_are_served() {
    let (cluster, clock) = limited().await;
    let token = cluster.registered(1).to_string();
    let mut client = cluster.client().await;
    let (nine, one) = (json!({ "registration_ids": vec![&token; 9] }), json!({ "to": token }));
    assert_eq!(send(&mut client, &nine).await.json()["success"], 9);
    assert_eq!(send(&mut client, &one).await.json()["success"], 1);
    let (before, form) = (asked(&cluster), format!("registration_id={token}"));
    is_told_to_wait(&send(&mut client, &one).await, "1");
    is_told_to_wait(&call(&mut client, "POST /gcm/send", KEY, FORM, &form).await, "1");
    assert_eq!((asked(&cluster), limits(&cluster)), (before, 2), "nothing of it came to a node");

    let other = async |client: &mut Client| call(client, "POST /gcm/send", OTHER_KEY, JSON, &one.to_string()).await;
    // Known as soon as the gateway has the newer state.
    while other(&mut client).await.status == 401 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(other(&mut client).await.json()["results"][0]["error"], "MismatchSenderId");

    clock.advance(Duration::from_millis(500));
    assert_eq!(call(&mut client, "POST /gcm/send", KEY, FORM, &form).await.status, 200);
    is_told_to_wait(&send(&mut client, &one).await, "1");
    cluster.stop().await;
}

#[tokio::test]
async fn a_multicast_larger_than_the_burst_passes_and_is_made_up_for_by_the_wait_after_it() {
    let (cluster, clock) = limited().await;
    let token = cluster.registered(1).to_string();
    let mut client = cluster.client().await;
    let one = json!({ "to": token });
    assert_eq!(send(&mut client, &one).await.status, 200);
    assert_eq!(send(&mut client, &json!({ "registration_ids": vec![&token; 40] })).await.json()["success"], 40);
    // 31 are owed, and one must be there: 16 s at two a second.
    is_told_to_wait(&send(&mut client, &one).await, "16");
    clock.advance(Duration::from_millis(15_400));
    is_told_to_wait(&send(&mut client, &one).await, "1");
    clock.advance(Duration::from_millis(600));
    assert_eq!(send(&mut client, &one).await.json()["success"], 1);
    cluster.stop().await;
}

#[tokio::test]
async fn a_wrong_key_and_what_is_wrong_with_the_message_are_told_first_and_a_dry_run_takes_nothing() {
    let (cluster, _clock) = limited().await;
    let token = cluster.registered(1).to_string();
    let mut client = cluster.client().await;
    let dry_run = json!({ "to": token, "dry_run": true });
    let bad_ttl = json!({ "to": token, "time_to_live": -1 });
    for _ in 0..2 {
        for _ in 0..11 {
            assert_eq!(send(&mut client, &dry_run).await.json()["success"], 1);
            assert_eq!(send(&mut client, &bad_ttl).await.json()["results"][0]["error"], "InvalidTtl");
            assert_eq!(send(&mut client, &json!({ "to": 1 })).await.status, 400);
            assert_eq!(call(&mut client, "POST /gcm/send", "unknown", JSON, "{}").await.status, 401);
            assert_eq!(call(&mut client, "POST /gcm/send", KEY, FORM, "").await.text(), "Error=MissingRegistration\n");
        }
        // Full until now; empty from now on, which changes nothing above.
        send(&mut client, &json!({ "registration_ids": vec![&token; 10] })).await;
    }
    assert_eq!(limits(&cluster), 1, "the second time it was empty");
    cluster.stop().await;
}

#[tokio::test]
async fn a_group_a_topic_and_tokens_that_join_one_count_and_are_told_in_their_own_form() {
    let (cluster, clock) = limited().await;
    let mut client = cluster.client().await;
    let batch =
        |tokens: usize| json!({ "to": "/topics/news", "registration_tokens": vec!["none"; tokens] }).to_string();
    let mut join = async |tokens: usize| call(&mut client, "POST /iid/v1:batchAdd", KEY, JSON, &batch(tokens)).await;
    assert_eq!(join(10).await.json()["results"].as_array().unwrap().len(), 10);
    let refused = join(1).await;
    is_told_to_wait(&refused, "1");
    assert_eq!(refused.json(), json!({ "error": "ServiceUnavailable" }));

    let mut client = cluster.client().await;
    let one = "POST /iid/v1/none/rel/topics/news";
    is_told_to_wait(&call(&mut client, one, KEY, JSON, "").await, "1");
    is_told_to_wait(&send(&mut client, &json!({ "to": "/topics/news" })).await, "1");
    is_told_to_wait(&send(&mut client, &json!({ "notification_key": "APA91bNone" })).await, "1");
    assert_eq!(call(&mut client, "POST /iid/v1/none/rel/topics/a%20%20:", KEY, JSON, "").await.status, 400);
    // Each takes the one that there is.
    for (line, body) in [(one, ""), ("POST /gcm/send", r#"{"notification_key":"APA91bNone"}"#)] {
        clock.advance(Duration::from_millis(500));
        assert_ne!(call(&mut client, line, KEY, JSON, body).await.status, 503);
        is_told_to_wait(&send(&mut client, &json!({ "to": "none" })).await, "1");
    }
    assert_ne!(call(&mut client, "GET /iid/info/none", KEY, JSON, "").await.status, 503);
    cluster.stop().await;
}

#[tokio::test]
async fn by_default_a_project_is_without_limit() {
    let cluster = Cluster::start(1).await;
    let mut client = cluster.client().await;
    let body = json!({ "registration_ids": vec!["none"; 1_000] });
    for _ in 0..5 {
        assert_eq!(send(&mut client, &body).await.json()["failure"], 1_000);
    }
    assert_eq!(limits(&cluster), 0);
    cluster.stop().await;
}
