//! Formats that outlive a build: tokens in the hands of app servers, tags and shards in stored rows, identities in devices.
//!
//! The vectors were computed apart from this crate, from the definitions in the headers of its modules. When one of these tests
//! fails, the code is wrong, not the vector.

use std::{fs, path::Path};

use martlet_proto::{
    cluster::meta::{KeyPurpose, SealedKey},
    group::{GroupBits, GroupTag, NotificationKey},
    message::{MessageId, SenderId, Sequence},
    seal::ClusterSecret,
    shard::{Shard, ShardCount, shard_of},
    tag::{AndroidId, CheckinKey, DeviceTag, TagKey},
    token::{Iid, RegistrationId, RegistrationToken, TokenError, TokenKey},
};
use rand::RngCore;
use serde_json::Value;

use crate::unhex;

pub(crate) fn vectors(name: &str) -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors").join(name);
    let vectors: Vec<Value> = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    assert!(!vectors.is_empty());
    vectors
}

pub(crate) fn text<'a>(vector: &'a Value, field: &str) -> &'a str {
    vector[field].as_str().unwrap_or_else(|| panic!("{field} of {vector}"))
}

pub(crate) fn number(vector: &Value, field: &str) -> u32 {
    vector[field].as_u64().and_then(|number| number.try_into().ok()).unwrap_or_else(|| panic!("{field} of {vector}"))
}

pub(crate) fn secret(vector: &Value) -> [u8; 32] {
    bytes32(vector, "key")
}

fn bytes32(vector: &Value, field: &str) -> [u8; 32] {
    unhex(text(vector, field)).try_into().unwrap()
}

fn tag(vector: &Value) -> DeviceTag {
    DeviceTag(u64::from_str_radix(text(vector, "tag"), 16).unwrap())
}

#[test]
fn a_device_has_the_tag_it_always_had() {
    for vector in vectors("tag.json") {
        let (key, id) = (TagKey::new(secret(&vector)), text(&vector, "android_id").parse::<AndroidId>().unwrap());
        assert_eq!(key.tag(id), tag(&vector), "{vector}");
        assert_eq!(key.android_id(tag(&vector)), Some(id), "{vector}");
    }
}

#[test]
fn ck_03_core_a_device_has_the_security_token_it_always_had() {
    for vector in vectors("security_token.json") {
        let id = text(&vector, "android_id").parse::<AndroidId>().unwrap();
        let token = CheckinKey::new(1, secret(&vector)).security_token(id);
        assert_eq!(token.get().to_string(), text(&vector, "security_token"), "{vector}");
    }
}

#[test]
fn a_device_is_in_the_shard_it_always_was() {
    for vector in vectors("shard.json") {
        let count = ShardCount::new(number(&vector, "count")).unwrap();
        let shard = Shard(number(&vector, "shard").try_into().unwrap());
        assert_eq!(shard_of(tag(&vector), count), shard, "{vector}");
    }
}

#[test]
fn a_registration_has_the_token_it_always_had() {
    for vector in vectors("token.json") {
        let key = TokenKey::new(number(&vector, "key_id"), secret(&vector));
        let iid = Iid::parse(text(&vector, "iid")).unwrap();
        let id = RegistrationId::from_bytes(&unhex(text(&vector, "registration_id"))).unwrap();
        let minted = RegistrationToken::mint(&key, &iid, tag(&vector), id).unwrap();
        assert_eq!(minted.as_str(), text(&vector, "token"));
        let read = RegistrationToken::parse(text(&vector, "token")).unwrap().verify(&key).unwrap();
        assert_eq!(
            (read.iid(), read.key_id(), read.device_tag(), read.registration_id()),
            (&iid, key.id, tag(&vector), id)
        );
    }
}

#[test]
fn a_message_id_is_spelled_as_it_always_was() {
    for vector in vectors("message_id.json") {
        let part = |field| text(&vector, field).parse().unwrap();
        let id = MessageId { micros: part("micros"), random: part("random") };
        assert_eq!(id.to_string(), text(&vector, "text"));
        assert_eq!(id.to_bytes().to_vec(), unhex(text(&vector, "bytes")));
    }
}

