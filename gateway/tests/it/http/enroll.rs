//! Check-in, registration, installations: what devices are told.

use std::io::{Read, Write};

use flate2::{Compression, read::GzDecoder, write::GzEncoder};
use martlet_gateway::enroll::Foreign;
use martlet_proto::{
    cluster::queue::{operation, refused::Reason},
    device::checkin::{AndroidCheckinProto, AndroidCheckinRequest, AndroidCheckinResponse},
    token::RegistrationToken,
};
use prost::Message;
use serde_json::json;

use super::{
    client::{Client, Reply},
    cluster::{Cluster, SENDER, device, tag_of, token_key},
};

/// The default web key of every push-receiver.
const WEB_KEY: &str = "BDOU99-h67HcA6JeFXHbSNMu7e2yNNu3RzoMj8TM4W88jITfq7ZmPvIM1Iv-4_l2LxQcYwhqby2xGpWwzjfAnG4";

async fn checkin(client: &mut Client, identity: Option<(u64, u64)>) -> Reply {
    let request = AndroidCheckinRequest {
        id: identity.map(|(id, _)| id.cast_signed()),
        security_token: identity.map(|(_, token)| token),
        checkin: AndroidCheckinProto::default(),
        version: Some(3),
        ..AndroidCheckinRequest::default()
    };
    let headers = [("Content-Type", "application/x-protobuf")];
    client.request("POST /checkin", &headers, &request.encode_to_vec()).await
}

fn pair(body: &[u8]) -> (u64, u64) {
    let response = AndroidCheckinResponse::decode(body).unwrap();
    assert!(response.stats_ok);
    (response.android_id.unwrap(), response.security_token.unwrap())
}

async fn register(client: &mut Client, (id, token): (u64, u64), form: &str) -> Reply {
    register_as(client, &format!("AidLogin {id}:{token}"), "test", &format!("device={id}&{form}")).await
}

async fn register_as(client: &mut Client, authorization: &str, agent: &str, form: &str) -> Reply {
    let headers = [
        ("Authorization", authorization),
        ("Content-Type", "application/x-www-form-urlencoded"),
        ("User-Agent", agent),
    ];
    client.request("POST /c2dm/register3", &headers, form.as_bytes()).await
}

#[tokio::test]
async fn ck_01_ck_02_ck_03_ck_04_ck_05_ck_06_core_a_device_gets_a_pair_and_keeps_it() {
    let cluster = Cluster::start(1).await;
    let mut client = cluster.client().await;
    let reply = checkin(&mut client, None).await;
    assert_eq!(reply.status, 200);
    let first = pair(&reply.body);
    assert!(first.0 != 0 && first.1 != 0 && first.0 < 1 << 63 && first.1 < 1 << 63);
    assert_ne!(pair(&checkin(&mut client, None).await.body), first);
    assert_eq!(pair(&checkin(&mut client, Some(first)).await.body), first);
    assert_eq!(checkin(&mut client, Some((first.0, first.1 ^ 1))).await.status, 401);
    assert_eq!(checkin(&mut client, Some((first.0 ^ 1, first.1))).await.status, 401);
    assert_eq!(client.request("POST /checkin", &[], b"\xff\xff\xff").await.status, 400);
    assert!(cluster.world.lock().unwrap().asked.is_empty(), "check-in costs no node anything");
    cluster.stop().await;
}

#[tokio::test]
async fn ck_05_core_foreign_identities_are_adopted_where_that_is_configured() {
    let cluster = Cluster::start_with(1, |config| config.enroll.foreign = Foreign::Adopt).await;
    let mut client = cluster.client().await;
    let reply = checkin(&mut client, Some((77, 78))).await;
    assert_eq!(reply.status, 200);
    assert_ne!(pair(&reply.body), (77, 78));
    cluster.stop().await;
}

#[tokio::test]
async fn ck_07_core_whoever_gzips_is_answered_gzipped() {
    let cluster = Cluster::start(1).await;
    let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
    gzip.write_all(&AndroidCheckinRequest::default().encode_to_vec()).unwrap();
    let headers = [("Content-Encoding", "gzip"), ("Accept-Encoding", "gzip")];
    let reply = cluster.client().await.request("POST /checkin", &headers, &gzip.finish().unwrap()).await;
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("content-encoding"), Some("gzip"));
    let mut body = Vec::new();
    GzDecoder::new(&reply.body[..]).read_to_end(&mut body).unwrap();
    assert_ne!(pair(&body).0, 0);
    cluster.stop().await;
}

