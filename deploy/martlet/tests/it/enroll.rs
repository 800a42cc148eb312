//! device.md section 14 on the wire: check-in (CK), registration (RG), Firebase installations (FI).

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
};

use flate2::{Compression, read::GzDecoder, write::GzEncoder};
use martlet_proto::device::checkin::{AndroidCheckinProto, AndroidCheckinRequest, AndroidCheckinResponse};
use prost::Message as _;
use serde_json::{Value, json};

use crate::{
    app_server::{Answer, Http, send_json},
    broker::{ONE, TWO, shared},
    device::{Identity, check_in, check_in_with},
};

const APP: &str = "com.example.app";

/// The 29 bytes of a real client. Source: device.md section 10.
const REQUEST_OF_29_BYTES: &str = "221660036a120803120c39342e302e343630362e353118017003b00100";

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

fn request(identity: Option<(u64, u64)>) -> Vec<u8> {
    let request = AndroidCheckinRequest {
        id: identity.map(|(id, _)| id.cast_signed()),
        security_token: identity.map(|(_, token)| token),
        version: Some(3),
        checkin: AndroidCheckinProto::default(),
        ..AndroidCheckinRequest::default()
    };
    request.encode_to_vec()
}

fn check(body: &[u8]) -> Answer {
    check_in_with(shared(), body, &[("Content-Type", "application/x-protobuf")])
}

fn register(identity: &Identity, form: &str) -> Answer {
    identity.register_form(shared(), form)
}

fn token_of(answer: &Answer) -> String {
    answer.text().strip_prefix("token=").unwrap_or_else(|| panic!("{} {}", answer.status, answer.text())).to_owned()
}

fn send(key: &str, token: &str) -> Value {
    send_json(&shared().address("http"), key, &json!({ "to": token })).json()["results"][0].clone()
}

fn is_accepted(key: &str, token: &str) -> bool {
    send(key, token)["message_id"].is_string()
}

// ------------------------------------------------------------------------------------------- check-in

#[test]
fn ck_01_a_new_device_gets_an_identity_below_2_to_63() {
    let answer = check(&request(None));
    assert_eq!(answer.status, 200);
    let response = AndroidCheckinResponse::decode(&answer.body[..]).unwrap();
    assert!(response.stats_ok);
    for number in [response.android_id.unwrap(), response.security_token.unwrap()] {
        assert!(number > 0 && number < 1 << 63, "{number}");
    }
}

#[test]
fn ck_02_new_identities_differ_everywhere() {
    let ids: Vec<_> = (0..50).map(|_| check_in(shared())).collect();
    let distinct: BTreeSet<_> = ids.iter().flat_map(|id| [id.android_id, id.security_token]).collect();
    assert_eq!(distinct.len(), 100);
    // From a generator, not a counter: every one of the top 16 bits below the sign is seen both ways.
    let (or, and) = ids.iter().fold((0, u64::MAX), |(or, and), id| (or | id.android_id, and & id.android_id));
    assert_eq!((or >> 47, and >> 47), (0xffff, 0));
}

#[test]
fn ck_03_a_valid_pair_is_answered_by_the_same_pair() {
    let identity = check_in(shared());
    let answer = check(&request(Some((identity.android_id, identity.security_token))));
    let response = AndroidCheckinResponse::decode(&answer.body[..]).unwrap();
    assert_eq!(response.android_id, Some(identity.android_id));
    assert_eq!(response.security_token, Some(identity.security_token));
}

#[test]
fn ck_04_ck_05_a_wrong_token_and_an_unknown_id_give_401() {
    let identity = check_in(shared());
    assert_eq!(check(&request(Some((identity.android_id, identity.security_token ^ 1)))).status, 401);
    assert_eq!(check(&request(Some((identity.android_id ^ 1, identity.security_token)))).status, 401);
    assert_eq!(check(&request(Some((77, 78)))).status, 401);
}

#[test]
fn ck_06_an_undecodable_body_gives_400() {
    assert_eq!(check(b"\xff\xff\xff\xff").status, 400);
    let headers = [("Content-Type", "application/x-protobuf"), ("Content-Encoding", "gzip")];
    assert_eq!(check_in_with(shared(), b"no gzip", &headers).status, 400);
}