fn reason(vector: &Value) -> TokenError {
    match text(vector, "reason") {
        "shape" => TokenError::Shape,
        "spelling" => TokenError::Spelling,
        "version" => TokenError::Version,
        "reserved" => TokenError::Reserved,
        "key" => TokenError::Key,
        "mac" => TokenError::Mac,
        _ => panic!("{vector}"),
    }
}

/// All of these were made for key 7 with the secret 00, 01, .. 1f; those that say so with a MAC that fits.
#[test]
fn a_token_in_another_spelling_or_from_elsewhere_is_refused_for_this_reason() {
    let key = TokenKey::new(7, std::array::from_fn(|at| at as u8));
    for vector in vectors("token_refused.json") {
        let read = RegistrationToken::parse(text(&vector, "token")).and_then(|token| token.verify(&key));
        assert_eq!(read, Err(reason(&vector)), "{vector}");
    }
}

#[test]
fn a_group_has_the_tag_and_the_notification_key_it_always_had() {
    for vector in vectors("notification_key.json") {
        let sender = SenderId::parse(text(&vector, "sender")).unwrap();
        let hex = |field| u64::from_str_radix(text(&vector, field), 16).unwrap();
        let tag = GroupTag::of(&TagKey::new(bytes32(&vector, "tag_key")), &sender, text(&vector, "name"));
        assert_eq!(tag, GroupTag(hex("tag")), "{vector}");
        let key = TokenKey::new(number(&vector, "key_id"), secret(&vector));
        let minted = NotificationKey::mint(&key, tag, GroupBits(hex("bits"))).unwrap();
        assert_eq!(minted.as_str(), text(&vector, "notification_key"));
        let read = NotificationKey::parse(minted.as_str()).unwrap().verify(&key);
        assert_eq!(read, Ok(minted));
    }
}

/// As with tokens: made for key 7 with the secret 00, 01, .. 1f.
#[test]
fn a_notification_key_in_another_spelling_or_from_elsewhere_is_refused_for_this_reason() {
    let key = TokenKey::new(7, std::array::from_fn(|at| at as u8));
    for vector in vectors("notification_key_refused.json") {
        let read = NotificationKey::parse(text(&vector, "notification_key")).and_then(|read| read.verify(&key));
        assert_eq!(read, Err(reason(&vector)), "{vector}");
    }
}

#[test]
fn a_sequence_has_the_bytes_it_always_had() {
    for vector in vectors("sequence.json") {
        let sequence = Sequence {
            incarnation: number(&vector, "incarnation"),
            index: text(&vector, "index").parse().unwrap(),
            position: number(&vector, "position"),
        };
        let bytes = unhex(text(&vector, "bytes"));
        assert_eq!(sequence.to_bytes().to_vec(), bytes, "{vector}");
        assert_eq!(Sequence::from_bytes(&bytes), Some(sequence), "{vector}");
    }
}

#[test]
fn a_key_is_sealed_as_it_always_was() {
    for vector in vectors("sealed_key.json") {
        let secret = ClusterSecret::new(bytes32(&vector, "secret"));
        let cluster_id = unhex(text(&vector, "cluster_id"));
        let purpose = match text(&vector, "purpose") {
            "token" => KeyPurpose::Token,
            "checkin" => KeyPurpose::Checkin,
            "tag" => KeyPurpose::Tag,
            _ => panic!("{vector}"),
        };
        let (key_id, key) = (number(&vector, "key_id"), bytes32(&vector, "key"));
        let sealed = secret.seal(&cluster_id, purpose, key_id, &key, &mut Drawn(unhex(text(&vector, "nonce"))));
        assert_eq!(sealed, unhex(text(&vector, "sealed")), "{vector}");
        let sealed = SealedKey { purpose: purpose.into(), key_id, sealed, ..SealedKey::default() };
        assert_eq!(secret.unseal(&cluster_id, &sealed), Ok(key), "{vector}");
    }
}

/// "Draws" the nonce of a vector.
struct Drawn(Vec<u8>);

impl RngCore for Drawn {
    fn next_u32(&mut self) -> u32 {
        panic!("a nonce is drawn as bytes")
    }

    fn next_u64(&mut self) -> u64 {
        panic!("a nonce is drawn as bytes")
    }

    fn fill_bytes(&mut self, dst: &mut [u8]) {
        dst.copy_from_slice(&self.0);
    }
}
