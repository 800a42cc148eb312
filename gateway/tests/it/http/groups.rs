//! `/gcm/notification`, and messages to groups: who is a member, who leaves, what each failure is told as.

use std::collections::BTreeSet;

use martlet_proto::{
    cluster::{meta::KeyPurpose, queue::operation},
    group::{GroupBits, GroupTag, NotificationKey},
    message::SenderId,
    tag::TagKey,
    token::{Iid, RegistrationToken, TokenKey},
};
use rand::{SeedableRng, rngs::StdRng};
use serde_json::{Value, json};

use super::{
    client::{Client, Reply},
    cluster::{Cluster, Fault, SENDER, sealed, tag_of, token_key, unregistered},
};

const AUTH: (&str, &str) = ("Authorization", "key=key-of-900100");
const JSON: (&str, &str) = ("Content-Type", "application/json");
const PROJECT: (&str, &str) = ("project_id", SENDER);

async fn post(client: &mut Client, body: Value) -> Reply {
    client.request("POST /gcm/notification", &[AUTH, JSON, PROJECT], body.to_string().as_bytes()).await
}

fn ids(tokens: &[&RegistrationToken]) -> Vec<String> {
    tokens.iter().map(|token| token.to_string()).collect()
}

async fn create(client: &mut Client, name: &str, tokens: &[&RegistrationToken]) -> String {
    let body = json!({"operation": "create", "notification_key_name": name, "registration_ids": ids(tokens)});
    key(&post(client, body).await)
}

fn key(reply: &Reply) -> String {
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply.json()["notification_key"].as_str().unwrap().to_owned()
}

fn change(operation: &str, key: &str, tokens: &[&RegistrationToken]) -> Value {
    json!({"operation": operation, "notification_key": key, "registration_ids": ids(tokens)})
}

async fn look_up(client: &mut Client, name: &str) -> Reply {
    client.request(&format!("GET /gcm/notification?notification_key_name={name}"), &[AUTH, PROJECT], b"").await
}

async fn send(client: &mut Client, body: Value) -> Reply {
    client.request("POST /gcm/send", &[AUTH, JSON], body.to_string().as_bytes()).await
}

fn error(reply: &Reply) -> String {
    assert_eq!(reply.status, 400, "{}", reply.text());
    assert!(reply.header("content-type").unwrap().starts_with("application/json"));
    reply.json()["error"].as_str().unwrap().to_owned()
}

/// The one result of a send that was answered as for a token.
fn one_result(reply: &Reply) -> String {
    assert_eq!(reply.status, 200, "{}", reply.text());
    let json = reply.json();
    assert!(json["multicast_id"].is_u64() && json["results"].as_array().unwrap().len() == 1, "{json}");
    json["results"][0]["error"].as_str().unwrap().to_owned()
}

impl Cluster {
    /// Registration ids in the only group there is.
    fn members(&self) -> BTreeSet<Vec<u8>> {
        let world = self.world.lock().unwrap();
        assert_eq!(world.groups.0.len(), 1);
        let (_, group) = world.groups.0.values().next().unwrap();
        group.members.iter().map(|member| member.registration_id.to_vec()).collect()
    }

    fn kill(&self, token: &RegistrationToken) {
        self.world.lock().unwrap().registered.remove(&token.registration_id().0[..]);
    }

    fn groups(&self) -> usize {
        self.world.lock().unwrap().groups.0.len()
    }
}

fn set(tokens: &[&RegistrationToken]) -> BTreeSet<Vec<u8>> {
    tokens.iter().map(|token| token.registration_id().0.to_vec()).collect()
}

