//! How operations find their leader, and what an app server is told when they do not.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use martlet_gateway::clock::{Clock, SystemClock};
use martlet_proto::{
    cluster::{
        meta::KeyPurpose,
        queue::{operation, refused::Reason},
    },
    message::MessageId,
};
use serde_json::json;

use super::{
    client::{Client, Reply},
    cluster::{Cluster, Fault, LEASE_MS, sealed, unregistered},
};

const AUTH: (&str, &str) = ("Authorization", "key=key-of-900100");
const JSON: (&str, &str) = ("Content-Type", "application/json");
const FORM: (&str, &str) = ("Content-Type", "application/x-www-form-urlencoded");

async fn to(client: &mut Client, token: &impl ToString) -> Reply {
    let body = json!({"to": token.to_string(), "data": {"k": "v"}}).to_string();
    client.request("POST /gcm/send", &[AUTH, JSON], body.as_bytes()).await
}

async fn plain(client: &mut Client, token: &impl ToString) -> Reply {
    let body = format!("registration_id={}", token.to_string());
    client.request("POST /gcm/send", &[AUTH, FORM], body.as_bytes()).await
}

#[tokio::test]
async fn a_wrong_leader_names_the_right_one_and_it_is_remembered_core() {
    let cluster = Cluster::start(3).await;
    let token = cluster.registered(1);
    let mut client = cluster.client().await;
    for leader in [1, 2, 3, 1] {
        cluster.world.lock().unwrap().leaders.values_mut().for_each(|node| *node = leader);
        assert_eq!(to(&mut client, &token).await.json()["success"], 1);
        let before = cluster.world.lock().unwrap().submits.len();
        assert_eq!(to(&mut client, &token).await.json()["success"], 1);
        assert_eq!(cluster.world.lock().unwrap().submits.len(), before + 1, "asked at once");
    }
    cluster.stop().await;
}

#[tokio::test]
async fn the_first_operation_on_a_shard_learns_its_time_and_the_next_has_it_core() {
    let cluster = Cluster::start(1).await;
    let token = cluster.registered(1);
    let mut client = cluster.client().await;
    for _ in 0..3 {
        assert_eq!(to(&mut client, &token).await.json()["success"], 1);
    }
    let world = cluster.world.lock().unwrap();
    assert_eq!(world.time_needed, 1);
    assert!(world.asked.iter().all(|(_, operation)| operation.first_try_ms >= 1_700_000_000_000));
    drop(world);
    cluster.stop().await;
}

#[tokio::test]
async fn a_broken_stream_repeats_the_same_operation_so_that_it_is_done_once_core() {
    for fault in [Fault::BreakAfter, Fault::BreakBefore, Fault::Unknown] {
        let cluster = Cluster::start(1).await;
        let token = cluster.registered(1);
        let mut client = cluster.client().await;
        to(&mut client, &token).await;
        cluster.world.lock().unwrap().faults = vec![fault];
        let answer = to(&mut client, &token).await.json();
        let id: MessageId = answer["results"][0]["message_id"].as_str().unwrap().parse().unwrap();
        let world = cluster.world.lock().unwrap();
        assert_eq!(world.known.len(), 2, "{fault:?}");
        let tries = world.asked.iter().filter(|(_, operation)| operation.id[..] == id.to_bytes()).count();
        assert_eq!(tries, if fault == Fault::BreakBefore { 1 } else { 2 }, "{fault:?}");
        drop(world);
        cluster.stop().await;
    }
}