#[test]
fn ck_07_ck_08_a_gzipped_request_is_answered_gzipped_and_both_content_types_work() {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(&request(None)).unwrap();
    let headers =
        [("Content-Type", "application/x-protobuffer"), ("Content-Encoding", "gzip"), ("Accept-Encoding", "gzip")];
    let answer = check_in_with(shared(), &encoder.finish().unwrap(), &headers);
    assert_eq!((answer.status, answer.header("content-encoding")), (200, Some("gzip")));
    let mut body = Vec::new();
    GzDecoder::new(&answer.body[..]).read_to_end(&mut body).unwrap();
    assert!(AndroidCheckinResponse::decode(&body[..]).unwrap().stats_ok);
    let plain = check(&request(None));
    assert_eq!((plain.status, plain.header("content-encoding")), (200, None));
}

#[test]
fn a_gzip_bomb_is_refused() {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(&vec![0; 64 << 20]).unwrap();
    let headers = [("Content-Encoding", "gzip"), ("Accept-Encoding", "gzip")];
    let status = check_in_with(shared(), &encoder.finish().unwrap(), &headers).status;
    assert!([400, 413].contains(&status), "{status}");
}

#[test]
fn ck_09_id_and_token_are_64_bits_fixed_on_the_wire() {
    let answer = check(&request(None));
    let mut body = &answer.body[..];
    let mut fixed = BTreeSet::new();
    while !body.is_empty() {
        let (number, wire_type) = prost::encoding::decode_key(&mut body).unwrap();
        if wire_type == prost::encoding::WireType::SixtyFourBit {
            fixed.insert(number);
        }
        prost::encoding::skip_field(wire_type, number, &mut body, prost::encoding::DecodeContext::default()).unwrap();
    }
    assert_eq!(fixed, BTreeSet::from([7, 8]));
}

#[test]
fn ck_10_unknown_fields_are_accepted() {
    let mut body = request(None);
    // Field 18, a message; field 3 of the check-in (events); a group nobody knows.
    body.extend_from_slice(&[0x92, 0x01, 0x02, 0x08, 0x01, 0xfb, 0x3f, 0xfc, 0x3f]);
    assert_eq!(check(&body).status, 200);
}

#[test]
fn ck_11_the_smallest_real_request_is_answered_with_every_required_field() {
    let answer = check(&unhex(REQUEST_OF_29_BYTES));
    assert_eq!(answer.status, 200);
    // A strict parser refuses an answer without field 1, which must be the varint 1.
    assert_eq!(answer.body[..2], [0x08, 0x01]);
    AndroidCheckinResponse::decode(&answer.body[..]).unwrap();
}

// ------------------------------------------------------------------------------------------- registration

#[test]
fn rg_01_rg_02_without_or_with_a_wrong_pair_registration_fails_to_authenticate() {
    let identity = check_in(shared());
    let form = format!("app={APP}&sender={}&device={}", ONE.0, identity.android_id);
    let with = |headers: &[(&str, &str)]| {
        let answer =
            Http::connect(&shared().address("http")).request("POST", "/c2dm/register3", headers, form.as_bytes());
        (answer.status, answer.text().to_owned())
    };
    let failed = (401, "Error=AUTHENTICATION_FAILED".to_owned());
    assert_eq!(with(&[]), failed);
    assert_eq!(with(&[("Authorization", "AidLogin 1")]), failed);
    assert_eq!(with(&[("Authorization", &format!("AidLogin {}:{}", identity.android_id, 7))]), failed);
    assert_eq!(
        with(&[("Authorization", &format!("Bearer {}:{}", identity.android_id, identity.security_token))]),
        failed
    );
}

#[test]
fn rg_03_another_device_is_a_phone_registration_error() {
    let identity = check_in(shared());
    let form = format!("app={APP}&sender={}&device={}", ONE.0, identity.android_id ^ 1);
    let authorization = identity.authorization();
    let answer = Http::connect(&shared().address("http")).request(
        "POST",
        "/c2dm/register3",
        &[("Authorization", &authorization)],
        form.as_bytes(),
    );
    assert_eq!(answer.text(), "Error=PHONE_REGISTRATION_ERROR");
}