#[tokio::test]
async fn rg_01_rg_02_rg_03_rg_04_rg_05_core_what_is_wrong_is_said_with_its_code() {
    let cluster = Cluster::start(1).await;
    let mut client = cluster.client().await;
    let (id, token) = device(5);
    let good = format!("AidLogin {id}:{token}");
    for authorization in ["", "AidLogin 5", "AidLogin 5:6", "key=5"] {
        let reply = register_as(&mut client, authorization, "test", &format!("device=5&app=a&sender={SENDER}")).await;
        assert_eq!((reply.status, reply.text()), (401, "Error=AUTHENTICATION_FAILED"), "{authorization}");
    }
    for (form, error) in [
        (format!("device=6&app=a&sender={SENDER}"), "PHONE_REGISTRATION_ERROR"),
        (format!("device=5&sender={SENDER}"), "INVALID_PARAMETERS"),
        ("device=5&app=a".into(), "INVALID_PARAMETERS"),
        ("device=5&app=a&sender=123".into(), "INVALID_SENDER"),
        (format!("device=5&app=a&sender={SENDER},123"), "INVALID_SENDER"),
    ] {
        let reply = register_as(&mut client, &good, "test", &form).await;
        assert_eq!((reply.status, reply.text()), (200, &*format!("Error={error}")), "{form}");
    }
    let reply = register_as(&mut client, &good, "Android-GCM/1.5", "device=5&app=a&sender=123").await;
    assert_eq!((reply.status, reply.text()), (400, "Error=INVALID_SENDER"));
    cluster.stop().await;
}

#[tokio::test]
async fn rg_06_rg_07_rg_08_rg_12_rg_13_core_a_registration_answers_its_token_and_its_end_the_application() {
    let cluster = Cluster::start(2).await;
    let mut client = cluster.client().await;
    let who = device(5);
    for form in [
        format!("app=com.shop&sender={SENDER}"),
        format!("app=com.shop&sender={SENDER}&appid=ABCDEFGHIJK&scope=GCM"),
        format!("app=com.shop&sender={SENDER}&X-appid=ABCDEFGHIJK&X-scope=*&X-subtype=s"),
        format!("app=org.chromium.linux&X-subtype=wp:x&sender={WEB_KEY}"),
    ] {
        let reply = register(&mut client, who, &form).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        let token = reply.text().strip_prefix("token=").unwrap();
        let token = RegistrationToken::parse(token).unwrap().verify(&token_key(1)).unwrap();
        assert_eq!(token.device_tag(), tag_of(5));
        assert_eq!(form.contains("ABCDEFGHIJK"), token.iid().as_str() == "ABCDEFGHIJK");
    }
    let operations: Vec<_> = cluster.world.lock().unwrap().asked.iter().map(|(_, o)| o.kind.clone().unwrap()).collect();
    let operation::Kind::Register(third) = &operations[2] else { panic!() };
    assert_eq!((&*third.scope, &*third.subtype, &*third.senders), ("*", "s", &[SENDER.to_owned()][..]));
    let reply = register(&mut client, who, "app=com.shop&delete=true").await;
    assert_eq!((reply.status, reply.text()), (200, "deleted=com.shop"));
    cluster.stop().await;
}

#[tokio::test]
async fn rg_20_core_without_storage_a_registration_is_told_to_come_back() {
    let cluster = Cluster::start(1).await;
    let mut client = cluster.client().await;
    cluster.world.lock().unwrap().refuse = Some(Reason::Overloaded);
    let reply = register(&mut client, device(5), &format!("app=com.shop&sender={SENDER}")).await;
    assert_eq!((reply.status, reply.text()), (503, "Error=SERVICE_NOT_AVAILABLE"));
    assert!(reply.header("retry-after").is_some());
    cluster.stop().await;
}

#[tokio::test]
async fn rg_20_core_too_many_from_one_address_are_told_to_come_back() {
    let few = |config: &mut martlet_gateway::Config| {
        config.admit.checkins_burst = 1;
        config.admit.checkins_per_sec = 1;
        config.admit.registrations_burst = 1;
        config.admit.registrations_per_sec = 1;
    };
    let cluster = Cluster::start_with(1, few).await;
    let mut client = cluster.client().await;
    let mut statuses = Vec::new();
    for _ in 0..20 {
        statuses.push(checkin(&mut client, None).await.status);
    }
    assert!(statuses[0] == 200 && statuses.contains(&503), "{statuses:?}");
    let mut replies = Vec::new();
    for _ in 0..20 {
        replies.push(register(&mut client, device(5), &format!("app=com.shop&sender={SENDER}")).await);
    }
    assert!(replies.iter().any(|reply| reply.status == 503 && reply.text() == "Error=QUOTA_EXCEEDED"));
    cluster.stop().await;
}

#[tokio::test]
async fn fi_01_fi_02_core_an_installation_gets_its_tokens_and_a_normalised_id() {
    let cluster = Cluster::start(1).await;
    let mut client = cluster.client().await;
    let body = json!({"appId": "1:900100:web:abc", "authVersion": "FIS_v2", "fid": "cAB+/fghijklmnopqrstuvwx", "sdkVersion": "w:0.6.4"});
    let headers = [("Content-Type", "text/plain;charset=UTF-8"), ("x-goog-api-key", "any")];
    for project in ["shop", SENDER] {
        let path = format!("POST /v1/projects/{project}/installations");
        let reply = client.request(&path, &headers, body.to_string().as_bytes()).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        let answer = reply.json();
        assert_eq!(answer["fid"], "cAB-_fghijklmnopqrstuv");
        assert!(answer["refreshToken"].is_string() && answer["authToken"]["token"].is_string());
        assert_eq!(answer["authToken"]["expiresIn"], "604800s");
    }
    let reply = client.request("POST /v1/projects/unknown/installations", &headers, body.to_string().as_bytes()).await;
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (404, &json!(404)));
    cluster.stop().await;
}