#[tokio::test]
async fn h140_h142_h143_core_a_group_is_made_found_and_changed_on_both_paths() {
    let cluster = Cluster::start(1).await;
    let [a, b, c] = [1, 2, 3].map(|device| cluster.registered(device));
    let mut client = cluster.client().await;
    let made = create(&mut client, "user%207", &[&a, &b]).await;
    assert_eq!(key(&look_up(&mut client, "user%25207").await), made);
    for path in ["POST /fcm/notification", "POST /gcm/notification/"] {
        let body = change("add", &made, &[&c, &a]).to_string();
        assert_eq!(key(&client.request(path, &[AUTH, JSON, PROJECT], body.as_bytes()).await), made);
    }
    assert_eq!(cluster.members(), set(&[&a, &b, &c]));
    assert_eq!(key(&post(&mut client, change("remove", &made, &[&b])).await), made);
    assert_eq!(key(&post(&mut client, change("remove", &made, &[&b])).await), made, "one that is not there");
    assert_eq!(cluster.members(), set(&[&a, &c]));
    // Without a media type: there is no other form.
    let body = change("add", &made, &[&b]).to_string();
    assert_eq!(key(&client.request("POST /gcm/notification", &[AUTH, PROJECT], body.as_bytes()).await), made);
    cluster.stop().await;
}

#[tokio::test]
async fn h005_h007_core_groups_need_a_key_its_project_and_one_of_two_methods() {
    let cluster = Cluster::start(1).await;
    let mut client = cluster.client().await;
    let body = json!({"operation": "create", "notification_key_name": "n", "registration_ids": []}).to_string();
    for method in ["PUT", "DELETE", "PATCH"] {
        let reply = client.request(&format!("{method} /gcm/notification"), &[AUTH, PROJECT], b"").await;
        assert_eq!((reply.status, reply.header("allow")), (405, Some("GET, POST")), "{method}");
    }
    for wrong in [vec![PROJECT, JSON], vec![("Authorization", "key=x"), PROJECT, JSON]] {
        let mut client = cluster.client().await;
        let reply = client.request("POST /gcm/notification", &wrong, b"{not json").await;
        assert_eq!(reply.status, 401);
        assert!(reply.text().contains("Unauthorized"));
    }
    let reply = client.request("POST /gcm/notification", &[AUTH, JSON], body.as_bytes()).await;
    assert!(error(&reply).contains("project_id is missing"));
    let reply = client.request("POST /gcm/notification", &[AUTH, ("project_id", "900101")], body.as_bytes()).await;
    assert!(error(&reply).contains("project_id doesn't match"));
    let reply = client.request("GET /gcm/notification?notification_key_name=n", &[AUTH], b"").await;
    assert!(error(&reply).contains("project_id"));
    cluster.stop().await;
}

#[tokio::test]
async fn h141_h145_h146_h147_core_each_error_has_its_text() {
    let cluster = Cluster::start(1).await;
    let (a, b) = (cluster.registered(1), unregistered(2, 1));
    let mut client = cluster.client().await;
    let made = create(&mut client, "n", &[&a, &b]).await;
    assert_eq!(cluster.members(), set(&[&a]), "a dead token is no member");
    let create =
        |tokens: Vec<String>| json!({"operation": "create", "notification_key_name": "n", "registration_ids": tokens});
    assert_eq!(error(&post(&mut client, create(ids(&[&a]))).await), "notification_key already exists");
    let forged = NotificationKey::mint(&TokenKey::new(1, [9; 32]), GroupTag(1), GroupBits(1));
    let none = NotificationKey::mint(&token_key(1), GroupTag(1), GroupBits(1)).unwrap();
    for key in [forged.unwrap().as_str(), none.as_str(), "nonsense", a.as_str(), &made[1..]] {
        let reply = post(&mut client, change("add", key, &[&a])).await;
        assert_eq!(error(&reply), "notification_key not found", "{key}");
    }
    assert_eq!(error(&look_up(&mut client, "other").await), "notification_key not found");
    let mut misnamed = change("remove", &made, &[&a]);
    misnamed["notification_key_name"] = json!("other");
    let text = "notification_key_name doesn't match the group name of the notification_key";
    assert_eq!(error(&post(&mut client, misnamed).await), text);
    let nobody = [vec![], ids(&[&b]), vec!["nonsense".to_owned(), String::new(), made.clone()]];
    for tokens in nobody {
        let mut body = create(tokens.clone());
        body["notification_key_name"] = json!("m");
        assert_eq!(error(&post(&mut client, body).await), "no valid registration ids", "{tokens:?}");
        let add = json!({"operation": "add", "notification_key": made, "registration_ids": tokens});
        assert_eq!(error(&post(&mut client, add).await), "no valid registration ids");
    }
    let remove = json!({"operation": "remove", "notification_key": made, "registration_ids": ["nonsense"]});
    assert_eq!(error(&post(&mut client, remove).await), "no valid registration ids");
    assert_eq!(cluster.members(), set(&[&a]));
    cluster.stop().await;
}