#[test]
fn rg_04_without_app_or_sender_the_parameters_are_invalid() {
    let identity = check_in(shared());
    for form in [format!("sender={}", ONE.0), format!("app={APP}"), format!("app=&sender={}", ONE.0)] {
        assert_eq!(register(&identity, &form).text(), "Error=INVALID_PARAMETERS", "{form}");
    }
}

#[test]
fn rg_05_an_unknown_sender_is_invalid_with_200_but_400_for_handsets() {
    let identity = check_in(shared());
    let form = format!("app={APP}&sender=123456&device={}", identity.android_id);
    let authorization = identity.authorization();
    let with = |agent: &str| {
        let headers = [("Authorization", authorization.as_str()), ("User-Agent", agent)];
        let answer =
            Http::connect(&shared().address("http")).request("POST", "/c2dm/register3", &headers, form.as_bytes());
        (answer.status, answer.text().to_owned())
    };
    assert_eq!(with("curl"), (200, "Error=INVALID_SENDER".to_owned()));
    assert_eq!(with("Android-GCM/1.5 (generic x)"), (400, "Error=INVALID_SENDER".to_owned()));
}

#[test]
fn rg_06_rg_07_the_answer_is_a_token_of_the_known_shape_and_nothing_else() {
    let answer = register(&check_in(shared()), &format!("app={APP}&sender={}", ONE.0));
    assert_eq!(answer.status, 200);
    let token = token_of(&answer);
    let (iid, rest) = token.split_once(':').unwrap();
    let base64url = |text: &str| text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
    assert!((11..=22).contains(&iid.len()) && base64url(iid), "{token}");
    assert!(rest.starts_with("APA91b") && rest.len() == 140 && base64url(rest), "{token}");
    assert!(!token.contains("Error"));
}

#[test]
fn rg_08_a_given_instance_id_is_the_token_s_prefix_in_every_spelling() {
    let identity = check_in(shared());
    for (spelling, iid) in [("appid", "eAbCdEfGhIj"), ("appId", "fAbCdEfGhIj"), ("X-appid", "dQw4w9WgXcQdQw4w9WgXcQ")] {
        let token = token_of(&register(&identity, &format!("app={APP}&sender={}&scope=GCM&{spelling}={iid}", ONE.0)));
        assert_eq!(token.split_once(':').unwrap().0, iid, "{spelling}");
    }
}

#[test]
fn rg_09_the_same_registration_gives_the_same_token() {
    let identity = check_in(shared());
    for form in [format!("app={APP}&sender={}", ONE.0), format!("app={APP}&sender={}&scope=*&appid=eAbCdEfGhIj", ONE.0)]
    {
        assert_eq!(token_of(&register(&identity, &form)), token_of(&register(&identity, &form)));
    }
}

#[test]
fn rg_10_another_sender_of_the_same_instance_gives_another_token_and_both_live() {
    let identity = check_in(shared());
    let form = |sender: &str| format!("app={APP}&sender={sender}&scope=GCM&appid=eAbCdEfGhIj");
    let (one, two) = (token_of(&register(&identity, &form(ONE.0))), token_of(&register(&identity, &form(TWO.0))));
    assert_ne!(one, two);
    assert!(is_accepted(ONE.1, &one) && is_accepted(TWO.1, &two));
    assert_eq!(send(ONE.1, &two)["error"], "MismatchSenderId");
}

#[test]
fn rg_11_a_token_of_several_senders_is_accepted_from_each_and_from_no_other() {
    let identity = check_in(shared());
    let both = token_of(&register(&identity, &format!("app={APP}&sender={},{}", ONE.0, TWO.0)));
    assert!(is_accepted(ONE.1, &both) && is_accepted(TWO.1, &both));
    let only_one = token_of(&register(&identity, &format!("app={APP}.b&sender={}", ONE.0)));
    assert_eq!(send(TWO.1, &only_one)["error"], "MismatchSenderId");
}