#[tokio::test]
async fn h161_core_an_operation_in_doubt_is_resolved_before_it_is_called_unavailable() {
    // The shard did it, its stream broke, and then it refuses everything new: only Resolve can tell.
    let cluster = Cluster::start(1).await;
    let token = cluster.registered(1);
    let mut client = cluster.client().await;
    to(&mut client, &token).await;
    {
        let mut world = cluster.world.lock().unwrap();
        world.faults = vec![Fault::BreakAfter; 40];
    }
    let sending = tokio::spawn(async move { to(&mut client, &token).await });
    while cluster
        .world
        .lock()
        .unwrap()
        .asked
        .last()
        .is_none_or(|(_, operation)| !matches!(operation.kind, Some(operation::Kind::Resolve(_))))
    {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    cluster.world.lock().unwrap().faults.clear();
    let answer = sending.await.unwrap().json();
    assert!(answer["results"][0]["message_id"].is_string(), "{answer}");
    cluster.stop().await;
}

#[tokio::test]
async fn an_outcome_that_stays_unknown_is_an_internal_error_and_never_a_refusal_core() {
    let short = |config: &mut martlet_gateway::Config| {
        config.route.deadline = Duration::from_millis(600);
        config.route.resolve_reserve = Duration::from_millis(300);
    };
    let cluster = Cluster::start_with(1, short).await;
    let token = cluster.registered(1);
    let mut client = cluster.client().await;
    to(&mut client, &token).await;
    cluster.world.lock().unwrap().faults = vec![Fault::BreakAfter; 1000];
    let reply = to(&mut client, &token).await;
    assert_eq!((reply.status, &reply.json()["results"][0]["error"]), (200, &json!("InternalServerError")));
    let reply = plain(&mut client, &token).await;
    assert_eq!(reply.status, 500);
    assert!(!reply.text().contains("Unavailable"));
    cluster.stop().await;
}

#[tokio::test]
async fn h090_h160_core_when_storage_refuses_everything_the_answer_is_503_with_whole_seconds() {
    let cluster = Cluster::start(1).await;
    let (token, gone) = (cluster.registered(1), unregistered(2, 1));
    let mut client = cluster.client().await;
    to(&mut client, &token).await;
    cluster.world.lock().unwrap().refuse = Some(Reason::NoLease);
    for reply in [to(&mut client, &token).await, plain(&mut client, &token).await] {
        assert_eq!(reply.status, 503);
        assert!(reply.header("retry-after").unwrap().parse::<u32>().unwrap() >= 1);
        assert!(!reply.text().contains("Error="), "{}", reply.text());
    }
    cluster.world.lock().unwrap().refuse = Some(Reason::Overloaded);
    let body = json!({"registration_ids": [token.as_str(), gone.as_str(), "nonsense"]}).to_string();
    let reply = client.request("POST /gcm/send", &[AUTH, JSON], body.as_bytes()).await;
    assert_eq!(reply.status, 200);
    assert_eq!(
        reply.json()["results"],
        json!([{"error": "Unavailable"}, {"error": "Unavailable"}, {"error": "InvalidRegistration"}])
    );
    cluster.stop().await;
}

#[tokio::test]
async fn an_unreachable_shard_is_unavailable_for_its_tokens_alone_core() {
    let short = |config: &mut martlet_gateway::Config| {
        config.route.deadline = Duration::from_millis(600);
        config.route.resolve_reserve = Duration::from_millis(300);
    };
    let cluster = Cluster::start_with(2, short).await;
    let tokens: Vec<_> = (1..=20).map(|device| cluster.registered(device)).collect();
    let dead = cluster.shard(&tokens[0]);
    cluster.world.lock().unwrap().leaders.insert(dead.0.into(), 0);
    let targets: Vec<&str> = tokens.iter().map(|token| token.as_str()).collect();
    let body = json!({"registration_ids": targets}).to_string();
    let mut client = cluster.client().await;
    let answer = client.request("POST /gcm/send", &[AUTH, JSON], body.as_bytes()).await.json();
    for (token, result) in tokens.iter().zip(answer["results"].as_array().unwrap()) {
        assert_eq!(result["error"] == "Unavailable", cluster.shard(token) == dead, "{result}");
    }
    cluster.stop().await;
}

#[tokio::test]
async fn a_revoked_key_is_refused_once_its_revision_is_confirmed_core() {
    let cluster = Cluster::start(1).await;
    let token = cluster.registered(1);
    let mut client = cluster.client().await;
    assert_eq!(to(&mut client, &token).await.status, 200);
    cluster.meta.send_modify(|state| {
        state.revision = 2;
        state.projects[0].server_keys[0].revoked_ms = 1;
    });
    while !cluster.world.lock().unwrap().confirmed.iter().any(|request| request.confirmed_revision == 2) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(to(&mut client, &token).await.status, 401);
    let world = cluster.world.lock().unwrap();
    assert!(world.confirmed.iter().any(|request| request.confirmed_token_keys == [1] && request.gateway.len() == 16));
    drop(world);
    cluster.stop().await;
}

#[tokio::test]
async fn a_new_token_key_is_followed_and_an_older_state_takes_nothing_back_core() {
    let cluster = Cluster::start(1).await;
    let token = unregistered(1, 2);
    cluster.register(&token, None);
    let mut client = cluster.client().await;
    let old = cluster.meta.borrow().clone();
    cluster.meta.send_modify(|state| {
        state.revision = 3;
        state.keys.push(sealed(KeyPurpose::Token, 2));
    });
    while !cluster.world.lock().unwrap().confirmed.iter().any(|request| request.confirmed_token_keys == [1, 2]) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    cluster.meta.send_replace(old);
    assert_eq!(to(&mut client, &token).await.json()["success"], 1);
    cluster.stop().await;
}

/// The system's clocks, and how far a test has moved them.
#[derive(Debug, Default)]
struct Moved(Mutex<Duration>);

impl Clock for Moved {
    fn now(&self) -> Instant {
        SystemClock.now() + *self.0.lock().unwrap()
    }

    fn wall_ms(&self) -> u64 {
        SystemClock.wall_ms() + u64::try_from(self.0.lock().unwrap().as_millis()).unwrap()
    }
}

#[tokio::test]
async fn without_the_watch_a_gateway_serves_on_for_the_configured_while_and_then_answers_503_core() {
    let clock = Arc::new(Moved::default());
    let cluster = Cluster::start_by(clock.clone(), 1, |_| {}).await;
    let token = cluster.registered(1);
    assert_eq!(to(&mut cluster.client().await, &token).await.json()["success"], 1);
    cluster.world.lock().unwrap().watch_lost.cancel();
    assert_eq!(to(&mut cluster.client().await, &token).await.json()["success"], 1, "the lease holds");
    // Five minutes before the end, which come from 15 minutes after the lease.
    *clock.0.lock().unwrap() += Duration::from_millis(LEASE_MS) + Duration::from_secs(10 * 60);
    assert_eq!(
        to(&mut cluster.client().await, &token).await.json()["success"],
        1,
        "the lease is over, the while is not"
    );
    assert!(cluster.gateway.readiness().ready);
    *clock.0.lock().unwrap() += Duration::from_secs(5 * 60);
    for reply in [to(&mut cluster.client().await, &token).await, plain(&mut cluster.client().await, &token).await] {
        assert_eq!(reply.status, 503);
        assert!(reply.header("retry-after").unwrap().parse::<u32>().unwrap() >= 1);
    }
    assert!(!cluster.gateway.readiness().ready);
    cluster.stop().await;
}

#[tokio::test]
async fn draining_is_seen_in_readiness_core() {
    let cluster = Cluster::start(1).await;
    let started = cluster.gateway.clone();
    assert!(started.readiness().ready);
    cluster.stop().await;
    assert!(!started.readiness().ready);
}