#[tokio::test]
async fn h144_core_a_21st_member_and_hostile_bodies_are_refused() {
    let cluster = Cluster::start(1).await;
    let all: Vec<_> = (1..=21).map(|device| cluster.registered(device)).collect();
    let all: Vec<&RegistrationToken> = all.iter().collect();
    let mut client = cluster.client().await;
    let body = json!({"operation": "create", "notification_key_name": "n", "registration_ids": ids(&all)});
    assert!(error(&post(&mut client, body).await).starts_with("too many registration ids"));
    assert_eq!(cluster.groups(), 0);
    // A thousand times one of twenty is one of twenty.
    let mut many = ids(&all[..20]);
    many.extend(vec![all[0].to_string(); 980]);
    let body = json!({"operation": "create", "notification_key_name": "n", "registration_ids": many});
    let made = key(&post(&mut client, body).await);
    let checks = cluster.world.lock().unwrap().asked.len();
    assert!(checks <= 21 + 1 + 20 + 1, "{checks}: each token is looked at once");
    assert!(error(&post(&mut client, change("add", &made, &[all[20]])).await).starts_with("too many"));
    assert_eq!(cluster.members().len(), 20);
    many.push("one more".to_owned());
    let body = json!({"operation": "create", "notification_key_name": "m", "registration_ids": many});
    assert!(error(&post(&mut client, body).await).contains("at most 1000"));
    for hostile in ["", "[]", "{", "null", "\u{0}", &"[".repeat(50_000), "{\"operation\":[]}"] {
        let reply = client.request("POST /gcm/notification", &[AUTH, JSON, PROJECT], hostile.as_bytes()).await;
        assert!(!error(&reply).is_empty());
    }
    let reply = client.request("POST /gcm/notification", &[AUTH, PROJECT], &vec![b' '; 600 << 10]).await;
    assert_eq!(reply.status, 413);
    cluster.stop().await;
}