#[test]
fn rg_12_bare_and_prefixed_spellings_are_the_same() {
    let identity = check_in(shared());
    let bare = format!("app={APP}&sender={}&scope=GCM&subtype=s&appid=eAbCdEfGhIj&gmsv=94", ONE.0);
    let prefixed = format!("app={APP}&sender={}&X-scope=GCM&X-subtype=s&X-appid=eAbCdEfGhIj&X-gmsv=94", ONE.0);
    let token = token_of(&register(&identity, &bare));
    assert_eq!(token, token_of(&register(&identity, &prefixed)));
    let deleted = register(&identity, &format!("app={APP}&X-delete=true"));
    assert_eq!(deleted.text(), format!("deleted={APP}"));
}

#[test]
fn rg_13_a_legacy_delete_names_the_application_and_the_token_dies() {
    let identity = check_in(shared());
    let token = token_of(&register(&identity, &format!("app={APP}&sender={}", ONE.0)));
    let answer = register(&identity, &format!("app={APP}&delete=true&gcm_unreg_caller=false"));
    assert_eq!((answer.status, answer.text()), (200, &*format!("deleted={APP}")));
    assert_eq!(send(ONE.1, &token)["error"], "NotRegistered");
    // Registered again, the application has another token.
    assert_ne!(token_of(&register(&identity, &format!("app={APP}&sender={}", ONE.0))), token);
}

#[test]
fn rg_16_delete_is_true_or_1_and_nothing_else() {
    let identity = check_in(shared());
    let form = format!("app={APP}&sender={}", ONE.0);
    for (value, deletes) in [("0", false), ("false", false), ("", false), ("1", true), ("true", true)] {
        let token = token_of(&register(&identity, &form));
        let answer = register(&identity, &format!("{form}&delete={value}"));
        assert_eq!(answer.text().starts_with("deleted="), deletes, "{value:?}: {}", answer.text());
        assert_eq!(is_accepted(ONE.1, &token), !deletes, "{value:?}");
    }
}

#[test]
fn rg_19_register_and_register3_behave_alike() {
    let identity = check_in(shared());
    let form = format!("app={APP}&sender={}&device={}", ONE.0, identity.android_id);
    let authorization = identity.authorization();
    let through = |path: &str, body: &str| {
        let headers = [("Authorization", authorization.as_str())];
        let answer = Http::connect(&shared().address("http")).request("POST", path, &headers, body.as_bytes());
        (answer.status, answer.text().to_owned())
    };
    assert_eq!(through("/c2dm/register", &form), through("/c2dm/register3", &form));
    assert_eq!(through("/c2dm/register", "app=x"), through("/c2dm/register3", "app=x"));
}

// ------------------------------------------------------------------------------------------- installations

fn install(fid: &str, content_type: &str) -> Value {
    let path = format!("/v1/projects/{}/installations", ONE.0);
    let body = json!({ "appId": "1:900100200300:web:0", "authVersion": "FIS_v2", "fid": fid, "sdkVersion": "w:0.6.4" });
    let headers = [("Content-Type", content_type), ("x-goog-api-key", "anything")];
    let answer = Http::connect(&shared().address("http")).request("POST", &path, &headers, body.to_string().as_bytes());
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

#[test]
fn fi_01_an_installation_has_a_fid_a_refresh_token_and_an_expiring_token() {
    let json = install("cwSbCFTFNFUSlGmxM5YqEQ", "application/json");
    let word = |value: &Value| value.as_str().unwrap_or_else(|| panic!("{json}")).to_owned();
    assert_eq!(word(&json["fid"]).len(), 22);
    assert!(!word(&json["refreshToken"]).is_empty() && !word(&json["authToken"]["token"]).is_empty());
    let expires = word(&json["authToken"]["expiresIn"]);
    let digits = expires.strip_suffix('s').unwrap();
    assert!(!digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()), "{expires}");
}

#[test]
fn fi_02_the_body_is_json_whatever_its_type_and_the_fid_is_normalised() {
    let json = install("cw+bCFTFNF/SlGmxM5YqEQA=", "text/plain;charset=UTF-8");
    assert_eq!(json["fid"], "cw-bCFTFNF_SlGmxM5YqEQ");
}