#[tokio::test]
async fn h149_h150_core_a_message_to_a_group_goes_to_every_member_under_ids_of_their_own() {
    let cluster = Cluster::start(1).await;
    let [a, b] = [1, 2].map(|device| cluster.registered(device));
    let mut client = cluster.client().await;
    let made = create(&mut client, "n", &[&a, &b]).await;
    for (number, target) in ["to", "notification_key"].into_iter().enumerate() {
        let reply = send(&mut client, json!({target: made, "data": {"k": "v"}, "collapse_key": "c"})).await;
        assert_eq!((reply.status, reply.text()), (200, r#"{"success":2,"failure":0}"#));
        let world = cluster.world.lock().unwrap();
        let sent: Vec<_> = world
            .asked
            .iter()
            .filter_map(|(_, operation)| match &operation.kind {
                Some(operation::Kind::Enqueue(enqueue)) => Some((operation.id.clone(), enqueue)),
                _ => None,
            })
            .collect();
        assert_eq!(sent.len(), 2 * (number + 1));
        assert_eq!(sent.iter().map(|(id, _)| id).collect::<BTreeSet<_>>().len(), sent.len());
        let to: BTreeSet<Vec<u8>> = sent.iter().map(|(_, enqueue)| enqueue.registration_id.to_vec()).collect();
        assert_eq!(to, set(&[&a, &b]));
        assert!(sent.iter().all(|(_, enqueue)| enqueue.collapse_key == "c" && enqueue.sender == SENDER));
    }
    // Trying twice is sending once.
    cluster.world.lock().unwrap().faults = vec![Fault::Unknown, Fault::BreakAfter];
    let known = cluster.world.lock().unwrap().known.len();
    let reply = send(&mut client, json!({"to": made, "data": {"k": "v"}})).await;
    assert_eq!(reply.text(), r#"{"success":2,"failure":0}"#);
    assert_eq!(cluster.world.lock().unwrap().known.len(), known + 2);
    // Nothing is stored by a dry run.
    let reply = send(&mut client, json!({"to": made, "dry_run": true})).await;
    assert_eq!(reply.text(), r#"{"success":2,"failure":0}"#);
    assert_eq!(cluster.world.lock().unwrap().known.len(), known + 2);
    cluster.stop().await;
}

#[tokio::test]
async fn h151_core_what_is_no_group_of_the_sender_is_told_as_of_a_token() {
    let cluster = Cluster::start(1).await;
    let a = cluster.registered(1);
    let mut client = cluster.client().await;
    let made = create(&mut client, "n", &[&a]).await;
    let forged = NotificationKey::mint(&TokenKey::new(1, [9; 32]), GroupTag(1), GroupBits(1));
    for forged in [forged.unwrap().as_str(), "APA91bxyz", &made[..139]] {
        assert_eq!(one_result(&send(&mut client, json!({"to": forged})).await), "InvalidRegistration");
    }
    assert_eq!(one_result(&send(&mut client, json!({"notification_key": a.as_str()})).await), "InvalidRegistration");
    // A group key is no token: not among many, and not in plain text.
    let reply = send(&mut client, json!({"registration_ids": [a.as_str(), made]})).await.json();
    assert_eq!((&reply["success"], &reply["results"][1]["error"]), (&json!(1), &json!("InvalidRegistration")));
    let plain = client.request("POST /gcm/send", &[AUTH], format!("to={made}").as_bytes()).await;
    assert_eq!(plain.text(), "Error=InvalidRegistration\n");
    // What is wrong with the message is told before the group is looked at.
    let reply = send(&mut client, json!({"to": made, "time_to_live": -1})).await;
    assert_eq!(one_result(&reply), "InvalidTtl");
    {
        let mut world = cluster.world.lock().unwrap();
        world.groups.0.values_mut().next().unwrap().0 = "900101".to_owned();
    }
    assert_eq!(one_result(&send(&mut client, json!({"to": made})).await), "MismatchSenderId");
    assert_eq!(error(&post(&mut client, change("add", &made, &[&a])).await), "notification_key not found");
    cluster.world.lock().unwrap().groups.0.clear();
    assert_eq!(one_result(&send(&mut client, json!({"to": made})).await), "NotRegistered");
    cluster.stop().await;
}

#[tokio::test]
async fn h149_core_members_that_are_dead_fail_once_and_leave_and_a_group_of_the_dead_is_gone() {
    let cluster = Cluster::start(1).await;
    let [a, b] = [1, 2].map(|device| cluster.registered(device));
    let mut client = cluster.client().await;
    let made = create(&mut client, "n", &[&a, &b]).await;
    cluster.kill(&b);
    let dry = send(&mut client, json!({"to": made, "dry_run": true})).await.json();
    assert_eq!(dry, json!({"success": 1, "failure": 1, "failed_registration_ids": [b.as_str()]}));
    assert_eq!(cluster.members(), set(&[&a, &b]), "a dry run changes nothing");
    let reply = send(&mut client, json!({"to": made})).await.json();
    assert_eq!(reply, json!({"success": 1, "failure": 1, "failed_registration_ids": [b.as_str()]}));
    assert_eq!(cluster.members(), set(&[&a]));
    assert_eq!(send(&mut client, json!({"to": made})).await.text(), r#"{"success":1,"failure":0}"#);
    // A package that is another's is a failure, and no reason to leave.
    let reply = send(&mut client, json!({"to": made, "restricted_package_name": "com.other"})).await.json();
    assert_eq!(reply, json!({"success": 0, "failure": 1, "failed_registration_ids": [a.as_str()]}));
    assert_eq!(cluster.members(), set(&[&a]));
    cluster.kill(&a);
    assert_eq!(one_result(&send(&mut client, json!({"to": made})).await), "NotRegistered");
    assert_eq!(cluster.groups(), 0);
    cluster.stop().await;
}

#[tokio::test]
async fn h148_core_the_dead_leave_when_their_group_is_looked_up_added_to_or_made_again() {
    let cluster = Cluster::start(1).await;
    let [a, b, c, d] = [1, 2, 3, 4].map(|device| cluster.registered(device));
    let mut client = cluster.client().await;
    let made = create(&mut client, "n", &[&a, &b, &c]).await;
    cluster.kill(&a);
    assert_eq!(key(&look_up(&mut client, "n").await), made);
    assert_eq!(cluster.members(), set(&[&b, &c]));
    cluster.kill(&b);
    assert_eq!(key(&post(&mut client, change("add", &made, &[&d])).await), made);
    assert_eq!(cluster.members(), set(&[&c, &d]));
    // Dead tokens can be removed, or an app server could not tidy up.
    cluster.kill(&c);
    assert_eq!(key(&post(&mut client, change("remove", &made, &[&c])).await), made);
    assert_eq!(cluster.members(), set(&[&d]));
    cluster.kill(&d);
    let e = cluster.registered(5);
    assert_eq!(error(&post(&mut client, change("add", &made, &[&e])).await), "notification_key not found");
    assert_eq!(cluster.groups(), 0);
    let made = create(&mut client, "n", &[&e]).await;
    cluster.kill(&e);
    let f = cluster.registered(6);
    let again = create(&mut client, "n", &[&f]).await;
    assert_ne!(made, again);
    assert_eq!(one_result(&send(&mut client, json!({"to": made})).await), "NotRegistered");
    assert_eq!(cluster.members(), set(&[&f]));
    // The last one that leaves ends it.
    assert_eq!(key(&post(&mut client, change("remove", &again, &[&f])).await), again);
    assert_eq!(error(&look_up(&mut client, "n").await), "notification_key not found");
    cluster.stop().await;
}

#[tokio::test]
async fn a_token_that_was_superseded_by_another_member_leaves_core() {
    let cluster = Cluster::start(1).await;
    let [old, c] = [1, 2].map(|device| cluster.registered(device));
    // Registered anew by the same devices.
    let [new, d] = [1, 2].map(|device| {
        let mut rng = StdRng::seed_from_u64(100 + device);
        let token = RegistrationToken::draw(&token_key(1), &Iid::invent(&mut rng), tag_of(device), &mut rng);
        cluster.register(&token, None);
        token
    });
    cluster.register(&old, Some(&new));
    let mut client = cluster.client().await;
    let made = create(&mut client, "n", &[&old, &c]).await;
    assert_eq!(cluster.members(), set(&[&old, &c]), "kept as it was named");
    assert_eq!(send(&mut client, json!({"to": made})).await.text(), r#"{"success":2,"failure":0}"#);
    assert_eq!(key(&post(&mut client, change("add", &made, &[&new])).await), made);
    assert_eq!(cluster.members(), set(&[&new, &c]));
    assert_eq!(key(&post(&mut client, change("add", &made, &[&old])).await), made);
    assert_eq!(cluster.members(), set(&[&new, &c]), "it would be the same device twice");
    // Superseded since: the send finds it.
    post(&mut client, change("add", &made, &[&d])).await;
    cluster.register(&c, Some(&d));
    assert_eq!(send(&mut client, json!({"to": made})).await.text(), r#"{"success":3,"failure":0}"#);
    assert_eq!(cluster.members(), set(&[&new, &d]));
    cluster.stop().await;
}

#[tokio::test]
async fn shards_that_are_away_make_nobody_dead_and_503_where_nothing_was_accepted_core() {
    let cluster = Cluster::start(1).await;
    let mut client = cluster.client().await;
    let tag = GroupTag::of(&TagKey::new([1; 32]), &SenderId::parse(SENDER).unwrap(), "n");
    let of_group = u32::from(cluster.shard_of_tag(tag.0).0);
    // Members on other shards than the group's, and than each other's.
    let mut devices = (1..).map(|device| cluster.registered(device));
    let a = devices.find(|token| u32::from(cluster.shard(token).0) != of_group).unwrap();
    let of_a = u32::from(cluster.shard(&a).0);
    let b = devices.find(|token| ![of_group, of_a].contains(&u32::from(cluster.shard(token).0))).unwrap();
    let of_b = u32::from(cluster.shard(&b).0);
    let made = create(&mut client, "n", &[&a, &b]).await;
    let away = |shards: &[u32]| cluster.world.lock().unwrap().away = shards.iter().copied().collect();
    away(&[of_b]);
    let reply = send(&mut client, json!({"to": made})).await.json();
    assert_eq!(reply, json!({"success": 1, "failure": 1, "failed_registration_ids": [b.as_str()]}));
    assert_eq!(key(&look_up(&mut client, "n").await), made);
    assert_eq!(cluster.members(), set(&[&a, &b]));
    // Whether a token may join is not known.
    let body = json!({"operation": "create", "notification_key_name": "m", "registration_ids": ids(&[&a, &b])});
    assert_eq!(post(&mut client, body).await.status, 503);
    away(&[of_a, of_b]);
    let reply = send(&mut client, json!({"to": made})).await;
    assert_eq!(reply.status, 503);
    assert!(reply.header("retry-after").is_some());
    away(&[of_group]);
    assert_eq!(send(&mut client, json!({"to": made})).await.status, 503);
    assert_eq!(look_up(&mut client, "n").await.status, 503);
    away(&[]);
    assert_eq!(send(&mut client, json!({"to": made})).await.text(), r#"{"success":2,"failure":0}"#);
    assert_eq!(cluster.groups(), 1);
    cluster.stop().await;
}

#[tokio::test]
async fn a_key_that_is_not_known_here_yet_is_never_invalid_core() {
    let cluster = Cluster::start(1).await;
    let a = cluster.registered(1);
    let mut client = cluster.client().await;
    let made = create(&mut client, "n", &[&a]).await;
    let old = NotificationKey::parse(&made).unwrap().verify(&token_key(1)).unwrap();
    let newer = NotificationKey::mint(&token_key(2), old.group_tag(), old.bits()).unwrap();
    assert_eq!(send(&mut client, json!({"to": newer.as_str()})).await.status, 503);
    assert_eq!(post(&mut client, change("remove", newer.as_str(), &[&a])).await.status, 503);
    cluster.meta.send_modify(|state| {
        state.keys.push(sealed(KeyPurpose::Token, 2));
        state.revision += 1;
    });
    super::cluster::until("the key is known", || cluster.gateway.metrics.meta_revision.get() == 2).await;
    assert_eq!(send(&mut client, json!({"to": newer.as_str()})).await.text(), r#"{"success":1,"failure":0}"#);
    // What is looked up is spelled with the key it was made with.
    assert_eq!(key(&look_up(&mut client, "n").await), made);
    cluster.stop().await;
}
